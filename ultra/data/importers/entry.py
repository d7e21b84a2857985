"""What an importer says of an exam before any of its files is read."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from ultra.data.importers.records import Record
from ultra.types import Conversation, Split

MAX_FILES = 1024
"""Files of one exam."""

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""A name or number that must not be empty."""
Text = Annotated[str, StringConstraints(strip_whitespace=True)]


@dataclass(frozen=True, slots=True)
class ExamEntry:
    """An exam as its set describes it.

    Attributes:
        source: where the set does so, e.g. `exams.jsonl line 3`.
        patient_id: as the set has it; it leaves `prepare` as a keyed pseudonym only.
        frames: paths of its files, relative to the set's images.
        conversations: those the set brings.
        split: the one the set publishes; None leaves the choice to `prepare`.
        needs_report: whether it is of no use without findings, diagnosis or conversations.
        notes: kinds of oddities found in the set, to be counted.
        reason: why the exam cannot be used; empty where it can.
    """

    source: str
    exam_id: str
    patient_id: str = ""
    site: str = ""
    history: str = ""
    findings: str = ""
    diagnosis: str = ""
    modality: str = "US"
    frames: tuple[str, ...] = ()
    conversations: tuple[Conversation, ...] = ()
    split: Split | None = None
    needs_report: bool = True
    notes: tuple[str, ...] = ()
    reason: str = ""


class Row(BaseModel):
    """One record of a set; what it does not name is ignored, numbers may stand for texts."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)


R = TypeVar("R", bound=Row)


def parse(record: Record, kind: type[R]) -> R:
    """Return a record as a row of its set.

    Raises:
        ValueError: for a record that is none, in the words of the quarantine table.
    """
    if record.reason:
        raise ValueError(record.reason)
    try:
        return kind.model_validate(record.value)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def to_entries(
    records: Iterable[Record], convert: Callable[[Record], ExamEntry]
) -> Iterator[ExamEntry]:
    """Yield the exam of each record, a bad one with its reason.

    Args:
        records: one exam each.
        convert: makes the exam; a ValueError says why it cannot.
    """
    for record in records:
        try:
            entry = convert(record)
        except ValueError as error:
            yield ExamEntry(record.place, name_of(record), reason=str(error))
        else:
            yield replace(entry, reason=entry.reason or why_unusable(entry))


def name_of(record: Record) -> str:
    """Return what a bad record calls its exam, or its place where it says nothing usable."""
    for key in ("exam_id", "uid", "id", "image_id", "question_id", "qid"):
        value = record.value.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return record.place


def why_unusable(entry: ExamEntry) -> str:
    """Return why no exam can come of an entry, or an empty text."""
    if entry.needs_report and not (entry.findings or entry.diagnosis or entry.conversations):
        return "empty report: neither findings nor diagnosis"
    if not entry.frames:
        return "no frames: the list is empty"
    if len(entry.frames) > MAX_FILES:
        return f"over the caps: {len(entry.frames)} files, at most {MAX_FILES} are let in"
    for path in entry.frames:
        pure = PurePosixPath(path.replace("\\", "/"))
        if not path or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
            return f"path outside the folder: {path!r}"
    return ""


def patient_key(patient_id: str, secret: str) -> str:
    """Return a patient's pseudonym: 16 hexadecimal digits of an HMAC-SHA256."""
    return hmac.new(secret.encode(), patient_id.encode(), hashlib.sha256).hexdigest()[:16]


def _explain(error: ValidationError) -> str:
    items: list[Any] = error.errors(include_url=False, include_context=False, include_input=False)
    missing = [_place(item["loc"]) for item in items if item["type"] == "missing"]
    if missing:
        return f"missing keys: {', '.join(missing)}"
    wrong = [f"{_place(item['loc'])}: {item['msg'][:1].lower()}{item['msg'][1:]}" for item in items]
    return f"wrong values: {'; '.join(wrong[:3])}"


def _place(keys: Iterable[Any]) -> str:
    return ".".join(map(str, keys))
