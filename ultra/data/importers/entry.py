"""What an importer says of an exam before any of its files is read."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)

from ultra.data.importers.records import Record
from ultra.types import Conversation, Split

MAX_FILES = 1024
"""Files of one exam."""

MAX_PATH_BYTES = 1024
"""Of the path of a file, as object stores have it."""
MAX_NAME_BYTES = 255
"""Of one part of a path, as file systems have it."""

_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def _refuse_control(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("control characters")
    return text


def _refuse_empty(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _refuse_infinite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


Text = Annotated[
    str,
    StringConstraints(strip_whitespace=True),
    BeforeValidator(_refuse_infinite),
    AfterValidator(_refuse_control),
]
Name = Annotated[Text, AfterValidator(_refuse_empty)]
"""A name or number that must not be empty."""

_MODALITIES = {
    "ultrasound": "US", "mri": "MR", "ct_scan": "CT", "x-ray": "DX", "xray": "DX",
    "chest_xray": "DX", "histology": "SM", "gross": "XC",
}  # fmt: skip


def code_modality(name: str) -> str:
    """Return the DICOM code of a modality; a name that is not known is its own, in capitals."""
    return _MODALITIES.get(name.strip().lower().replace(" ", "_"), name.strip().upper())


Modality = Annotated[Text, AfterValidator(code_modality)]
"""A modality in a set's own words, as its DICOM code."""


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

_NAME: TypeAdapter[str] = TypeAdapter(Name, config=ConfigDict(coerce_numbers_to_str=True))


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
        yield _entry(record.place, name_of(record), partial(convert, record))


def to_grouped_entries(
    records: Iterable[Record],
    kind: type[R],
    key: Callable[[R], str],
    convert: Callable[[str, list[R]], ExamEntry],
) -> Iterator[ExamEntry]:
    """Yield the bad records as they come, then the exam of each group of rows, in order.

    The rows, which are texts only, are held until the last record is read.

    Args:
        records: several for an exam.
        kind: of the rows.
        key: what the rows of one exam share.
        convert: makes the exam of the place of its first row and of its rows.
    """
    groups: dict[str, tuple[str, list[R]]] = {}
    for record in records:
        try:
            row = parse(record, kind)
        except ValueError as error:
            yield ExamEntry(record.place, record.place, reason=str(error))
        else:
            groups.setdefault(key(row), (record.place, []))[1].append(row)
    for place, rows in groups.values():
        yield _entry(place, place, partial(convert, place, rows))


def name_of(record: Record) -> str:
    """Return what a bad record calls its exam, or its place where it says nothing usable."""
    for key in ("exam_id", "uid", "id", "question_id"):
        try:
            return _NAME.validate_python(record.value.get(key))
        except ValidationError:
            continue
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
        if not _may_exist(path):
            return f"path of no file: {path[:80]!r}"
        pure = PurePosixPath(path.replace("\\", "/"))
        if not path or pure.is_absolute() or ".." in pure.parts or ":" in pure.parts[0]:
            return f"path outside the folder: {path!r}"
    return ""


def _may_exist(path: str) -> bool:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:  # a file's name in another encoding, as the system gives it
        return False
    longest = max(map(len, encoded.split(b"/")))
    too_long = len(encoded) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES
    return not (too_long or _CONTROL.search(path))


def patient_key(patient_id: str, secret: str) -> str:
    """Return a patient's pseudonym: 16 hexadecimal digits of an HMAC-SHA256."""
    return hmac.new(secret.encode(), patient_id.encode(), hashlib.sha256).hexdigest()[:16]


def _entry(place: str, name: str, convert: Callable[[], ExamEntry]) -> ExamEntry:
    try:
        entry = convert()
    except ValueError as error:
        return ExamEntry(place, name, reason=str(error))
    return replace(entry, reason=entry.reason or why_unusable(entry))


def _explain(error: ValidationError) -> str:
    items: list[Any] = error.errors(include_url=False, include_context=False, include_input=False)
    missing = [_place(item["loc"]) for item in items if item["type"] == "missing"]
    if missing:
        return f"missing keys: {', '.join(missing)}"
    wrong = [f"{_place(item['loc'])}: {_plain(item['msg'])}" for item in items]
    return f"wrong values: {'; '.join(wrong[:3])}"


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _place(keys: Iterable[Any]) -> str:
    return ".".join(map(str, keys))
