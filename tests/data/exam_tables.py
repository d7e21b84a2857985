"""Small tables of exams, for tests that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ultra.data import parquet, schema
from ultra.types import Conversation, FrameGroup, Turn

T = 4
WIDTHS = {"clip": 5, "sam": 6}


def make_exam(number: int, split: str = "train", frames: tuple[bytes, ...] = ()) -> FrameGroup:
    """An exam of one to three frames, which are bytes that name them."""
    frames = frames or tuple(f"frame {number}.{i}".encode() for i in range(1 + number % 3))
    turns = (Turn("user", "question"), Turn("assistant", f"answer {number}"))
    return FrameGroup(
        exam_id=f"exam-{number}",
        patient_key=f"patient-{number}",
        site="肝",
        findings=f"findings {number}",
        diagnosis="diagnosis",
        frames=frames,
        frame_sizes=((8, 6),) * len(frames),
        frame_sources=("cine",) * len(frames),
        conversations=tuple(Conversation(stage, "t", turns) for stage in ("align", "instruct")),
        split=split,  # type: ignore[arg-type]
    )


def write_exams(folder: Path, parts: list[list[FrameGroup]], per_row_group: int = 3) -> list[str]:
    """Write a table and return the addresses of its parts."""
    written, position = [], 0
    for groups in parts:
        rows = [schema.to_row(group) for group in groups]
        # Every row counts for 512 bytes and its frames, which are shorter than 64.
        part = parquet.write_part(
            rows, str(folder), schema.EXAMS, position=position, row_group_bytes=per_row_group * 512
        )
        assert part is not None
        written.append(part)
        position += len(groups)
    parquet.publish_parts(str(folder), written)
    return parquet.part_uris(str(folder))


def encode(groups: Sequence[Sequence[bytes]]) -> list[dict[str, np.ndarray]]:
    """The features of several groups, as the encoders return them."""
    return list(map(encode_frames, groups))


def encode_frames(frames: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Features that can be told from one another: drawn from the frame's own bytes."""
    return {
        name: np.stack(
            [np.random.default_rng([*frame, width]).normal(size=(T, width)) for frame in frames]
        ).astype(np.float16)
        for name, width in WIDTHS.items()
    }
