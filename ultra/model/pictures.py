"""Frames as the pictures that encoders see: each by itself, or several as one."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image

MAX_COMPOSED = 4
"""Frames of a composite (Qilin-Med-VL, arXiv 2310.17956); of more, so many evenly spread ones."""

MAX_SIDE = 2048
"""Sides of a composite in pixels: twice SAM's input, so that no encoder could see more."""


def decode(frame: bytes) -> Image.Image:
    """Return a frame as an RGB image."""
    with Image.open(io.BytesIO(frame)) as image:
        return image.convert("RGB")


def compose(frames: Sequence[bytes]) -> Image.Image:
    """Return up to four frames of a group as one picture, as Qilin-Med-VL does.

    They stand side by side at one height or below each other at one width, in their order:
    whichever is nearer to a square. A single frame stays as it is.

    Args:
        frames: JPEG or PNG bytes, at least one; of more than four, the first, the last and two
            evenly spread between them are taken.
    """
    last, gaps = len(frames) - 1, min(len(frames), MAX_COMPOSED) - 1
    chosen = [round(i * last / gaps) for i in range(gaps + 1)] if gaps else [0]
    images = [decode(frames[i]) for i in chosen]
    if len(images) == 1:
        return images[0]
    width_of_row = sum(image.width / image.height for image in images)  # at height 1
    height_of_column = sum(image.height / image.width for image in images)  # at width 1
    if abs(math.log(width_of_row)) <= abs(math.log(height_of_column)):
        return _row(images, width_of_row)
    return _column(images, height_of_column)


def _row(images: Sequence[Image.Image], width: float) -> Image.Image:
    height = min(max(image.height for image in images), MAX_SIDE, MAX_SIDE / width)
    resized = [_resize(image, height * image.width / image.height, height) for image in images]
    picture = Image.new("RGB", (sum(image.width for image in resized), resized[0].height))
    left = 0
    for image in resized:
        picture.paste(image, (left, 0))
        left += image.width
    return picture


def _column(images: Sequence[Image.Image], height: float) -> Image.Image:
    width = min(max(image.width for image in images), MAX_SIDE, MAX_SIDE / height)
    resized = [_resize(image, width, width * image.height / image.width) for image in images]
    picture = Image.new("RGB", (resized[0].width, sum(image.height for image in resized)))
    top = 0
    for image in resized:
        picture.paste(image, (0, top))
        top += image.height
    return picture


def _resize(image: Image.Image, width: float, height: float) -> Image.Image:
    size = max(1, round(width)), max(1, round(height))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
