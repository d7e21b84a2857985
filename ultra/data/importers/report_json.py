"""Reports with a list of images each, as Chinese ultrasound report sets come.

A row reads

    {"uid": 195562, "finding": "…", "image_path": ["195562_1.jpeg", "195562_2.jpeg"], "labels": 2,
     "split": "train"}

in a list, or in lists under `train`, `val` and `test`; often behind a byte order mark. Measurements
that the set masks (`_2DS_`) stay masked. `labels` is a number whose meaning the set keeps to itself
and is left behind. `diagnosis`, `site` and `patient_id` are read where a hospital adds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import AliasChoices, Field

from ultra.config import DataConfig
from ultra.data.importers.dialogue import Paths
from ultra.data.importers.entry import ExamEntry, Name, Row, Text, parse, to_entries
from ultra.data.importers.records import Record, is_object, read_records, split_in_name


class ReportRow(Row):
    """A row of the list."""

    uid: Name
    finding: Text = Field(validation_alias=AliasChoices("finding", "findings"))
    image_path: Paths
    split: Literal["train", "val", "valid", "validation", "test"] | None = None
    diagnosis: Text = ""
    site: Text = ""
    patient_id: Name | None = None


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams in the order of the file, bad rows with their reason."""
    uri, encoding = config.source_uri, config.encoding
    items = "*.item" if is_object(uri, encoding) else "item"
    return to_entries(read_records(uri, encoding, items), _entry)


def _entry(record: Record) -> ExamEntry:
    row = parse(record, ReportRow)
    return ExamEntry(
        source=record.place,
        exam_id=row.uid,
        patient_id=row.patient_id or f"exam {row.uid}",
        site=row.site,
        findings=row.finding,
        diagnosis=row.diagnosis,
        frames=row.image_path,
        split=split_in_name(row.split or ""),
    )
