"""Cached features belong to the exams they are read for, and to no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.exam_tables import T, encode, encode_frames, make_exam, write_exams
from ultra.data import parquet, schema
from ultra.data.features import (
    BATCH_FRAMES,
    EncodeCounts,
    features_uris,
    read_features,
    unpack,
    write_features,
)
from ultra.types import Conversation, Turn

EXAMS = [make_exam(i) for i in range(7)]
"""Of 1, 2, 3, 1, 2, 3 and 1 frames."""


@pytest.fixture
def part(tmp_path) -> str:
    """The exams in row groups of five and two."""
    (uri,) = write_exams(tmp_path / "exams", [EXAMS], per_row_group=5)
    return uri


def content(number: int) -> str:
    return schema.content_digest(EXAMS[number].frames)


def test_row_by_row_they_are_what_was_encoded(part, tmp_path) -> None:
    first, second = features_uris(part, str(tmp_path / "features"))
    written = write_features(part, 0, first, encode)
    assert (written.frames, written.bytes) == (9, (tmp_path / first).stat().st_size)
    assert write_features(part, 1, second, encode).frames == 4
    for uri, offset, wanted in ((first, 0, [4, 0, 2]), (second, 5, [1])):  # in any order
        rows = [(i, content(i + offset)) for i in wanted]
        stored = list(read_features(uri, rows))
        assert len(stored) == len(wanted)
        for place, row in zip(wanted, stored, strict=True):
            features = unpack(row, T, "float16")
            expected = encode_frames(EXAMS[place + offset].frames)
            assert features.keys() == expected.keys()
            for name, array in expected.items():
                assert features[name].dtype == np.float16
                assert np.array_equal(features[name], array)


def test_those_of_another_exam_are_refused(part, tmp_path) -> None:
    target, _ = features_uris(part, str(tmp_path / "features"))
    write_features(part, 0, target, encode)
    with pytest.raises(ValueError, match="row 3 belongs to another exam"):
        list(read_features(target, [(2, content(2)), (3, content(4))]))


def test_other_frames_look_for_another_file(part, tmp_path) -> None:
    folder = str(tmp_path / "features")
    first, second = features_uris(part, folder)
    changed = [*EXAMS[:3], make_exam(3, frames=(b"another",)), *EXAMS[4:]]
    swapped = [EXAMS[1], EXAMS[0], *EXAMS[2:]]
    turned = replace(EXAMS[1], frames=EXAMS[1].frames[::-1])
    reordered = [EXAMS[0], turned, *EXAMS[2:]]
    names = {first}
    for index, exams in enumerate((changed, swapped, reordered, EXAMS[:4] + EXAMS[5:])):
        (uri,) = write_exams(tmp_path / str(index), [exams], per_row_group=5)
        name, rest = features_uris(uri, folder)
        names.add(name)
        assert (rest == second) == (len(exams) == len(EXAMS))  # a row group knows no other
    assert len(names) == 5
    assert all(name.startswith(folder) for name in names)


def test_other_conversations_find_the_same_file(part, tmp_path) -> None:
    told = Conversation("align", "new", (Turn("user", "q"), Turn("assistant", "a")))
    (uri,) = write_exams(
        tmp_path / "told", [[replace(e, conversations=(told,)) for e in EXAMS]], per_row_group=5
    )
    assert parquet.read_column(uri, "conversations") != parquet.read_column(part, "conversations")
    assert features_uris(uri, "cache") == features_uris(part, "cache")


def test_a_failing_encoder_leaves_no_file(tmp_path) -> None:
    folder = tmp_path / "features"
    exams = [make_exam(i, frames=(bytes([i]),) * 20) for i in range(4)]
    (part,) = write_exams(tmp_path / "exams", [exams])
    calls = []

    def fail_late(groups):
        calls.append(groups)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return encode(groups)

    target, _ = features_uris(part, str(folder))
    with pytest.raises(RuntimeError, match="out of memory"):
        write_features(part, 0, target, fail_late)
    assert not list(folder.rglob("*"))


def test_whole_exams_go_through_the_encoders_together(tmp_path) -> None:
    counts = [20, 12, 1, 31, 2, 40, 3]
    exams = [make_exam(i, frames=tuple(map(str.encode, "x" * n))) for i, n in enumerate(counts)]
    (part,) = write_exams(tmp_path / "exams", [exams], per_row_group=99)
    together = []

    def note(groups):
        together.append([len(group) for group in groups])
        return encode(groups)

    (target,) = features_uris(part, str(tmp_path))
    assert write_features(part, 0, target, note).frames == sum(counts)
    assert together == [[20, 12], [1, 31], [2], [40], [3]]
    assert BATCH_FRAMES == 32


def test_counts_say_how_fast_and_how_large() -> None:
    counts = EncodeCounts(cached=2, written=3, frames=4000, bytes=120_000, seconds=10.0)
    assert counts.metrics() == {
        "cached": 2, "written": 3, "frames": 4000, "bytes": 120_000, "seconds": 10.0,
        "frames_per_second": 400.0, "bytes_per_frame": 30.0,
    }  # fmt: skip
    said = "4,000 frames encoded (400.0/s, 30 bytes each) into 3 files; 2 were in the cache"
    assert counts.summary() == said
    assert EncodeCounts(cached=2).metrics()["frames_per_second"] == 0
