"""The plain exam folder: `exams.jsonl`, one exam a line, beside its JPEG, PNG and DICOM files.

A line reads

    {"exam_id": "E1", "patient_id": "P1", "site": "肝脏", "history": "", "findings": "…",
     "diagnosis": "…", "frames": ["E1/1.png", "E1/sweep.dcm"]}

with `history` optional and every path relative to the folder, on a local path or s3://.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from ultra import storage
from ultra.config import DataConfig
from ultra.data.dicom import is_dicom, read_dicom
from ultra.data.frames import (
    decode_frame,
    drop_duplicates,
    encode_frame,
    is_jpeg,
    sample_evenly,
    thumbnail,
)
from ultra.types import FrameGroup

INDEX = "exams.jsonl"
MAX_FILES = 1024
"""Files of one exam."""

_REQUIRED = ("exam_id", "patient_id", "site", "findings", "diagnosis", "frames")


@dataclass(frozen=True, slots=True)
class ExamEntry:
    """One line of the index; `reason` says why it cannot be used, and is empty where it can."""

    line: int
    exam_id: str
    patient_id: str = ""
    site: str = ""
    history: str = ""
    findings: str = ""
    diagnosis: str = ""
    frames: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ImportedExam:
    """An exam that was let in, with what shows for each frame that it carries no identity."""

    group: FrameGroup
    evidence: tuple[str, ...]
    num_duplicates: int = 0


@dataclass(frozen=True, slots=True)
class _Frame:
    data: bytes
    size: tuple[int, int]
    source: str
    evidence: str


def list_exams(folder_uri: str) -> Iterator[ExamEntry]:
    """Yield the exams of a folder in the order of its index, bad lines with their reason.

    Raises:
        StorageError: when the folder has no index.
    """
    seen: dict[str, int] = {}
    for line, text in enumerate(storage.read_lines(storage.join(folder_uri, INDEX)), start=1):
        if not text.strip():
            continue
        entry = parse_line(line, text)
        first = seen.setdefault(entry.exam_id, line)
        if first != line:
            entry = replace(entry, reason=f"duplicate exam_id: also on line {first}")
        yield entry


def parse_line(line: int, text: str) -> ExamEntry:
    """Return the exam of one line of the index; a bad line has no id but its number."""
    nameless = ExamEntry(line=line, exam_id=f"line {line}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return replace(nameless, reason="malformed line: not JSON")
    if not isinstance(raw, dict):
        return replace(nameless, reason="malformed line: not a JSON object")
    if _is_name(raw.get("exam_id")):
        nameless = replace(nameless, exam_id=str(raw["exam_id"]))
    missing = [key for key in _REQUIRED if key not in raw]
    if missing:
        return replace(nameless, reason=f"missing keys: {', '.join(missing)}")
    wrong = [key for key, wanted in _wanted(raw).items() if not wanted]
    if wrong:
        return replace(nameless, reason=f"wrong values: {'; '.join(wrong)}")
    entry = ExamEntry(
        line=line,
        exam_id=str(raw["exam_id"]),
        patient_id=str(raw["patient_id"]),
        site=raw["site"].strip(),
        history=(raw.get("history") or "").strip(),
        findings=raw["findings"].strip(),
        diagnosis=raw["diagnosis"].strip(),
        frames=tuple(raw["frames"]),
    )
    return replace(entry, reason=_why_unusable(entry))


def _wanted(raw: dict[str, Any]) -> dict[str, bool]:
    texts = ("site", "findings", "diagnosis")
    frames = raw["frames"]
    return {
        "exam_id must be a text or number": _is_name(raw["exam_id"]),
        "patient_id must be a text or number": _is_name(raw["patient_id"]),
        **{f"{key} must be a text": isinstance(raw[key], str) for key in texts},
        "history must be a text": isinstance(raw.get("history") or "", str),
        "frames must be a list of paths": isinstance(frames, list)
        and all(isinstance(path, str) for path in frames),
    }


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip() != ""


def _why_unusable(entry: ExamEntry) -> str:
    if not entry.findings and not entry.diagnosis:
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


def read_exam(entry: ExamEntry, folder_uri: str, config: DataConfig) -> ImportedExam:
    """Return the frame group of an exam, every frame shown or stated to carry no identity.

    Frames that nobody has judged leave `valid` unknown. More than `max_frames` are sampled evenly.

    Raises:
        ValueError: when the exam cannot be let in; the message is `kind: detail`.
    """
    if entry.reason:
        raise ValueError(entry.reason)
    frames: list[_Frame] = []
    thumbnails, positions, num_duplicates = [], [], 0
    for path in entry.frames:
        data = _read_file(folder_uri, path, config)
        if is_dicom(data):
            found, repeated = _from_dicom(data, path, config)
            frames += found
            num_duplicates += repeated
        else:
            frame, small = _from_image(data, path, config)
            positions.append(len(frames))
            thumbnails.append(small)
            frames.append(frame)
    distinct = drop_duplicates(thumbnails, config.duplicate_threshold)
    repeats = set(positions) - {positions[i] for i in distinct}
    num_duplicates += len(repeats)
    frames = [frame for index, frame in enumerate(frames) if index not in repeats]
    frames = [frames[i] for i in sample_evenly(len(frames), config.max_frames)]
    group = FrameGroup(
        exam_id=entry.exam_id,
        patient_key=patient_key(entry.patient_id, config.patient_key_secret),
        site=entry.site,
        history=entry.history,
        findings=entry.findings,
        diagnosis=entry.diagnosis,
        frames=tuple(frame.data for frame in frames),
        frame_sizes=tuple(frame.size for frame in frames),
        frame_sources=tuple(frame.source for frame in frames),
    )
    return ImportedExam(group, tuple(frame.evidence for frame in frames), num_duplicates)


def _read_file(folder_uri: str, path: str, config: DataConfig) -> bytes:
    uri = storage.join(folder_uri, path)
    try:
        with storage.open_read(uri) as file:
            head = file.read(132)
            limit = config.max_dicom_bytes if is_dicom(head) else config.max_frame_bytes
            data = head + file.read(limit + 1 - len(head))
    except OSError:
        # Asking again tells a missing file from a store that is down, which must stop the job.
        kind = "unreadable file" if storage.exists(uri) else "missing file"
        raise ValueError(f"{kind}: {path}") from None
    if len(data) > limit:
        raise ValueError(f"over the caps: {path}: more than the {limit} bytes that are let in")
    return data


def _from_dicom(data: bytes, path: str, config: DataConfig) -> tuple[list[_Frame], int]:
    try:
        found = read_dicom(
            data,
            path,
            max_pixels=config.max_frame_pixels,
            max_frames=config.max_frames,
            duplicate_threshold=config.duplicate_threshold,
        )
    except ValueError as error:
        raise ValueError(f"unsafe or unreadable DICOM: {path}: {error}") from None
    columns = zip(found.frames, found.frame_sizes, found.frame_sources, found.evidence, strict=True)
    return [_Frame(*column) for column in columns], found.num_duplicates


def _from_image(data: bytes, path: str, config: DataConfig) -> tuple[_Frame, Any]:
    """Return a plain image as a clean frame, and its thumbnail."""
    if not config.assume_deidentified:
        raise ValueError(
            f"identity not excluded: {path}: a plain image needs data.assume_deidentified"
        )
    try:
        pixels = decode_frame(
            data, max_bytes=config.max_frame_bytes, max_pixels=config.max_frame_pixels
        )
    except ValueError as error:
        raise ValueError(f"unreadable image: {path}: {error}") from None
    frame = _Frame(
        data=encode_frame(pixels, lossy=is_jpeg(data)),
        size=(pixels.shape[1], pixels.shape[0]),
        source=path,
        evidence=f"stated by {config.assume_deidentified}",
    )
    return frame, thumbnail(pixels)
