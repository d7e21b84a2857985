from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.data.exam_folders import exam_line, picture, write_folder
from tests.data.test_prepare import config_at
from ultra import storage
from ultra.config import DataConfig
from ultra.data import parquet, schema
from ultra.data.card import DataCard, describe, write_card
from ultra.data.prepare import PrepareCounts, list_entries, publish, write_tables
from ultra.types import Conversation, FrameGroup, Split, Turn


def group(exam: int, patient: str, split: Split, *frames: bytes, **fields: object) -> FrameGroup:
    texts = {"site": "肝脏", "findings": "见" * exam, "diagnosis": "", **fields}
    return FrameGroup(
        exam_id=f"E{exam}",
        patient_key=patient,
        frames=frames,
        frame_sizes=((48, 32),) * len(frames),
        frame_sources=("1",) * len(frames),
        split=split,
        **texts,  # type: ignore[arg-type]
    )


def write(config: DataConfig, groups: list[FrameGroup], evidence: list[str]) -> None:
    rows = [schema.to_row(each) for each in groups]
    audit = [
        {"exam_id": "E1", "source": "1", "evidence": each, "schema_version": 2} for each in evidence
    ]
    for uri, kind, found in (
        (config.exams_uri, schema.EXAMS, rows),
        (config.audit_uri, schema.AUDIT, audit),
        (config.quarantine_uri, schema.QUARANTINE, []),
    ):
        part = parquet.write_part(found, uri, kind, position=0, row_group_bytes=1000)
        parquet.publish_parts(uri, [part] if part else [])


@pytest.fixture
def card(tmp_path: Path) -> DataCard:
    config = config_at(tmp_path)
    turns = (Turn("user", "问问"), Turn("assistant", "答"))
    asked = (Conversation("instruct", "kind", turns, "en"),) * 2
    write(
        config,
        [
            group(1, "p1", "train", b"a", b"b"),
            group(2, "p1", "test", b"c", site="肾脏", conversations=asked),
            group(3, "p2", "train", b"d", b"e"),
            group(3, "p3", "validation", b"d", b"e", modality="CT"),
            group(9, "p4", "train", b"d", b"e", site=""),
        ],
        [
            "cropped to (1, 2) to (30, 40); OCR read 3 texts",
            "cropped to (5, 6) to (70, 80); OCR read 12 texts",
            "stated by Dr. Wang, 2026-01-05",
        ],
    )
    return describe(config, PrepareCounts(exams=5, frames=9))


def test_splits_are_counted_in_exams_patients_and_frames(card: DataCard) -> None:
    assert card.splits == [
        {"split": "test", "exams": 1, "patients": 1, "frames": 1},
        {"split": "train", "exams": 3, "patients": 3, "frames": 6},
        {"split": "validation", "exams": 1, "patients": 1, "frames": 2},
    ]


def test_patients_and_frames_in_two_splits_are_a_leak(card: DataCard) -> None:
    assert card.leakage == {"patients": 1, "contents": 1}
    assert card.metrics()["leaking_patients"] == 1
    assert "1 patients and 1 sets of frames are in more than one split" in card.to_html("t")


def test_repeats_are_exams_beyond_the_first(card: DataCard) -> None:
    assert card.repeats == {"frames": 2, "reports": 1}


def test_what_is_in_the_exams_is_counted(card: DataCard) -> None:
    assert card.frames_per_exam == [{"frames": 1, "exams": 1}, {"frames": 2, "exams": 4}]
    assert card.sites == [
        {"site": "肝脏", "count": 3},
        {"site": "(none)", "count": 1},
        {"site": "肾脏", "count": 1},
    ]
    assert card.modalities == [{"modality": "US", "count": 4}, {"modality": "CT", "count": 1}]
    assert card.conversations == [
        {"stage": "instruct", "task": "kind", "language": "en", "conversations": 2}
    ]


def test_lengths_are_in_characters(card: DataCard) -> None:
    findings = {"count": 5, "mean": 3.6, "min": 1, "median": 3, "p95": 9, "max": 9}
    assert card.text_lengths == [
        {"text": "findings", **findings},
        {"text": "question", "count": 2, "mean": 2.0, "min": 2, "median": 2, "p95": 2, "max": 2},
        {"text": "answer", "count": 2, "mean": 1.0, "min": 1, "median": 1, "p95": 1, "max": 1},
    ]


def test_evidence_is_counted_by_kind_and_the_statement_stays_whole(card: DataCard) -> None:
    assert card.evidence == [
        {"evidence": "cropped to a box; OCR read n texts", "count": 2},
        {"evidence": "stated by Dr. Wang, 2026-01-05", "count": 1},
    ]


def test_a_page_and_lists_for_people(tmp_path: Path) -> None:
    lines = [
        exam_line("E1", ["a.jpg"]),
        exam_line("=HYPERLINK(1)", ["no.jpg"]),
        exam_line("E3", ["a.jpg"], findings="", diagnosis=""),
    ]
    config = config_at(
        tmp_path,
        format="folder",
        source_uri=write_folder(tmp_path / "folder", lines, {"a.jpg": picture(1)}),
        assume_deidentified="Dr. Wang",
        card_uri=str(tmp_path / "card"),
    )
    counts = publish([write_tables(list(list_entries(config)), 0, config)], config)
    page = write_card(describe(config, counts), config, "Card & <co>")
    html = storage.read_bytes(page).decode()
    assert "<h1>Card &amp; &lt;co&gt;</h1>" in html
    assert "No patient and no frame is in two splits." in html
    assert "missing file" in html
    assert json.loads((tmp_path / "card" / "card.json").read_text())["counts"]["quarantined"] == 2
    with (tmp_path / "card" / "quarantine.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file)) == [
            ["exam_id", "source", "reason"],
            ["'=HYPERLINK(1)", "exams.jsonl line 2", "missing file: no.jpg"],
            ["E3", "exams.jsonl line 3", "empty report: neither findings nor diagnosis"],
        ]
    with (tmp_path / "card" / "audit.csv").open(encoding="utf-8-sig", newline="") as file:
        assert list(csv.reader(file))[1:] == [["E1", "1", "stated by Dr. Wang"]]
