"""Predictions: one row for every question asked about an exam."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultra import storage
from ultra.data import parquet, schema
from ultra.data.instructions import questions
from ultra.types import Conversation, FrameGroup

Asked = tuple[str, str, str]
"""(task, question, answer)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about an exam, and what is known of it.

    Attributes:
        truth: its answer; None where nobody wrote one.
        language, closed, question_id: as `Conversation` has them.
    """

    task: str
    text: str
    truth: str | None
    language: str = "zh"
    closed: bool | None = None
    question_id: str = ""


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer, how it came about, and the truth where it is known.

    Attributes:
        task: what is asked, for scores by task.
        truth: the answer in the exams table; None where nobody wrote one.
        chosen: index of the frame the answer rests on; None for a model that chooses none.
        scores: feature score of every frame; None where `chosen` is.
        valid: whether each frame shows what the report says; None where nobody knows.
        brightest: the frame with the brightest local blob, a choice made without a model; None
            where `valid` gives nothing to grade it by.
        darkest: the same for the darkest blob.
        token_ids: the answer as the language model gave it.
        finish_reason: `stop`, or `length` for an answer that was cut.
        content_sha256: digest of the exam's frames.
        picture: PNG of what the answer rests on, as `draw_understanding` has it; None but for one
            answer of a few exams.
        modality: of the exam.
        language, closed, question_id: of the question, as `Conversation` has them.
        unanswered: why there is no answer; empty where there is one.
    """

    exam_id: str
    patient_key: str
    site: str
    task: str
    question: str
    answer: str
    truth: str | None
    chosen: int | None
    scores: tuple[float, ...] | None
    valid: tuple[bool, ...] | None
    brightest: int | None
    darkest: int | None
    token_ids: tuple[int, ...]
    finish_reason: str
    content_sha256: str
    picture: bytes | None = None
    modality: str = "US"
    language: str = "zh"
    closed: bool | None = None
    question_id: str = ""
    unanswered: str = ""


PREDICTIONS = pa.schema(
    [
        ("exam_id", pa.string()),
        ("patient_key", pa.string()),
        ("site", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("truth", pa.string()),
        ("chosen", pa.int32()),
        ("scores", pa.list_(pa.float32())),
        ("valid", pa.list_(pa.bool_())),
        ("brightest", pa.int32()),
        ("darkest", pa.int32()),
        ("token_ids", pa.list_(pa.int64())),
        ("finish_reason", pa.string()),
        ("content_sha256", pa.string()),
        ("picture", pa.binary()),
        ("modality", pa.string()),
        ("language", pa.string()),
        ("closed", pa.bool_()),
        ("question_id", pa.string()),
        ("unanswered", pa.string()),
    ]
)


def answer_question(group: FrameGroup, question: Question, answer: str, **more: Any) -> Prediction:
    """Return the prediction of an answer to a question about an exam.

    Args:
        group: the exam.
        question: what was asked.
        answer: as the model gave it; white space around it goes.
        more: further fields; without them, those of a model that chooses no frame.
    """
    how: dict[str, Any] = {
        "chosen": None,
        "scores": None,
        "brightest": None,
        "darkest": None,
        "token_ids": (),
        "finish_reason": "stop",
    }
    return Prediction(
        exam_id=group.exam_id,
        patient_key=group.patient_key,
        site=group.site,
        task=question.task,
        question=question.text,
        answer=answer.strip(),
        truth=question.truth,
        valid=group.valid,
        content_sha256=schema.content_digest(group.frames),
        modality=group.modality,
        language=question.language,
        closed=question.closed,
        question_id=question.question_id,
        **{**how, **more},
    )


def to_table(predictions: Iterable[Prediction]) -> pa.Table:
    """Return predictions as a table of PREDICTIONS."""
    return pa.Table.from_pylist([asdict(p) for p in predictions], schema=PREDICTIONS)


def read_predictions(uri: str) -> list[Prediction]:
    """Return the predictions at an address, sorted by exam, task and question.

    Raises:
        StorageError: when there is no complete table at the address.
    """
    rows = [
        Prediction(
            **{
                **row,
                "scores": _tuple(row["scores"]),
                "valid": _tuple(row["valid"]),
                "token_ids": tuple(row["token_ids"]),
            }
        )
        for part in parquet.part_uris(uri)
        for row in parquet.read_rows(part)
    ]
    return sorted(rows, key=lambda p: (p.exam_id, p.task, p.question, p.question_id))


def _tuple(values: list[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def count_training_answers(exams_uri: str) -> Counter[Asked]:
    """Return how often each (task, question, answer) stands in the train split; no frame is read.

    Raises:
        StorageError: when there is no complete table at the address.
    """
    counts: Counter[Asked] = Counter()
    for part in parquet.part_uris(exams_uri):
        for row in parquet.read_rows(part, ["split", "conversations"]):
            if row["split"] == "train":
                conversations = schema.conversations_from_rows(row["conversations"])
                counts.update((q.task, q.text, q.truth or "") for q in questions_in(conversations))
    return counts


def questions_of(group: FrameGroup) -> list[Question]:
    """Return the single-turn `instruct` questions of an exam with their true answers.

    An exam that has none is asked for its report; nothing is known to compare that with.
    """
    return list(questions_in(group.conversations)) or [
        Question("report", questions()["report"][0], None)
    ]


def questions_in(conversations: Iterable[Conversation]) -> Iterator[Question]:
    """Yield the single-turn `instruct` conversations as questions with their true answers."""
    for c in conversations:
        if c.stage == "instruct" and len(c.turns) == 2:
            question, answer = (turn.content for turn in c.turns)
            yield Question(c.task, question, answer, c.language, c.closed, c.question_id)


def read_frames(exams_uri: str, exam_ids: Collection[str]) -> dict[str, tuple[bytes, ...]]:
    """Return exam id -> its encoded frames, for the named exams alone.

    Only the row groups that hold one of them are read.

    Raises:
        StorageError: when there is no complete table at the address.
    """
    found: dict[str, tuple[bytes, ...]] = {}
    for part in parquet.part_uris(exams_uri):
        with storage.open_read(part) as file, pq.ParquetFile(file) as table:
            for index in range(table.num_row_groups):
                ids = table.read_row_group(index, columns=["exam_id"])["exam_id"].to_pylist()
                if not set(exam_ids).isdisjoint(ids):
                    frames = table.read_row_group(index, columns=["frames"])["frames"].to_pylist()
                    found |= {
                        i: tuple(f) for i, f in zip(ids, frames, strict=True) if i in exam_ids
                    }
    return found
