"""Composites: which frames, in which order, at which size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.model.encoder_weights import png
from ultra.model.pictures import compose, decode

GREYS = (30, 80, 130, 180, 230, 55, 105)


def make_frames(*sizes: tuple[int, int]) -> list[bytes]:
    """Frames of (width, height), each of one grey of its own."""
    return [
        png(np.full((height, width, 3), grey))
        for (width, height), grey in zip(sizes, GREYS, strict=False)
    ]


def spans(line: np.ndarray) -> list[tuple[int, int]]:
    """(grey, length) of the runs along a line."""
    ends = np.flatnonzero(np.diff(line)) + 1
    return [(int(part[0]), len(part)) for part in np.split(line, ends)]


def test_one_frame_is_itself() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(compose([png(pixels)])), pixels)
    large = make_frames((3000, 20))
    assert compose(large).size == (3000, 20)


def test_a_frame_is_read_as_rgb() -> None:
    file = io.BytesIO()
    Image.new("L", (5, 3), 9).save(file, "PNG")
    assert decode(file.getvalue()).getpixel((4, 2)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(30, 50), (30, 50)], (60, 50)),  # upright frames stand side by side
        ([(50, 30), (50, 30)], (50, 60)),  # wide ones below each other
        ([(50, 30)] * 3, (50, 90)),
        ([(50, 30)] * 4, (50, 120)),  # 200 x 30 in a row
        ([(20, 50)] * 4, (80, 50)),
        ([(40, 40)] * 4, (160, 40)),  # both alike: side by side
        ([(40, 20), (20, 60)], (140, 60)),  # at one height
        ([(40, 20), (60, 20)], (60, 50)),  # at one width
    ],
)
def test_frames_are_joined_so_that_the_whole_is_nearest_to_a_square(sizes, expected) -> None:
    picture = np.asarray(compose(make_frames(*sizes)))
    height, width, _ = picture.shape
    assert (width, height) == expected
    in_a_row = expected[1] == max(h for _, h in sizes)
    row = spans(picture[height // 2, :, 0])
    column = spans(picture[:, width // 2, 0])
    assert [grey for grey, _ in (row if in_a_row else column)] == list(GREYS[: len(sizes)])
    for (grey, length), (w, h) in zip(row if in_a_row else column, sizes, strict=True):
        assert length == round(expected[1] * w / h if in_a_row else expected[0] * h / w), grey
    assert len(column if in_a_row else row) == 1  # no gaps


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(4, [0, 1, 2, 3]), (5, [0, 1, 3, 4]), (6, [0, 2, 3, 5]), (7, [0, 2, 4, 6])],
)
def test_of_many_frames_four_are_taken_from_all_over(count, chosen) -> None:
    picture = np.asarray(compose(make_frames(*[(10, 30)] * count)))
    assert [grey for grey, _ in spans(picture[15, :, 0])] == [GREYS[i] for i in chosen]


@pytest.mark.parametrize(
    "sizes",
    [
        [(4000, 3000)] * 4,
        [(3000, 4000)] * 4,
        [(60_000, 1), (7, 9000)],  # hostile: at the second's height the first would be endless
        [(1, 60_000), (9000, 7)],
        [(1, 60_000)] * 2,
        [(60_000, 1)] * 2,
    ],
)
def test_a_composite_is_never_larger_than_encoders_can_see(sizes) -> None:
    picture = compose(make_frames(*sizes))
    assert max(picture.size) <= 2048 + len(sizes)  # each may be rounded up
