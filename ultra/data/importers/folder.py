"""The plain exam folder: `exams.jsonl`, one exam a line, beside its files.

A line reads

    {"exam_id": "E1", "patient_id": "P1", "site": "肝脏", "history": "", "findings": "…",
     "diagnosis": "…", "frames": ["E1/1.png", "E1/sweep.dcm"]}

with `history` optional and every path relative to the folder, on a local path or s3://.
"""

from __future__ import annotations

from collections.abc import Iterator

from ultra import storage
from ultra.config import DataConfig
from ultra.data.importers.entry import ExamEntry, Name, Row, Text, parse, to_entries
from ultra.data.importers.records import Record, read_records

INDEX = "exams.jsonl"


class FolderRow(Row):
    """A line of the index."""

    exam_id: Name
    patient_id: Name
    site: Text
    history: Text | None = None
    findings: Text
    diagnosis: Text
    frames: tuple[str, ...]


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams of a folder in the order of its index, bad lines with their reason.

    Raises:
        StorageError: when the folder has no index.
    """
    index = storage.join(config.source_uri, INDEX)
    return to_entries(read_records(index, config.encoding), _entry)


def _entry(record: Record) -> ExamEntry:
    row = parse(record, FolderRow)
    return ExamEntry(
        source=record.place,
        exam_id=row.exam_id,
        patient_id=row.patient_id,
        site=row.site,
        history=row.history or "",
        findings=row.findings,
        diagnosis=row.diagnosis,
        frames=row.frames,
    )
