from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.data.exam_folders import exam_line, picture, write_folder
from ultra import storage
from ultra.config import ConfigError, DataConfig, SimulatorConfig
from ultra.data import parquet
from ultra.data.prepare import (
    PrepareCounts,
    list_entries,
    publish,
    split_of,
    write_tables,
)
from ultra.data.schema import from_row


def config_at(root: Path, **changes: object) -> DataConfig:
    addresses = {f"{name}_uri": f"{root}/{name}" for name in ("exams", "quarantine", "audit")}
    return DataConfig.model_validate({"patient_key_secret": "key", **addresses, **changes})


def rows(uri: str) -> list[dict[str, object]]:
    return [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]


def test_splits_follow_the_fractions_the_seed_and_the_patient_alone() -> None:
    config = DataConfig(validation_fraction=0.1, test_fraction=0.3)
    keys = [f"{number:016x}" for number in range(4000)]
    found = [split_of(key, config) for key in keys]
    counts = Counter(found)
    # Three standard deviations of a binomial count.
    assert counts["test"] == pytest.approx(1200, abs=3 * (4000 * 0.3 * 0.7) ** 0.5)
    assert counts["validation"] == pytest.approx(400, abs=3 * (4000 * 0.1 * 0.9) ** 0.5)
    assert found == [split_of(key, config) for key in keys]
    assert found != [split_of(key, config.model_copy(update={"seed": 1})) for key in keys]
    everything = DataConfig(validation_fraction=0, test_fraction=1)
    assert {split_of(key, everything) for key in keys} == {"test"}


def test_fractions_that_leave_less_than_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="must not exceed 1"):
        DataConfig(validation_fraction=0.6, test_fraction=0.5)


def test_simulated_exams_become_tables_with_patients_whole(tmp_path: Path) -> None:
    config = config_at(tmp_path, simulator=SimulatorConfig(num_patients=6, frame_size=32))
    entries = list(list_entries(config))
    written = [write_tables(entries[:4], 0, config), write_tables(entries[4:], 4, config)]
    counts = publish(written, config)
    groups = [from_row(row) for row in rows(config.exams_uri)]
    assert len({group.exam_id for group in groups}) == len(entries) == counts.exams
    assert counts.frames == sum(len(group.frames) for group in groups)
    assert counts.splits == Counter(group.split for group in groups)
    splits: dict[str, set[str]] = {}
    for group in groups:
        splits.setdefault(group.patient_key, set()).add(group.split)
    assert len(splits) == 6
    assert all(len(found) == 1 for found in splits.values())
    audit = rows(config.audit_uri)
    assert [(row["exam_id"], row["source"]) for row in audit] == [
        (group.exam_id, source) for group in groups for source in group.frame_sources
    ]
    assert {row["evidence"] for row in audit} == {"simulated"}
    assert rows(config.quarantine_uri) == []


def test_bad_exams_go_to_quarantine_with_their_reason_and_stop_nothing(tmp_path: Path) -> None:
    lines = [
        exam_line("E1", ["a.jpg", "b.jpg", "a.jpg"]),
        "no json",
        exam_line("E3", ["missing.jpg"]),
        exam_line("E4", ["b.jpg", "b.jpg"]),
        exam_line("E1", ["a.jpg"]),
    ]
    files = {"a.jpg": picture(1), "b.jpg": picture(2)}
    config = config_at(
        tmp_path,
        format="folder",
        source_uri=write_folder(tmp_path / "folder", lines, files),
        assume_deidentified="Dr. Wang",
        validation_fraction=0,
        test_fraction=0,
    )
    counts = publish([write_tables(list(list_entries(config)), 0, config)], config)
    assert counts.as_dict() == {
        "exams": 2,
        "frames": 4,
        "duplicates_dropped": 1,
        "quarantined": 3,
        "quarantine_reasons": {
            "duplicate exam_id": 1,
            "malformed line": 1,
            "missing file": 1,
        },
        "splits": {"train": 2},
        "notes": {},
        "scrubbed": {},
        "missing_files": 1,
        "first_missing": ("missing.jpg",),
    }
    assert [(r["exam_id"], r["source"], r["reason"]) for r in rows(config.quarantine_uri)] == [
        ("exams.jsonl line 2", "exams.jsonl line 2", "malformed line: not JSON"),
        ("E3", "exams.jsonl line 3", "missing file: missing.jpg"),
        ("E1", "exams.jsonl line 5", "duplicate exam_id: also at exams.jsonl line 1"),
    ]
    assert [row["exam_id"] for row in rows(config.exams_uri)] == ["E1", "E4"]
    assert all("patient" not in str(row["patient_key"]) for row in rows(config.exams_uri))
    assert {row["evidence"] for row in rows(config.audit_uri)} == {"stated by Dr. Wang"}
    assert "2 exams (2 train), 4 frames, 1 near-duplicates dropped" in counts.summary()
    assert "3 exams in quarantine" in counts.summary()
    assert counts.metrics()["exams_train"] == 2


def test_a_format_and_its_source_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.source_uri: needed for data\.format: folder"):
        list(list_entries(config_at(tmp_path, format="folder")))
    with pytest.raises(ConfigError, match=r"no format is called 'tar'; allowed: simulator, folder"):
        list(list_entries(config_at(tmp_path, format="tar")))
    with pytest.raises(storage.StorageError, match="nowhere"):
        list(list_entries(config_at(tmp_path, format="folder", source_uri=f"{tmp_path}/nowhere")))


def test_a_missing_file_is_an_error_where_the_configuration_is_strict(tmp_path: Path) -> None:
    lines = [exam_line("E1", ["a.jpg"]), exam_line("E2", ["x.jpg", "a.jpg", "y.jpg"])]
    config = config_at(
        tmp_path,
        format="folder",
        source_uri=write_folder(tmp_path / "folder", lines, {"a.jpg": picture(1)}),
        assume_deidentified="Dr. Wang",
        strict=True,
    )
    written = [write_tables(list(list_entries(config)), 0, config)]
    with pytest.raises(ConfigError, match=r"data\.strict: 2 files are missing: x\.jpg, y\.jpg"):
        publish(written, config)
    with pytest.raises(storage.StorageError, match="no complete table"):
        parquet.read_parts(config.exams_uri)


def test_counts_add_up() -> None:
    names = tuple("abcdefgh")
    a = PrepareCounts(1, 2, 3, 4, {"x": 1}, {"test": 5}, {"odd": 1}, {"姓名": 1}, 8, names)
    b = PrepareCounts(
        10, 20, 30, 40, {"x": 2, "a": 1}, {"train": 6}, {"odd": 2}, {"日期": 1}, 3, ("i", "j", "k")
    )
    assert a + b == PrepareCounts(
        exams=11,
        frames=22,
        duplicates_dropped=33,
        quarantined=44,
        quarantine_reasons={"a": 1, "x": 3},
        splits={"test": 5, "train": 6},
        notes={"odd": 3},
        scrubbed={"姓名": 1, "日期": 1},
        missing_files=11,
        first_missing=tuple("abcdefghij"),
    )
