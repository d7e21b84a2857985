"""Text that machines write over the tissue: found, masked to black, and shown to be gone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ultra.data.frames import Box, area, common, find_text
from ultra.data.ocr import Reader

MAX_MASKED_SHARE = 0.1
"""Of a region; more text than that is a page, not a picture."""

_STATIC_CONTRAST = 24
_MARGIN = 4
_ROUNDS = 4
_MASKED_ALREADY = 0.9
_NEARLY_FULL = 0.8
_SURE = 0.8
"""What is read across a fifth of a picture is an organ, unless the reader is as sure as this."""

_BRIGHTER = (255 * (np.arange(256) / 255) ** 0.4).round().astype(np.uint8)
"""Grey 10 becomes 70: a name as dim as the glow around it is still a name."""
_ENLARGED = 3


@dataclass(frozen=True, slots=True)
class Overlay:
    """What stands over the tissue of a pane.

    Attributes:
        boxes: to be masked.
        evidence: how they were found, for people; never what they say.
    """

    boxes: tuple[Box, ...]
    evidence: str


def find_still_overlay(pixels: NDArray[np.uint8], reader: Reader | None) -> Overlay:
    """Return the overlay of a still, once masking it is shown to leave no text.

    A still offers no motion to tell letters from tissue. Without a reader, anything in it that
    looks like text refuses it. With one, all that is read is masked, and what looks like text may
    stay where nothing is read in it, not even enlarged.

    Raises:
        ValueError: when the still cannot be shown to be clean.
    """
    if reader is None:
        for box in find_text(pixels):
            raise ValueError(
                f"something like text at {show(box)}; no text is read here, so it cannot be shown "
                "to be harmless"
            )
        return Overlay((), "no text-like shape in the still")
    boxes = _mask_until_unread(pixels, (), reader, sideways=0)
    shapes = find_text(mask(pixels, boxes))
    unread = sum(not _is_masked(shape, pixels, boxes) for shape in shapes)
    evidence = _told("OCR", boxes)
    if unread:
        evidence += f"; nothing is read in {unread} text-like shapes, not even enlarged"
    return Overlay(boxes, evidence)


def find_cine_overlay(mean: NDArray[np.uint8], reader: Reader | None) -> Overlay:
    """Return the overlay of a cine from the mean of its frames.

    Over time moving tissue blurs and text does not, so fainter letters are found than in a still.

    Raises:
        ValueError: when there is too much of it, or some can still be read where it is masked.
    """
    static = grow(find_text(mean, _STATIC_CONTRAST), mean)
    if reader is None:
        _check_share(mean, static)
        return Overlay(static, _told("static check over time", static))
    boxes = _mask_until_unread(mean, static, reader, sideways=1)
    return Overlay(boxes, _told("static check and OCR over time", boxes))


def check_frame(pixels: NDArray[np.uint8], reader: Reader | None) -> None:
    """Refuse a masked frame of a cine that holds text which was not there all the time.

    Raises:
        ValueError: for anything that looks like text; with a reader, where it is read as well.
    """
    for box in find_text(pixels):
        if reader is None:
            raise ValueError(
                f"something like text at {show(box)}; no text is read here, so it cannot be shown "
                "to be harmless"
            )
        if _is_read(pixels, box, reader):
            raise ValueError(f"text that comes and goes at {show(box)}")


def mask(pixels: NDArray[np.uint8], boxes: Iterable[Box]) -> NDArray[np.uint8]:
    """Return a copy that is black in the boxes."""
    masked = pixels.copy()
    for left, top, right, bottom in boxes:
        masked[top:bottom, left:right] = 0
    return masked


def grow(boxes: Iterable[Box], pixels: NDArray[np.uint8], *, sideways: int = 1) -> tuple[Box, ...]:
    """Return boxes with a margin, inside the picture.

    Args:
        boxes: of lines of text.
        pixels: the picture.
        sideways: letters that may stand beside a line at other times, as in a clock.
    """
    height, width = pixels.shape[:2]
    grown = []
    for left, top, right, bottom in boxes:
        margin = max(_MARGIN, sideways * (bottom - top))
        grown.append(
            (
                max(0, left - margin),
                max(0, top - _MARGIN),
                min(width, right + margin),
                min(height, bottom + _MARGIN),
            )
        )
    return tuple(grown)


def show(box: Box) -> str:
    """Return a box as people read it, the last pixel included."""
    return f"({box[0]}, {box[1]}) to ({box[2] - 1}, {box[3] - 1})"


def _mask_until_unread(
    pixels: NDArray[np.uint8], boxes: tuple[Box, ...], reader: Reader, *, sideways: int
) -> tuple[Box, ...]:
    """Return the boxes, and those that must be masked beside them until nothing is read."""
    for _ in range(_ROUNDS):
        masked = mask(pixels, boxes)
        found = [box for box in _find_letters(masked, reader) if not _is_masked(box, pixels, boxes)]
        if not found:
            return boxes
        boxes = _join((*boxes, *grow(found, pixels, sideways=sideways)))
        _check_share(pixels, boxes)
    raise ValueError(f"text at {show(found[0])} that masking does not remove")


def _join(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """Return the boxes, those that nearly fill the rectangle around them put together."""
    joined: list[Box] = []
    for box in boxes:
        for other in list(joined):
            around = (
                min(box[0], other[0]), min(box[1], other[1]),
                max(box[2], other[2]), max(box[3], other[3]),
            )  # fmt: skip
            both = area(box) + area(other) - area(common(box, other))
            if both > _NEARLY_FULL * area(around):
                joined.remove(other)
                box = around
        joined.append(box)
    return tuple(sorted(joined, key=lambda box: (box[1], box[0])))


def _is_masked(box: Box, pixels: NDArray[np.uint8], boxes: Sequence[Box]) -> bool:
    """Return whether nearly all of a box is black already: only the mask's edge was read."""
    left, top, right, bottom = box
    covered = mask(np.ones(pixels.shape[:2], dtype=np.uint8), boxes)[top:bottom, left:right]
    return float(covered.mean()) < 1 - _MASKED_ALREADY


def _find_letters(pixels: NDArray[np.uint8], reader: Reader) -> list[Box]:
    """Return where text is read, as it is shown and with what is dark made bright."""
    readings = reader(pixels) + reader(_BRIGHTER[pixels])
    side = min(pixels.shape[:2])
    letters = [r.box for r in readings if r.is_text and (r.height < side / 5 or r.score > _SURE)]
    for shape in find_text(pixels):
        # A reading inside a shape counts however short or unsure it is: two judges agree.
        if any(_half_inside(r.box, shape) or _half_inside(shape, r.box) for r in readings) or (
            _is_read(pixels, shape, reader)
        ):
            letters.append(shape)
    return letters


def _half_inside(box: Box, other: Box) -> bool:
    return area(common(box, other)) > area(box) / 2


def _is_read(pixels: NDArray[np.uint8], box: Box, reader: Reader) -> bool:
    """Return whether anything is read in a box and its surroundings, enlarged."""
    left, top, right, bottom = grow([box], pixels)[0]
    crop = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    size = (crop.width * _ENLARGED, crop.height * _ENLARGED)
    return bool(reader(np.asarray(crop.resize(size, Image.Resampling.BICUBIC))))


def _check_share(pixels: NDArray[np.uint8], boxes: Sequence[Box]) -> None:
    covered = np.ones(pixels.shape[:2], dtype=np.uint8)
    share = 1 - float(mask(covered, boxes).mean())
    if share > MAX_MASKED_SHARE:
        raise ValueError(
            f"text covers {share:.0%} of the region; up to {MAX_MASKED_SHARE:.0%} is masked"
        )


def _told(how: str, boxes: Sequence[Box]) -> str:
    if not boxes:
        return f"{how} found no text"
    return f"{how} found text, masked {', '.join(show(box) for box in boxes)} of the crop"
