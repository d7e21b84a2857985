"""Cine as plain video files: a folder tree, or a table with a row for each file.

In a tree every mp4, avi or gif is an exam without a report. The files of one folder are taken for
one patient's, those right under the root for a patient each; where folders mean something else,
give a table.

A table (`.csv`, `.jsonl`, …), as sets of lung ultrasound come, has the file in `filename`, `file`,
`video` or `path`. `id`, `patient_id`, `site`, `diagnosis` (or `label`, `class`) and `split` are
read where they are; case, blanks and underscores do not matter. Of the other columns,

- one that holds 1 names a finding, one that holds 0 or nothing says nothing, and counts, ages and
  such are not taken for findings;
- the text of a column named after a finding, a comment, a report or a reader joins the findings.

The exam is called by a digest of its file's name, which may hold a person's name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, Field

from ultra import storage
from ultra.config import DataConfig
from ultra.data.importers.entry import ExamEntry, Name, Row, Text, parse, to_entries, why_unusable
from ultra.data.importers.records import TABLES, Record, read_records, split_in_name
from ultra.data.video import SUFFIXES

_COMMENT = re.compile(
    r"comment|finding|report|impression|description|doctor|reader|expert|所见|描述|意见"
)
_MEASURE = re.compile(r"(?:.*number.*|.*count|.*rate|.*length|.*depth|.*id|age|frames|index|fps)")
_LETTERS = str.maketrans("0123456789", "ghijklmnop")
_YES = ("1", "1.0", "true", "yes")
_NO = ("", "0", "0.0", "false", "no", "nan")

_PATH = ("filename", "file", "video", "path")
_PATIENT = ("patientid", "patient")
_SITE = ("site", "zone", "view")
_DIAGNOSIS = ("diagnosis", "label", "class", "诊断", "提示")
_SAID = "findings and comments"
_KNOWN = {*_PATH, *_PATIENT, *_SITE, *_DIAGNOSIS, "id", "split"}


class VideoRow(Row):
    """The columns of a table whose meaning is known."""

    path: Name = Field(validation_alias=AliasChoices(*_PATH))
    id: Text | None = None
    patient_id: Text | None = Field(None, validation_alias=AliasChoices(*_PATIENT))
    site: Text | None = Field(None, validation_alias=AliasChoices(*_SITE))
    diagnosis: Text | None = Field(None, validation_alias=AliasChoices(*_DIAGNOSIS))
    split: Text | None = None
    findings: Text = Field(validation_alias=_SAID)


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield one exam for each video, in the order of the table or of the paths.

    Raises:
        StorageError: when there is no such table or folder.
    """
    if config.source_uri.endswith(TABLES):
        return to_entries(read_records(config.source_uri, config.encoding), _from_row)
    if not storage.exists(config.source_uri):
        raise storage.StorageError(f"{config.source_uri}: no such file or folder")
    return _list_tree(config.source_uri)


def _list_tree(uri: str) -> Iterator[ExamEntry]:
    for file in storage.list_files(uri):
        path = file.removeprefix(uri.rstrip("/") + "/")
        if path.lower().endswith(SUFFIXES):
            folder = path.rpartition("/")[0]
            entry = ExamEntry(path, _call(path), folder or path, frames=(path,), needs_report=False)
            yield replace(entry, reason=why_unusable(entry))


def _from_row(record: Record) -> ExamEntry:
    columns = {_plain(name): value for name, value in record.value.items()}
    said = {_SAID: _findings(record.value)}
    row = parse(Record(record.place, columns | said, record.reason), VideoRow)
    split = split_in_name(row.split or "")
    if row.split and split is None:
        raise ValueError(f"wrong values: split: {row.split[:40]!r} is none")
    return ExamEntry(
        source=record.place,
        exam_id=row.id or _call(row.path),
        patient_id=row.patient_id or row.path,
        site=row.site or "",
        findings=row.findings,
        diagnosis=row.diagnosis or "",
        frames=(row.path,),
        split=split,
    )


def _findings(columns: Mapping[str, Any]) -> str:
    """Return the columns that hold yes by name, and the texts of those that hold comments."""
    flags, comments = [], []
    for name, value in columns.items():
        plain, text = _plain(name), "" if value is None else str(value).strip()
        if plain in _KNOWN or text.lower() in _NO:
            continue
        if text.lower() in _YES:
            if not _MEASURE.fullmatch(plain):
                flags.append(name.replace("_", " ").strip())
        elif _COMMENT.search(plain):
            comments.append(text)
    return "; ".join([*flags, *comments])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _call(path: str) -> str:
    # In letters: a run of digits would pass for a phone number.
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16].translate(_LETTERS)
    return f"video-{digest}"
