"""Files of an exam as a frame group, every frame shown or stated to carry no identity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from ultra.data.importers.entry import ExamEntry, patient_key
from ultra.data.importers.records import TABLES
from ultra.data.ocr import open_reader
from ultra.data.scrub import holds_identity, scrub
from ultra.data.video import read_video, video_kind
from ultra.types import FrameGroup

_HEAD_BYTES = 132
"""Enough of a file to tell its kind."""


class MissingFiles(ValueError):
    """An exam some of whose files do not exist; `paths` names them."""

    def __init__(self, paths: list[str]) -> None:
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        super().__init__(f"missing file: {paths[0]}{more}")
        self.paths = paths


@dataclass(frozen=True, slots=True)
class ImportedExam:
    """An exam that was let in.

    Attributes:
        evidence: what shows for each frame that it carries no identity.
        num_duplicates: frames that were dropped because they repeat another.
        scrubbed: identities that its texts held, by kind.
    """

    group: FrameGroup
    evidence: tuple[str, ...]
    num_duplicates: int = 0
    scrubbed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Frame:
    data: bytes
    size: tuple[int, int]
    source: str
    evidence: str


def images_uri(config: DataConfig) -> str:
    """Return where the relative paths of a set's frames begin."""
    if config.images_uri:
        return config.images_uri
    is_file = config.source_uri.endswith(TABLES)
    return config.source_uri.rpartition("/")[0] or "." if is_file else config.source_uri


def read_exam(entry: ExamEntry, config: DataConfig) -> ImportedExam:
    """Return the frame group of an exam.

    What a file is follows from its content, not from its name. Frames that nobody has judged leave
    `valid` unknown. More than `max_frames` are sampled evenly.

    Raises:
        ValueError: when the exam cannot be let in; the message is `kind: detail`.
    """
    if entry.reason:
        raise ValueError(entry.reason)
    frames, num_duplicates = _read_frames(entry, config)
    entry, scrubbed = _scrub_texts(entry, config.patient_key_secret)
    frames = [frames[i] for i in sample_evenly(len(frames), config.max_frames)]
    group = FrameGroup(
        exam_id=entry.exam_id,
        patient_key=patient_key(entry.patient_id, config.patient_key_secret),
        site=entry.site,
        history=entry.history,
        findings=entry.findings,
        diagnosis=entry.diagnosis,
        modality=entry.modality,
        frames=tuple(frame.data for frame in frames),
        frame_sizes=tuple(frame.size for frame in frames),
        frame_sources=tuple(frame.source for frame in frames),
        conversations=entry.conversations,
    )
    evidence = tuple(frame.evidence for frame in frames)
    return ImportedExam(group, evidence, num_duplicates, scrubbed)


def _scrub_texts(entry: ExamEntry, secret: str) -> tuple[ExamEntry, Counter[str]]:
    """Return an entry without identities in its texts and its id, and what was found, by kind."""
    found: Counter[str] = Counter()

    def clean(text: str) -> str:
        scrubbed = scrub(text)
        found.update(scrubbed.counts)
        return scrubbed.text

    exam_id = entry.exam_id
    if exam_id == entry.patient_id or holds_identity(exam_id):
        exam_id = patient_key(exam_id, secret)
        found["exam_id"] += 1
    conversations = tuple(
        replace(c, turns=tuple(replace(turn, content=clean(turn.content)) for turn in c.turns))
        for c in entry.conversations
    )
    cleaned = replace(
        entry,
        exam_id=exam_id,
        site=clean(entry.site),
        history=clean(entry.history),
        findings=clean(entry.findings),
        diagnosis=clean(entry.diagnosis),
        conversations=conversations,
    )
    return cleaned, found


def _read_frames(entry: ExamEntry, config: DataConfig) -> tuple[list[_Frame], int]:
    """Return the distinct frames of all files in order, and how many were dropped as repeats."""
    files = _read_files(entry, config)
    frames: list[_Frame] = []
    thumbnails, positions, num_duplicates = [], [], 0
    for place, (path, data) in enumerate(files, start=1):
        if is_dicom(data):
            found, repeated = _from_dicom(data, path, place, config)
            frames += found
            num_duplicates += repeated
        elif video_kind(data):
            found, repeated = _from_video(data, path, place, config)
            frames += found
            num_duplicates += repeated
        else:
            frame, small = _from_image(data, path, place, config)
            positions.append(len(frames))
            thumbnails.append(small)
            frames.append(frame)
    distinct = drop_duplicates(thumbnails, config.duplicate_threshold)
    repeats = set(positions) - {positions[i] for i in distinct}
    kept = [frame for index, frame in enumerate(frames) if index not in repeats]
    return kept, num_duplicates + len(repeats)


def _read_files(entry: ExamEntry, config: DataConfig) -> list[tuple[str, bytes]]:
    found, missing = [], []
    for path in entry.frames:
        try:
            found.append((path, _read_file(images_uri(config), path, config)))
        except FileNotFoundError:
            missing.append(path)
    if missing:
        raise MissingFiles(missing)
    return found


def _read_file(folder_uri: str, path: str, config: DataConfig) -> bytes:
    uri = storage.join(folder_uri, path)
    try:
        with storage.open_read(uri) as file:
            head = file.read(_HEAD_BYTES)
            is_cine = is_dicom(head) or video_kind(head)
            limit = config.max_dicom_bytes if is_cine else config.max_frame_bytes
            data = head + file.read(limit + 1 - len(head))
    except OSError:
        # Asking again tells a missing file from a store that is down, which must stop the job.
        if not storage.exists(uri):
            raise FileNotFoundError(path) from None
        raise ValueError(f"unreadable file: {path}") from None
    if len(data) > limit:
        raise ValueError(f"over the caps: {path}: more than the {limit} bytes that are let in")
    return data


def _from_dicom(data: bytes, path: str, place: int, config: DataConfig) -> tuple[list[_Frame], int]:
    try:
        found = read_dicom(
            data,
            str(place),
            max_pixels=config.max_frame_pixels,
            max_frames=config.max_frames,
            duplicate_threshold=config.duplicate_threshold,
            reader=open_reader(config.ocr),
        )
    except ValueError as error:
        raise ValueError(f"unsafe or unreadable DICOM: {path}: {error}") from None
    columns = zip(found.frames, found.frame_sizes, found.frame_sources, found.evidence, strict=True)
    return [_Frame(*column) for column in columns], found.num_duplicates


def _from_video(data: bytes, path: str, place: int, config: DataConfig) -> tuple[list[_Frame], int]:
    evidence = _statement(path, config)
    try:
        found = read_video(
            data,
            str(place),
            max_pixels=config.max_frame_pixels,
            max_frames=config.max_frames,
            duplicate_threshold=config.duplicate_threshold,
        )
    except ValueError as error:
        raise ValueError(f"unreadable video: {path}: {error}") from None
    columns = zip(found.frames, found.frame_sizes, found.frame_sources, strict=True)
    return [_Frame(*column, evidence) for column in columns], found.num_duplicates


def _statement(path: str, config: DataConfig) -> str:
    """Return what speaks for pixels that nothing else shows to be clean.

    Raises:
        ValueError: where nobody has signed for them.
    """
    if not config.assume_deidentified:
        raise ValueError(
            f"identity not excluded: {path}: a plain image or video needs data.assume_deidentified"
        )
    return f"stated by {config.assume_deidentified}"


def _from_image(data: bytes, path: str, place: int, config: DataConfig) -> tuple[_Frame, Any]:
    """Return a plain image as a clean frame, and its thumbnail."""
    evidence = _statement(path, config)
    try:
        pixels = decode_frame(
            data, max_bytes=config.max_frame_bytes, max_pixels=config.max_frame_pixels
        )
    except ValueError as error:
        raise ValueError(f"unreadable image: {path}: {error}") from None
    frame = _Frame(
        data=encode_frame(pixels, lossy=is_jpeg(data)),
        size=(pixels.shape[1], pixels.shape[0]),
        source=str(place),
        evidence=evidence,
    )
    return frame, thumbnail(pixels)
