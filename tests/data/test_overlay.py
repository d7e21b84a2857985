from __future__ import annotations

import numpy as np
import pytest

from tests.data.letters import extent, write
from tests.data.test_dicom import tissue
from ultra.data.frames import Box, find_text
from ultra.data.ocr import Reading, read_letters
from ultra.data.overlay import (
    check_frame,
    find_cine_overlay,
    find_still_overlay,
    grow,
    mask,
    show,
)

AT = (90, 10)
OVER_TISSUE = (90, 120)
"""Of about 145 grey levels."""


def still(text: str, size: int = 14, level: int = 220, at: tuple[int, int] = AT) -> np.ndarray:
    return write(tissue(1)[0], text, at, size, level)


def left_of(text: str, size: int, at: tuple[int, int], boxes: tuple[Box, ...]) -> float:
    """The share of the letters' own pixels that no box covers."""
    strokes = write(np.zeros((200, 300), np.uint8), text, at, size, 255) > 100
    return float(mask(np.ones((200, 300), np.uint8), boxes)[strokes].mean())


@pytest.mark.parametrize("text", ["张建国 男 52岁", "ZHANG SAN 52"])
@pytest.mark.parametrize(
    ("at", "size", "level"),
    [
        (AT, 11, 220),
        (AT, 14, 60),
        (AT, 24, 220),
        (OVER_TISSUE, 11, 220),
        (OVER_TISSUE, 14, 180),  # 35 grey levels brighter than what is behind
        (OVER_TISSUE, 14, 80),
    ],
)
def test_what_is_read_in_a_still_is_masked_or_the_still_is_refused(
    text: str, size: int, level: int, at: tuple[int, int]
) -> None:
    try:
        overlay = find_still_overlay(still(text, size, level, at), read_letters)
    except ValueError as error:
        assert "of the region; up to 10% is masked" in str(error)  # noqa: PT017
        assert size == 24 or at == OVER_TISSUE, "a small line in the dark is masked"
        return
    assert left_of(text, size, at, overlay.boxes) < 0.02
    assert overlay.evidence.startswith("OCR found text, masked (")
    assert "ZHANG" not in overlay.evidence
    assert "张" not in overlay.evidence


def test_letters_as_dim_as_the_dark_are_found() -> None:
    dark = write(tissue(1)[0], "ZHANG SAN", AT, 16, 14)
    assert find_text(dark) == []
    overlay = find_still_overlay(dark, read_letters)
    assert left_of("ZHANG SAN", 16, AT, overlay.boxes) < 0.02


def test_a_still_without_text_stays_as_it_is() -> None:
    overlay = find_still_overlay(tissue(1)[0], read_letters)
    assert overlay.boxes == ()
    assert overlay.evidence == "OCR found no text"


def test_without_a_reader_a_still_holds_no_text_or_is_refused() -> None:
    assert find_still_overlay(tissue(1)[0], None).evidence == "no text-like shape in the still"
    with pytest.raises(ValueError, match="no text is read here"):
        find_still_overlay(still("ZHANG SAN"), None)


def test_a_shape_in_which_nothing_is_read_may_be_tissue() -> None:
    shaped = still("ZHANG SAN")

    def blind(pixels: np.ndarray) -> list[Reading]:
        return []

    overlay = find_still_overlay(shaped, blind)
    assert overlay.boxes == ()
    assert "nothing is read in" in overlay.evidence
    looks: list[tuple[int, ...]] = []

    def enlarging(pixels: np.ndarray) -> list[Reading]:
        looks.append(pixels.shape)
        height, width = pixels.shape[:2]
        # Only enlarged, and only a single unsure letter: a shape that is read at all is text.
        return [Reading((0, 0, width, height), 1, 0.1)] if pixels.size < shaped.size else []

    overlay = find_still_overlay(shaped, enlarging)
    assert left_of("ZHANG SAN", 14, AT, overlay.boxes) < 0.02
    assert shaped.shape in looks


def test_a_page_of_text_is_refused() -> None:
    page = tissue(1)[0]
    for y in range(5, 190, 24):
        page = write(page, "ZHANG SAN 1975-03-02 M", (10, y), 18, 220)
    with pytest.raises(ValueError, match=r"text covers \d+% of the region; up to 10% is masked"):
        find_still_overlay(page, read_letters)


def test_text_that_masking_does_not_remove_refuses() -> None:
    places = iter(range(0, 200, 12))

    def fickle(pixels: np.ndarray) -> list[Reading]:
        top = next(places)
        return [Reading((10, top, 30, top + 4), 5, 0.9)]

    with pytest.raises(ValueError, match=r"text at .* that masking does not remove"):
        find_still_overlay(tissue(1)[0], fickle)


def test_an_organ_is_no_letter_unless_the_reader_is_sure() -> None:
    def reader(score: float) -> list[tuple[int, ...]]:
        found = [Reading((50, 50, 150, 110), 2, score)]
        return list(find_still_overlay(tissue(1)[0], lambda pixels: found).boxes)

    assert reader(0.5) == []
    with pytest.raises(ValueError, match="text covers"):
        reader(0.9)


def test_faint_text_of_a_cine_is_read_from_its_mean() -> None:
    frames = tissue(16)
    marked = np.stack([write(frame, "张建国 52", (90, 120), 14, 150) for frame in frames])
    mean = marked.mean(axis=0).round().astype(np.uint8)
    overlay = find_cine_overlay(mean, read_letters)
    assert left_of("张建国 52", 14, (90, 120), overlay.boxes) < 0.02
    assert overlay.evidence.startswith("static check and OCR over time found text, masked")
    clean = frames.mean(axis=0).round().astype(np.uint8)
    assert find_cine_overlay(clean, read_letters).evidence == (
        "static check and OCR over time found no text"
    )
    assert find_cine_overlay(clean, None).evidence == "static check over time found no text"


def test_text_that_comes_and_goes_is_refused() -> None:
    with pytest.raises(ValueError, match="text that comes and goes at"):
        check_frame(still("ZHANG SAN"), read_letters)
    check_frame(tissue(1)[0], read_letters)
    check_frame(still("ZHANG SAN"), lambda pixels: [])  # like text, and not even enlarged is it any


def test_boxes_grow_inside_the_picture() -> None:
    picture = np.zeros((100, 120), np.uint8)
    assert grow([(10, 50, 40, 60)], picture) == ((0, 46, 50, 64),)
    assert grow([(10, 50, 40, 60)], picture, sideways=0) == ((6, 46, 44, 64),)
    assert grow([(90, 2, 118, 99)], picture) == ((0, 0, 120, 100),)
    assert show((1, 2, 4, 6)) == "(1, 2) to (3, 5)"
    assert extent("ab", 12) > 8
