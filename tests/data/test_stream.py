"""Every training exam comes exactly once an epoch, in an order that the seed alone decides."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.data.exam_tables import T, encode, encode_frames, make_exam, write_exams
from ultra import storage
from ultra.config import ConfigError, DataConfig, StageConfig
from ultra.data import stream
from ultra.data.features import write_features

SPLITS = {3: "test", 8: "validation", 20: "test"}
EXAMS = [make_exam(i, SPLITS.get(i, "train")) for i in range(29)]
ALIGN, INSTRUCT = (
    StageConfig.model_validate({"name": name, "trainable": ["scorer"], "epochs": 1})
    for name in ("align", "instruct")
)
TRAIN = {f"exam-{i}" for i in range(29) if i not in SPLITS}


@pytest.fixture
def config(tmp_path) -> DataConfig:
    """Two parts with six and four row groups of three exams."""
    write_exams(tmp_path / "exams", [EXAMS[:17], EXAMS[17:]])
    return DataConfig(exams_uri=str(tmp_path / "exams"))


def write_cache(config: DataConfig, folder: str, count: int = 10) -> str:
    for piece in stream.list_pieces(config.exams_uri, folder)[:count]:
        write_features(piece.part_uri, piece.row_group, piece.features_uri, encode)
    return folder


def read(source, seed: int = 0, first: int = 0, epochs: int = 1, seen=()) -> list[dict]:
    windows = stream.plan_windows(source.pieces, seed, first, epochs)
    return [row for window in windows for row in stream.read_window(window, seen)]


def test_every_training_exam_once_an_epoch(config, tmp_path) -> None:
    source = stream.open_source(config, str(tmp_path / "none"), "auto")
    assert source.num_exams == len(TRAIN) == 26
    assert [p.row_group for p in source.pieces] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    rows = read(source, epochs=3)
    for epoch in range(3):
        ids = [row["exam_id"] for row in rows if row["epoch"] == epoch]
        assert len(ids) == 26
        assert set(ids) == TRAIN
    assert [row["epoch"] for row in rows] == sorted(row["epoch"] for row in rows)


def test_the_order_follows_from_the_seed_alone(config, tmp_path) -> None:
    source = stream.open_source(config, str(tmp_path / "none"), "auto")

    def order(seed: int, first: int = 0) -> list[str]:
        return [row["exam_id"] for row in read(source, seed, first)]

    assert order(0) == order(0)
    assert len({tuple(order(*arguments)) for arguments in ((0,), (1,), (0, 1), (1, 1))}) == 4
    assert order(0) != sorted(order(0))
    # Going on in the middle gives what a run from the start would have given.
    both = [row["exam_id"] for row in read(source, epochs=2)]
    assert both[26:] == order(0, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_the_first_exams_of_a_split(config, tmp_path, cached) -> None:
    cache = write_cache(config, str(tmp_path / "cache")) if cached else str(tmp_path / "none")
    source = stream.open_source(config, cache, "auto")

    def read_ids(split: str, count: int) -> list[str]:
        return [row["exam_id"] for row in stream.read_split(source, split, count)]

    assert read_ids("test", 9) == ["exam-3", "exam-20"]
    assert read_ids("test", 1) == ["exam-3"]
    assert read_ids("validation", 3) == ["exam-8"]
    assert read_ids("validation", 0) == []
    assert read_ids("train", 20) == [f"exam-{i}" for i in range(23) if i not in SPLITS]
    for row in stream.read_split(source, "test", 2):
        exam = EXAMS[int(row["exam_id"].split("-")[1])]
        assert tuple(row["frames"]) == exam.frames
        sample = stream.to_sample(row, ALIGN, 0, T, "float16")
        assert sample.conversations[0].turns == exam.conversations[0].turns
        if cached:
            assert sample.features is not None
            for name, expected in encode_frames(exam.frames).items():
                np.testing.assert_array_equal(sample.features[name], expected)


def test_row_groups_from_all_over_are_mixed(config, tmp_path) -> None:
    source = stream.open_source(config, str(tmp_path / "none"), "auto")
    windows = list(stream.plan_windows(source.pieces, 0, 0, 1))
    assert [len(window.pieces) for window in windows] == [4, 4, 2]
    planned = [piece for window in windows for piece in window.pieces]
    assert len(planned) == 10
    assert set(planned) == set(source.pieces)
    numbers = [
        int(row["exam_id"].split("-")[1]) for row in list(stream.read_window(windows[0], ()))
    ]
    groups = {n // 3 if n < 17 else 6 + (n - 17) // 3 for n in numbers}
    assert len(groups) == 4
    assert sum(a // 3 == b // 3 for a, b in pairwise(numbers)) < 8


def test_exams_seen_before_are_left_out_of_their_epoch_only(config, tmp_path) -> None:
    source = stream.open_source(config, str(tmp_path / "none"), "auto")
    whole = [(row["epoch"], row["exam_id"]) for row in read(source, epochs=2)]
    seen = set(whole[:11]) | {(1, "exam-5")}
    rest = [(row["epoch"], row["exam_id"]) for row in read(source, epochs=2, seen=seen)]
    assert rest == [pair for pair in whole if pair not in seen]
    assert len(rest) == 52 - 12


def test_with_a_whole_cache_rows_carry_features_and_no_frames(config, tmp_path) -> None:
    cache = write_cache(config, str(tmp_path / "cache"))
    source = stream.open_source(config, cache, "auto")
    assert source.features
    by_id = {exam.exam_id: exam for exam in EXAMS}
    rows = read(source)
    assert {row["exam_id"] for row in rows} == TRAIN
    for row in rows:
        assert "frames" not in row
        sample = stream.to_sample(row, INSTRUCT, 0, T, "float16")
        exam = by_id[row["exam_id"]]
        expected = encode_frames(exam.frames)
        assert sample.features.keys() == expected.keys()
        for name, array in expected.items():
            assert np.array_equal(sample.features[name], array)
        assert sample.group.frames == ()
        assert sample.group.frame_sizes == exam.frame_sizes
        assert [c.stage for c in sample.conversations] == ["instruct"]
    # The order is that of pixels.
    pixels = stream.open_source(config, cache, "pixels")
    assert [row["exam_id"] for row in read(pixels)] == [row["exam_id"] for row in rows]


@pytest.mark.parametrize(("count", "use"), [(0, "auto"), (9, "auto"), (10, "pixels")])
def test_else_rows_carry_frames_and_no_features(config, tmp_path, count, use) -> None:
    cache = write_cache(config, str(tmp_path / "cache"), count)
    source = stream.open_source(config, cache, use)
    assert not source.features
    by_id = {exam.exam_id: exam for exam in EXAMS}
    for row in read(source):
        sample = stream.to_sample(row, ALIGN, 0, T, "float16")
        assert sample.features is None
        assert sample.group == by_id[row["exam_id"]]
        assert sample.epoch == 0


def test_required_features_that_are_missing_say_what_to_run(config, tmp_path) -> None:
    cache = write_cache(config, str(tmp_path / "cache"), 9)
    message = (
        r"train\.features: require, but 1 of 10 row groups have no features at .*cache; "
        r"run ray_jobs\.encode"
    )
    with pytest.raises(ConfigError, match=message):
        stream.open_source(config, cache, "require")
    write_cache(config, cache)
    assert stream.open_source(config, cache, "require").features


def test_no_table_says_so(tmp_path) -> None:
    config = DataConfig(exams_uri=str(tmp_path / "nowhere"))
    with pytest.raises(storage.StorageError, match="no complete table here"):
        stream.open_source(config, str(tmp_path / "none"), "auto")
