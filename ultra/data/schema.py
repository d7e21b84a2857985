"""The Parquet record of an exam: one row per frame group."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from ultra.types import Conversation, FrameGroup, Turn

SCHEMA_VERSION = 2

_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_CONVERSATION = pa.struct(
    [
        ("stage", pa.string()),
        ("task", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("language", pa.string()),
        ("closed", pa.bool_()),
        ("question_id", pa.string()),
    ]
)

EXAMS = pa.schema(
    [
        ("exam_id", pa.string()),
        ("patient_key", pa.string()),
        ("site", pa.string()),
        ("history", pa.string()),
        ("findings", pa.string()),
        ("diagnosis", pa.string()),
        ("modality", pa.string()),
        ("conversations", pa.list_(_CONVERSATION)),
        ("frames", pa.list_(pa.binary())),
        ("frame_width", pa.list_(pa.int32())),
        ("frame_height", pa.list_(pa.int32())),
        ("frame_source", pa.list_(pa.string())),
        ("valid", pa.list_(pa.bool_())),
        ("split", pa.string()),
        ("content_sha256", pa.string()),
        ("schema_version", pa.int32()),
    ]
)
"""`valid` is null where nobody knows which frames show the report."""

QUARANTINE = pa.schema(
    [
        ("exam_id", pa.string()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("schema_version", pa.int32()),
    ]
)

AUDIT = pa.schema(
    [
        ("exam_id", pa.string()),
        ("source", pa.string()),
        ("evidence", pa.string()),
        ("schema_version", pa.int32()),
    ]
)
"""One row per frame let in; `evidence` says what shows that it carries no identity."""

TEXT_COLUMNS = [name for name in EXAMS.names if name != "frames"]


def content_digest(frames: Iterable[bytes]) -> str:
    """Return the sha256 of a group's frames in order: the key of everything computed from them."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(hashlib.sha256(frame).digest())
    return digest.hexdigest()


def to_row(group: FrameGroup) -> dict[str, Any]:
    """Return a frame group as a row of EXAMS."""
    return {
        "exam_id": group.exam_id,
        "patient_key": group.patient_key,
        "site": group.site,
        "history": group.history,
        "findings": group.findings,
        "diagnosis": group.diagnosis,
        "modality": group.modality,
        "conversations": conversations_to_rows(group.conversations),
        "frames": list(group.frames),
        "frame_width": [width for width, _ in group.frame_sizes],
        "frame_height": [height for _, height in group.frame_sizes],
        "frame_source": list(group.frame_sources),
        "valid": None if group.valid is None else list(group.valid),
        "split": group.split,
        "content_sha256": content_digest(group.frames),
        "schema_version": SCHEMA_VERSION,
    }


def conversations_to_rows(conversations: Iterable[Conversation]) -> list[dict[str, Any]]:
    """Return conversations as values of the `conversations` column."""
    return [
        {
            "stage": c.stage,
            "task": c.task,
            "turns": [{"role": turn.role, "content": turn.content} for turn in c.turns],
            "language": c.language,
            "closed": c.closed,
            "question_id": c.question_id,
        }
        for c in conversations
    ]


def conversations_from_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[Conversation, ...]:
    """Return the conversations of a `conversations` value."""
    return tuple(
        Conversation(
            stage=r["stage"],
            task=r["task"],
            turns=tuple(Turn(t["role"], t["content"]) for t in r["turns"]),
            language=r["language"],
            closed=r["closed"],
            question_id=r["question_id"],
        )
        for r in rows
    )


def from_row(row: Mapping[str, Any]) -> FrameGroup:
    """Return the frame group of a row; a table read without `frames` gives a group without them.

    Raises:
        ValueError: for a row of another schema version.
    """
    if row["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"exam {row['exam_id']}: schema version {row['schema_version']}, "
            f"this ultra reads {SCHEMA_VERSION}"
        )
    valid = row["valid"]
    widths, heights = row["frame_width"], row["frame_height"]
    return FrameGroup(
        exam_id=row["exam_id"],
        patient_key=row["patient_key"],
        site=row["site"],
        history=row["history"],
        findings=row["findings"],
        diagnosis=row["diagnosis"],
        modality=row["modality"],
        frames=tuple(row.get("frames", ())),
        frame_sizes=tuple((int(w), int(h)) for w, h in zip(widths, heights, strict=True)),
        frame_sources=tuple(row["frame_source"]),
        valid=None if valid is None else tuple(bool(v) for v in valid),
        conversations=conversations_from_rows(row["conversations"]),
        split=row["split"],
    )
