from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.exam_folders import exam_line, picture, write_folder
from tests.data.test_frames import png_header
from ultra import storage
from ultra.config import ConfigError, DataConfig, InstructionsConfig, SimulatorConfig
from ultra.data import parquet
from ultra.data.on_ray import prepare
from ultra.data.schema import from_row
from ultra.data.writer.on_ray import write_instructions
from ultra.types import FrameGroup

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config_at(root: str, **changes: object) -> DataConfig:
    addresses = {f"{name}_uri": f"{root}/{name}" for name in ("exams", "quarantine", "audit")}
    return DataConfig.model_validate({**addresses, **changes})


def instructions_at(root: str) -> InstructionsConfig:
    return InstructionsConfig(replies_uri=f"{root}/replies", rejected_uri=f"{root}/rejected")


def rows(uri: str) -> list[dict[str, object]]:
    return [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]


def exams(config: DataConfig) -> list[FrameGroup]:
    return [from_row(row) for row in rows(config.exams_uri)]


def mixed_folder(uri: str) -> str:
    """Ten good exams, and one of every bad kind."""
    good = [exam_line(f"G{i}", [f"g{i}.png", "shared.jpg"]) for i in range(10)]
    lines = [
        *good[:6],
        exam_line("missing", ["shared.jpg", "nowhere.jpg"]),
        exam_line("truncated", ["cut.jpg"]),
        exam_line("bomb", ["bomb.png"]),
        exam_line("empty", ["shared.jpg"], findings="", diagnosis=""),
        exam_line("G3", ["shared.jpg"]),
        '{"exam_id": ',
        *good[6:],
    ]
    files = {f"g{i}.png": picture(i, "PNG") for i in range(10)}
    shared = picture(99)
    files |= {"shared.jpg": shared, "cut.jpg": shared[:-40], "bomb.png": png_header(9000, 9000)}
    return write_folder(uri, lines, files)


def check_mixed(root: str) -> None:
    config = config_at(
        root,
        format="folder",
        source_uri=mixed_folder(f"{root}/folder"),
        assume_deidentified="Dr. Wang, 2026-01-05",
    )
    counts = prepare(config)
    assert (counts.exams, counts.frames, counts.quarantined) == (10, 20, 6)
    assert counts.quarantine_reasons == {
        "duplicate exam_id": 1,
        "empty report": 1,
        "malformed line": 1,
        "missing file": 1,
        "unreadable image": 2,
    }
    assert [group.exam_id for group in exams(config)] == [f"G{i}" for i in range(10)]
    assert [(row["exam_id"], row["reason"]) for row in rows(config.quarantine_uri)] == [
        ("missing", "missing file: nowhere.jpg"),
        ("truncated", "unreadable image: cut.jpg: damaged or cut short"),
        (
            "bomb",
            "unreadable image: bomb.png: 9000 x 9000 pixels, at most 25000000 are let in",
        ),
        ("empty", "empty report: neither findings nor diagnosis"),
        ("G3", "duplicate exam_id: also at exams.jsonl line 4"),
        ("exams.jsonl line 12", "malformed line: not JSON"),
    ]
    assert len(rows(config.audit_uri)) == 20
    assert write_instructions(config, instructions_at(root)).filled.exams == 10
    assert all(group.conversations for group in exams(config))
    assert [group.exam_id for group in exams(config)] == [f"G{i}" for i in range(10)]


def test_a_folder_of_good_and_bad_exams(tmp_path: Path) -> None:
    check_mixed(str(tmp_path))


def test_the_same_folder_on_an_object_store(s3_bucket: str) -> None:
    check_mixed(f"{s3_bucket}/prepare")


def test_simulated_exams_come_in_order_and_again_the_same(tmp_path: Path) -> None:
    simulator = SimulatorConfig(num_patients=12, frame_size=32)
    config = config_at(str(tmp_path / "a"), simulator=simulator, exams_per_file=5)
    counts = prepare(config)
    first = exams(config)
    assert counts.exams == len(first) > 12
    assert len({group.exam_id for group in first}) == len(first)
    again = config_at(str(tmp_path / "b"), simulator=simulator)
    assert prepare(again) == counts
    assert exams(again) == first


def test_the_old_table_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    config = config_at(str(tmp_path), simulator=SimulatorConfig(num_patients=2, frame_size=32))
    prepare(config)
    before = exams(config)
    broken = config.model_copy(update={"format": "folder", "source_uri": str(tmp_path / "no")})
    with pytest.raises(storage.StorageError, match=r"exams\.jsonl"):
        prepare(broken)
    assert exams(config) == before
    prepare(config.model_copy(update={"seed": 1}))
    assert exams(config) != before


def test_a_missing_bucket_is_one_line(s3_bucket: str, tmp_path: Path) -> None:
    folder = config_at(str(tmp_path), format="folder", source_uri="s3://no-such-bucket/exams")
    target = config_at("s3://no-such-bucket/out", simulator=SimulatorConfig(num_patients=1))
    for config in (folder, target):
        with pytest.raises(storage.StorageError, match="'no-such-bucket' does not exist") as found:
            prepare(config)
        assert "\n" not in str(found.value)


def test_a_source_without_exams_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", [""], {})
    with pytest.raises(ConfigError, match=r"data\.source_uri: .*folder holds no exam"):
        prepare(config_at(str(tmp_path), format="folder", source_uri=folder))


def test_conversations_need_exams(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match="no complete table here"):
        write_instructions(config_at(str(tmp_path)), instructions_at(str(tmp_path)))
