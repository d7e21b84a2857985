"""Small exams for the tests of evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ultra.data import parquet, schema
from ultra.evaluate.predictions import Prediction
from ultra.types import Conversation, FrameGroup, Split, Turn


def make_frame(grey: int) -> bytes:
    pixels = np.full((24, 32), 40, dtype=np.uint8)
    pixels[6:18, 8:20] = grey
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_prediction(answer: str = "囊肿", truth: str | None = "囊肿", **more: object) -> Prediction:
    values = {
        "exam_id": "e", "patient_key": "p", "site": "肝脏", "task": "kind",
        "question": "病变是什么？", "chosen": 0, "scores": (0.0,), "valid": None, "brightest": None,
        "darkest": None, "token_ids": (1,), "finish_reason": "stop", "content_sha256": "0",
    }  # fmt: skip
    return Prediction(answer=answer, truth=truth, **{**values, **more})  # type: ignore[arg-type]


def ask(stage: str, task: str, *texts: str) -> Conversation:
    roles = ("user", "assistant") * (len(texts) // 2)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=True))
    return Conversation(stage, task, turns)  # type: ignore[arg-type]


def make_exam(
    exam_id: str, split: Split, *conversations: Conversation, frames: int = 3
) -> FrameGroup:
    seed = sum(exam_id.encode())
    return FrameGroup(
        exam_id=exam_id,
        patient_key=f"patient-{exam_id}",
        site="肝脏",
        findings="见囊肿。",
        diagnosis="囊肿。",
        frames=tuple(make_frame((seed + 60 * i) % 256) for i in range(frames)),
        frame_sizes=((32, 24),) * frames,
        frame_sources=tuple(f"{exam_id}#{i}" for i in range(frames)),
        valid=tuple(i == 0 for i in range(frames)) if conversations else None,
        conversations=conversations,
        split=split,
    )


EXAMS = [
    make_exam(
        "a", "test",
        ask("align", "findings", "请描述。", "见囊肿。"),
        ask("instruct", "kind", "是什么？", "囊肿"),
        ask("instruct", "normal", "是否正常？", "否"),
        ask("instruct", "multi", "左右？", "左", "大小？", "欠清"),
    ),
    make_exam("b", "test", ask("instruct", "kind", "见什么？", "结节"), frames=2),
    make_exam("c", "test", frames=1),
    make_exam("d", "train", ask("instruct", "kind", "是什么？", "囊肿")),
    make_exam("e", "validation", ask("instruct", "kind", "是什么？", "结节")),
]  # fmt: skip


@pytest.fixture(scope="session")
def exams() -> list[FrameGroup]:
    """Three exams of the test split, one of each other; the third has no conversation."""
    return EXAMS


@pytest.fixture(scope="session")
def write_exams() -> Callable[[str], None]:
    """Write the exams as a table of two parts."""
    return _write_exams


def _write_exams(uri: str) -> None:
    parts = [
        parquet.write_part(
            map(schema.to_row, exams), uri, schema.EXAMS, position=position, row_group_bytes=1
        )
        for position, exams in ((0, EXAMS[:2]), (2, EXAMS[2:]))
    ]
    parquet.publish_parts(uri, [part for part in parts if part])
