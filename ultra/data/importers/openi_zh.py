"""OpenI-zh: chest X-rays of Indiana University with reports in Chinese, as XrayGLM gives them.

    {"annotations": [{"image_id": "162_1", "caption": "…"}]}

The images of a report share what stands before the `_`; 3,313 reports have one to five of them.
They are looked for as `{image_id}.png` beside the file. A report was translated once for every
image, and some 10% of the groups have translations that differ: the first is kept. Splitting by
image, as the set's first users did, puts images of most test reports into training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ultra.config import DataConfig
from ultra.data.importers.entry import ExamEntry, Name, Row, to_grouped_entries
from ultra.data.importers.records import read_records

CONFLICT = "conflicting captions"
CHATTER = "leaked chatter of the translator"

_CHATTER = re.compile(
    r"问题或担忧|作为(?:一个|一名)?(?:AI|人工智能)|很抱歉|希望(?:这|以上)?.{0,6}有(?:所)?帮助"
)


class OpeniRow(Row):
    """One image and its caption."""

    image_id: Name
    caption: Name


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield one exam for each report, bad annotations first and each by itself."""
    records = read_records(config.source_uri, config.encoding, "annotations.item")
    return to_grouped_entries(records, OpeniRow, _report_of, _entry)


def _report_of(row: OpeniRow) -> str:
    return row.image_id.rpartition("_")[0] or row.image_id


def _entry(place: str, rows: list[OpeniRow]) -> ExamEntry:
    report, caption = _report_of(rows[0]), rows[0].caption
    notes = {
        CONFLICT: any(row.caption != caption for row in rows),
        CHATTER: _CHATTER.search(caption) is not None,
    }
    return ExamEntry(
        source=place,
        exam_id=report,
        patient_id=f"report {report}",
        site="胸部",
        findings=caption,
        modality="DX",
        frames=tuple(f"{row.image_id}.png" for row in rows),
        notes=tuple(note for note, holds in notes.items() if holds),
    )
