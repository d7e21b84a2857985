from __future__ import annotations

from typing import Any

import pytest

from ultra.data.importers.entry import (
    ExamEntry,
    Modality,
    Name,
    Row,
    Text,
    code_modality,
    name_of,
    parse,
    to_grouped_entries,
    why_unusable,
)
from ultra.data.importers.records import Record


class Line(Row):
    group: Name
    text: Text
    modality: Modality = "US"


def test_a_row_takes_numbers_for_texts_and_strips_them() -> None:
    row = parse(
        Record("p", {"group": 7, "text": " a ", "modality": "Chest X-ray", "more": 1}), Line
    )
    assert row == Line(group="7", text="a", modality="CHEST X-RAY")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "missing keys: group, text"),
        ({"group": " ", "text": ""}, "wrong values: group: empty"),
        ({"group": "a", "text": "a\0b"}, "wrong values: text: control characters"),
        ({"group": float("nan"), "text": ""}, "wrong values: group: not a finite number"),
        ({"group": True, "text": ""}, "wrong values: group: input should be a valid string"),
        ({"group": "\ud800", "text": ""}, "wrong values: group: input should be a valid string"),
    ],
)
def test_a_wrong_value_is_named(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(Record("p", value), Line)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"id": 7, "exam_id": "E"}, "E"),
        ({"id": 7, "exam_id": ""}, "7"),
        ({"id": "a\0"}, "p"),
        ({"id": "\ud800"}, "p"),
        ({"id": float("inf")}, "p"),
        ({"id": ["a"], "question_id": 0}, "0"),
    ],
)
def test_a_bad_record_is_called_by_what_can_be_written(value: dict[str, Any], name: str) -> None:
    assert name_of(Record("p", value)) == name


@pytest.mark.parametrize(
    ("name", "code"),
    [("CT", "CT"), ("MRI", "MR"), ("X-Ray", "DX"), ("ct_scan", "CT"), ("US", "US"), ("pet", "PET")],
)
def test_modalities_have_their_dicom_codes(name: str, code: str) -> None:
    assert code_modality(name) == code


def test_rows_of_one_exam_come_together_and_bad_ones_by_themselves() -> None:
    def convert(place: str, rows: list[Line]) -> ExamEntry:
        if rows[0].group == "c":
            raise ValueError("bad group: c")
        texts = tuple(row.text for row in rows)
        return ExamEntry(place, rows[0].group, findings="f", frames=texts)

    values: list[dict[str, Any]] = [
        {"group": "a", "text": "1"},
        {"group": "b", "text": "2"},
        {"text": "3"},
        {"group": "a", "text": "4"},
        {"group": "c", "text": "5"},
    ]
    records = [Record(f"line {i}", value) for i, value in enumerate(values, start=1)]
    found = list(to_grouped_entries(records, Line, lambda row: row.group, convert))
    assert [(e.source, e.exam_id, e.frames, e.reason) for e in found] == [
        ("line 3", "line 3", (), "missing keys: group"),
        ("line 1", "a", ("1", "4"), ""),
        ("line 2", "b", ("2",), ""),
        ("line 5", "line 5", (), "bad group: c"),
    ]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a/" * 500 + "b", ""),
        ("a/" * 512 + "b", "path of no file: "),
        ("肝" * 85, ""),
        ("肝" * 86, "path of no file: "),
        ("a\nb", ""),
        ("a\0b", "path of no file: 'a"),
    ],
)
def test_a_path_that_no_store_has(path: str, reason: str) -> None:
    found = why_unusable(ExamEntry("p", "E", findings="f", frames=(path,)))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
