"""Encoded frames in and out: checked, stripped of metadata, thinned, and searched for text."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy import ndimage

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels; right and bottom lie just outside."""

FORMATS = ("JPEG", "PNG")
"""What frames are stored as."""

JPEG_QUALITY = 95
_ONE_LINE = 32
"""Pixels; what is higher may be lines of text run together, and need not be wider than high."""

_THUMBNAIL = (64, 64)


def check_image(data: bytes, *, max_bytes: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) of a JPEG or PNG that decodes whole.

    Size and kind are read from the header alone, so nothing over the caps is ever decoded.

    Raises:
        ValueError: for another format, something over the caps, or damaged data.
    """
    width, height = _load(data, max_bytes, max_pixels).size
    return width, height


def decode_frame(
    data: bytes, *, max_bytes: int, max_pixels: int, formats: tuple[str, ...] = FORMATS
) -> NDArray[np.uint8]:
    """Return the pixels of an image, upright, as (H, W) grey or (H, W, 3) RGB.

    Where it cannot be read which way is up, they are as they are stored.

    Args:
        data: the image.
        max_bytes: cap on its size.
        max_pixels: cap on its pixels.
        formats: what it may be, as Pillow calls it.

    Raises:
        ValueError: as `check_image`.
    """
    image = _turn_upright(_load(data, max_bytes, max_pixels, formats))
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip, not scale
        return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
    grey = image.mode in ("1", "L", "LA")
    return np.asarray(image.convert("L" if grey else "RGB"))


def clean_frame(data: bytes, *, max_bytes: int, max_pixels: int) -> bytes:
    """Return a frame encoded anew from its pixels alone, so that no metadata is left.

    Raises:
        ValueError: as `check_image`.
    """
    pixels = decode_frame(data, max_bytes=max_bytes, max_pixels=max_pixels)
    return encode_frame(pixels, lossy=is_jpeg(data))


def encode_frame(pixels: NDArray[np.uint8], *, lossy: bool) -> bytes:
    """Return pixels as JPEG where the source was lossy already, as PNG otherwise."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if lossy:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def is_jpeg(data: bytes) -> bool:
    """Return whether data begins as a JPEG does."""
    return data[:3] == b"\xff\xd8\xff"


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return a frame as (64, 64) grey levels, each the mean of its area."""
    small = Image.fromarray(pixels).convert("L").resize(_THUMBNAIL, Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def drop_duplicates(frames_gray: Iterable[NDArray[np.float32]], threshold: float) -> list[int]:
    """Return the indices of the frames that do not repeat the one kept before.

    A frame repeats it when the mean absolute difference is below `threshold` grey levels. The
    frames have one common size; see `thumbnail`.
    """
    kept: list[int] = []
    last: NDArray[np.float32] | None = None
    for index, frame in enumerate(frames_gray):
        if last is None or float(np.abs(frame - last).mean()) >= threshold:
            kept.append(index)
            last = frame
    return kept


def sample_evenly(count: int, cap: int) -> list[int]:
    """Return at most `cap` indices of range(count), evenly spread, both ends included."""
    if count <= cap:
        return list(range(count))
    if cap == 1:
        return [count // 2]
    return [int(i) for i in np.linspace(0, count - 1, cap).round()]


def area(box: Box) -> int:
    """Return the pixels of a box; none where it is inside out."""
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def common(a: Box, b: Box) -> Box:
    """Return what two boxes share; inside out where that is nothing."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def find_text(pixels: NDArray[np.uint8], contrast: int = 40) -> list[Box]:
    """Return the boxes of a frame that look like written text.

    Letters change by `contrast` grey levels within two pixels, which speckle, blurred by the
    beam, does not; a line of them is at least 5 pixels high, wider than high, and its rows cross
    two strokes or more, where ticks and round markers cross one. The frame is searched at full
    and at half size, for large letters. Text that runs upwards is not found.

    Args:
        pixels: (H, W) grey or (H, W, 3) RGB.
        contrast: lower finds fainter text, and sooner takes sharp tissue for it.
    """
    value = (pixels if pixels.ndim == 2 else pixels.max(axis=-1)).astype(np.int16)
    boxes = _text_lines(value, contrast)
    height, width = (side // 2 * 2 for side in value.shape)
    cells = value[:height, :width].reshape(height // 2, 2, width // 2, 2)
    half = cells.mean(axis=(1, 3)).astype(np.int16)
    larger = [(2 * a, 2 * b, 2 * c, 2 * d) for a, b, c, d in _text_lines(half, contrast)]
    return boxes + larger


def _text_lines(value: NDArray[np.int16], contrast: int) -> list[Box]:
    step = np.zeros_like(value)
    step[:, 1:-1] = value[:, 2:] - value[:, :-2]
    rise, fall = step >= contrast, step <= -contrast
    crisp = np.pad(rise | fall, 16)
    crisp = ndimage.binary_closing(crisp, np.ones((1, 13)))  # letters to words
    crisp = ndimage.binary_closing(crisp, np.ones((3, 1)))
    words = ndimage.binary_opening(crisp[16:-16, 16:-16], np.ones((4, 5)))
    boxes = []
    for rows, columns in ndimage.find_objects(ndimage.label(words)[0]):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height < 5 or width < 10 or (height <= _ONE_LINE and width < 1.1 * height):
            continue
        here = (rows, columns)
        strokes = np.minimum(_num_runs(rise[here]), _num_runs(fall[here]))
        if np.median(strokes) >= 2:
            boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return boxes


def _num_runs(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    starts = np.diff(mask.astype(np.int8), axis=1, prepend=0) == 1
    return np.asarray(np.count_nonzero(starts, axis=1))


def _load(
    data: bytes, max_bytes: int, max_pixels: int, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes, at most {max_bytes} are let in")
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise ValueError(f"more than the {max_pixels} pixels that are let in") from None
    except Exception:  # Pillow raises many kinds for hostile headers; none may reach the caller
        raise ValueError(f"no {' or '.join(formats)} that can be read") from None
    if getattr(image, "is_animated", False) and image.format in ("PNG", "WEBP"):
        raise ValueError("several pictures in one file; an animation is no frame")
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, at most {max_pixels} are let in")
    try:
        image.load()
    except Exception:  # the same for hostile or cut bodies
        raise ValueError("damaged or cut short") from None
    return image


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # many kinds as well, and the pixels are whole
        return image
