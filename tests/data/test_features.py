"""Cached features belong to the exams they are read for, and to no others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.exam_tables import T, encode, make_exam, write_exams
from ultra.data import parquet, schema
from ultra.data.features import features_uri, read_features, unpack, write_features
from ultra.types import Conversation, Turn

EXAMS = [make_exam(i) for i in range(7)]


@pytest.fixture
def part(tmp_path) -> str:
    (uri,) = write_exams(tmp_path / "exams", [EXAMS])
    return uri


def content(number: int) -> str:
    return schema.content_digest(EXAMS[number].frames)


def test_row_by_row_they_are_what_was_encoded(part, tmp_path) -> None:
    target = features_uri(part, str(tmp_path / "features"))
    num_frames = write_features(part, target, encode)
    assert num_frames == sum(len(exam.frames) for exam in EXAMS) == 13
    wanted = [5, 0, 2]  # any rows, in any order
    stored = list(read_features(target, [(i, content(i)) for i in wanted]))
    assert len(stored) == 3
    for number, row in zip(wanted, stored, strict=True):
        features = unpack(row, T, "float16")
        expected = encode(list(EXAMS[number].frames))
        assert features.keys() == expected.keys()
        for name, array in expected.items():
            assert features[name].dtype == np.float16
            assert np.array_equal(features[name], array)


def test_those_of_another_exam_are_refused(part, tmp_path) -> None:
    target = features_uri(part, str(tmp_path / "features"))
    write_features(part, target, encode)
    with pytest.raises(ValueError, match="row 3 belongs to another exam"):
        list(read_features(target, [(2, content(2)), (3, content(4))]))


def test_other_frames_look_for_another_file(part, tmp_path) -> None:
    folder = str(tmp_path / "features")
    original = features_uri(part, folder)
    changed = [*EXAMS[:3], make_exam(3, frames=(b"another",)), *EXAMS[4:]]
    swapped = [EXAMS[1], EXAMS[0], *EXAMS[2:]]
    reordered = [
        replace(EXAMS[1], frames=EXAMS[1].frames[::-1]) if i == 1 else e
        for i, e in enumerate(EXAMS)
    ]
    names = {original}
    for index, exams in enumerate((changed, swapped, reordered, EXAMS[:-1])):
        (uri,) = write_exams(tmp_path / str(index), [exams])
        names.add(features_uri(uri, folder))
    assert len(names) == 5
    assert all(name.startswith(folder) for name in names)


def test_other_conversations_find_the_same_file(part, tmp_path) -> None:
    told = Conversation("align", "new", (Turn("user", "q"), Turn("assistant", "a")))
    (uri,) = write_exams(tmp_path / "told", [[replace(e, conversations=(told,)) for e in EXAMS]])
    assert parquet.read_column(uri, "conversations") != parquet.read_column(part, "conversations")
    assert features_uri(uri, "cache") == features_uri(part, "cache")


def test_a_failing_encoder_leaves_no_file(part, tmp_path) -> None:
    folder = tmp_path / "features"
    calls = []

    def fail_late(frames):
        calls.append(frames)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return encode(frames)

    with pytest.raises(RuntimeError, match="out of memory"):
        write_features(part, features_uri(part, str(folder)), fail_late)
    assert not list(folder.rglob("*"))
