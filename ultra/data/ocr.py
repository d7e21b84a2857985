"""Letters found in frames by RapidOCR, which comes with `pip install ultra[ocr]` and stays offline.

A reading says where letters stand and how many; what they say never leaves this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ultra.config import InputError
from ultra.data.frames import Box, area, common

_TILE, _OVERLAP, _SMALLEST = 640, 96, 320
"""Pixels. The detector enlarges what is smaller than 736, so a tile of 640 is seen larger."""

_BOX_SCORE = 0.3
_TEXT_SCORE = 0.3
"""Of 160 simulated frames without text five gave two characters or more at this score, none above
0.5; drawn names came down to 0.35."""


_CALLIPERS = "十一丨丶"
"""What the crosses and lines of a measurement are read as."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Where letters or digits were read, how many, and how sure the reader is, 0 to 1."""

    box: Box
    num_characters: int
    score: float

    @property
    def height(self) -> int:
        """The shorter side of the box in pixels: lines may run upwards."""
        return min(self.box[2] - self.box[0], self.box[3] - self.box[1])

    @property
    def is_text(self) -> bool:
        """Whether this is more than the single letter that round tissue is often taken for."""
        return self.num_characters >= 2 and self.score >= _TEXT_SCORE


Reader = Callable[[NDArray[np.uint8]], list[Reading]]
"""Reads (H, W) grey or (H, W, 3) RGB."""


def open_reader(mode: Literal["auto", "off", "require"]) -> Reader | None:
    """Return the reader, or None where it is off or not installed.

    Raises:
        InputError: when it is required and not installed.
    """
    if mode == "off":
        return None
    if find_spec("rapidocr") is None or find_spec("onnxruntime") is None:
        if mode == "require":
            raise InputError("data.ocr: require needs `pip install ultra[ocr]`")
        return None
    return read_letters


def read_letters(pixels: NDArray[np.uint8]) -> list[Reading]:
    """Return what is read in a picture, however unsure, tile by tile so that size costs nothing."""
    colour = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    readings = []
    for left, top, tile in _tiles(colour):
        found = _engine()(tile)
        if found.boxes is None:
            continue
        for corners, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            x0, y0 = np.floor(corners.min(axis=0)).astype(int)
            x1, y1 = np.ceil(corners.max(axis=0)).astype(int)
            box = common(
                (int(left + x0), int(top + y0), int(left + x1), int(top + y1)),
                (0, 0, pixels.shape[1], pixels.shape[0]),
            )
            characters = sum(c.isalnum() and c not in _CALLIPERS for c in text)
            if characters and area(box):
                readings.append(Reading(box, characters, float(score)))
    return readings


def _tiles(pixels: NDArray[np.uint8]) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """Yield left, top and pixels of overlapping tiles, the small ones widened by their edges."""
    height, width = pixels.shape[:2]
    for top in _starts(height):
        for left in _starts(width):
            tile = pixels[top : top + _TILE, left : left + _TILE]
            short = [max(0, _SMALLEST - side) for side in tile.shape[:2]]
            yield left, top, np.pad(tile, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge")


def _starts(side: int) -> list[int]:
    last = max(0, side - _TILE)
    return [*range(0, last, _TILE - _OVERLAP), last]


@cache
def _engine() -> Any:
    import cv2
    from rapidocr import RapidOCR

    cv2.setNumThreads(1)  # tasks share the cores
    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,
            "Det.box_thresh": _BOX_SCORE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
