"""DICOM files of ultrasound as they are: parsed, sizes checked, regions found, frames decoded."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ultra.data.frames import Box, area, common

MAX_CINE_FRAMES = 10_000

_HEADER_BYTES = 2**18
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_TISSUE_OR_COLOUR = (1, 2)
_SPATIAL_2D = 1
_CORNERS = ("MinX0", "MinY0", "MaxX1", "MaxY1")
_NUMBERS = ("Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel")
_NEEDED = (*_NUMBERS, "PhotometricInterpretation", "PixelData")


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep pydicom's warnings out of the log: they quote what a file says."""
    logger = logging.getLogger("pydicom")
    with warnings.catch_warnings(action="ignore"):
        logger.disabled = True
        try:
            yield
        finally:
            logger.disabled = False


def parse_header(file: BinaryIO, max_bytes: int, tags: Sequence[str]) -> Any:
    """Return some elements of a file; its pixels are not read where they come late enough.

    Args:
        file: open at its beginning.
        max_bytes: read of it, should the elements stand far behind.
        tags: the elements, by keyword; the last one tells whether all were reached.

    Raises:
        ValueError: for a file that is none, or that is deflated.
    """
    options = {"stop_before_pixels": True, "specific_tags": list(tags)}
    head = file.read(_HEADER_BYTES)
    if head[128:132] != b"DICM":
        raise ValueError("not DICOM")
    if len(head) < _HEADER_BYTES:
        return _parse(head, **options)
    try:
        dataset = _parse(head, **options)
    except ValueError:  # perhaps only because it was cut
        dataset = {}
    return dataset if tags[-1] in dataset else _parse(head + file.read(max_bytes), **options)


def parse_dicom(data: bytes) -> Any:
    """Return the dataset of a file whose pixels can be decoded.

    Raises:
        ValueError: for a file that is none, that is deflated, or that lacks what decoding needs.
    """
    from pydicom.uid import UID

    dataset = _parse(data)
    missing = [name for name in _NEEDED if name not in dataset]
    if "PixelData" in missing:
        raise ValueError("no pixels")
    if missing:
        raise ValueError(f"no {', '.join(missing)} in the header")
    syntax = _value(dataset.file_meta, "TransferSyntaxUID")
    if not isinstance(syntax, str) or not syntax:
        raise ValueError("no transfer syntax in the header, so the pixels cannot be read")
    if not _can_decode(syntax):
        raise ValueError(f"transfer syntax {UID(syntax).name} is not supported")
    return dataset


def _parse(data: bytes, **options: Any) -> Any:
    import pydicom

    if _DEFLATED in data:  # pydicom would inflate it whole, whatever its size
        raise ValueError("deflated DICOM is not supported")
    try:
        return pydicom.dcmread(io.BytesIO(data), **options)
    except RecursionError:
        raise ValueError("sequences nested too deep") from None
    except Exception:  # pydicom raises many kinds for damaged files
        raise ValueError("damaged or not DICOM") from None


def _can_decode(syntax: str) -> bool:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        return bool(get_decoder(syntax).is_available)
    except (NotImplementedError, ValueError):
        return False


def check_header(dataset: Any, max_pixels: int, max_total_pixels: float = math.inf) -> None:
    """Refuse a dataset that is over the caps, before any of its pixels are decoded.

    Args:
        dataset: as `parse_dicom` returns it.
        max_pixels: of one frame.
        max_total_pixels: of all frames together.

    Raises:
        ValueError: for something over the caps, and for numbers and names that are none.
    """
    for name in _NUMBERS:
        _number(dataset, name)
    if not isinstance(_value(dataset, "PhotometricInterpretation"), str):
        raise ValueError("PhotometricInterpretation is not one name")
    rows, columns = _number(dataset, "Rows"), _number(dataset, "Columns")
    count = num_frames(dataset)
    if not 0 < rows * columns <= max_pixels:
        raise ValueError(f"{columns} x {rows} pixels, at most {max_pixels} are let in")
    if not 1 <= count <= MAX_CINE_FRAMES:
        raise ValueError(f"{count} frames, at most {MAX_CINE_FRAMES} are let in")
    if count * rows * columns > max_total_pixels:
        raise ValueError(
            f"{count} frames of {columns} x {rows} pixels, at most {max_total_pixels:.0f} pixels "
            "are let in together"
        )
    for width, height in _coded_sizes(dataset, count):
        if (width, height) != (columns, rows):
            raise ValueError(f"a frame of {width} x {height} in a file of {columns} x {rows}")


def num_frames(dataset: Any) -> int:
    """Return the number of frames that a dataset states, 1 where it states none.

    Raises:
        ValueError: when it is no number.
    """
    return _number(dataset, "NumberOfFrames") if _value(dataset, "NumberOfFrames") else 1


def _number(dataset: Any, name: str) -> int:
    try:
        return int(_value(dataset, name))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is not one number") from None


def _value(dataset: Any, name: str) -> Any:
    try:
        return dataset.get(name)
    except RecursionError:
        raise ValueError("sequences nested too deep") from None
    except Exception:  # a value is converted when it is asked for; many kinds again
        raise ValueError(f"{name} cannot be read") from None


def _coded_sizes(dataset: Any, count: int) -> Iterator[tuple[int, int]]:
    """Yield (width, height) from the header of each JPEG or JPEG 2000 frame."""
    import libjpeg.utils
    import openjpeg.utils
    from pydicom import uid
    from pydicom.encaps import generate_frames

    read_header: Callable[[bytes], Mapping[str, Any]]
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in uid.JPEG2000TransferSyntaxes:
        read_header = openjpeg.utils.get_parameters
    elif syntax in (*uid.JPEGTransferSyntaxes, *uid.JPEGLSTransferSyntaxes):
        read_header = libjpeg.utils.get_parameters
    else:
        return
    try:
        for frame in generate_frames(dataset.PixelData, number_of_frames=count):
            header = read_header(frame)
            yield int(header["columns"]), int(header["rows"])
    except Exception:  # the codecs raise many kinds for damaged data
        raise ValueError("damaged pixel data") from None


def find_regions(dataset: Any) -> list[Box]:
    """Return the boxes of the tissue and colour regions of a dataset, from the top down.

    A region that lies mostly inside a larger one (a colour box, say) is left out.

    Raises:
        ValueError: when there is none, or one does not fit the image and so none can be trusted.
    """
    width, height = _number(dataset, "Columns"), _number(dataset, "Rows")
    items = _value(dataset, "SequenceOfUltrasoundRegions") or ()
    if not all(hasattr(item, "walk") for item in items):
        raise ValueError("SequenceOfUltrasoundRegions is no sequence")
    boxes = [_region_box(item, width, height) for item in items if _is_tissue(item)]
    if not boxes:
        raise ValueError("no ultrasound region says where the tissue is")
    boxes.sort(key=lambda box: -area(box))
    apart: list[Box] = []
    for box in boxes:
        if all(area(common(box, other)) <= area(box) / 2 for other in apart):
            apart.append(box)
    return sorted(apart, key=lambda box: (box[1], box[0]))


def _is_tissue(item: Any) -> bool:
    kind, space = _value(item, "RegionDataType"), _value(item, "RegionSpatialFormat")
    return kind in _TISSUE_OR_COLOUR and space == _SPATIAL_2D


def _region_box(item: Any, width: int, height: int) -> Box:
    try:
        x0, y0, x1, y1 = (_number(item, f"RegionLocation{corner}") for corner in _CORNERS)
    except ValueError:
        raise ValueError("an ultrasound region without a location") from None
    shown = f"region ({x0}, {y0}) to ({x1}, {y1})"
    # Corners are inclusive, yet real machines write the width itself: one pixel is forgiven.
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"{shown} does not fit the image of {width} x {height}")
    box = (x0, y0, min(x1 + 1, width), min(y1 + 1, height))
    share = area(box) / (width * height)
    if not 0.1 <= share <= 0.98:
        raise ValueError(f"{shown} covers {share:.0%} of the image; 10% to 98% can be trusted")
    return box


def decode_frames(dataset: Any, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """Yield whole frames of a dataset one at a time, as (H, W) grey or (H, W, 3) RGB, 8 bits.

    Raises:
        ValueError: for damaged pixel data.
    """
    from pydicom.pixels.utils import iter_pixels

    try:
        for pixels in iter_pixels(dataset, indices=list(indices)):
            yield _to_8_bits(pixels, dataset)
    except Exception:  # decoders raise many kinds for damaged data
        raise ValueError("damaged pixel data") from None


def _to_8_bits(pixels: NDArray[Any], dataset: Any) -> NDArray[np.uint8]:
    from pydicom.pixels.processing import apply_color_lut, apply_rescale, apply_windowing

    kind, bits = dataset.PhotometricInterpretation, int(dataset.BitsStored)
    if kind == "PALETTE COLOR":
        colours: NDArray[Any] = apply_color_lut(pixels, dataset)
        # 16-bit tables are scaled down; some files hold 8-bit values in 16-bit tables.
        return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
    if not kind.startswith("MONOCHROME"):
        return (pixels >> max(0, bits - 8)).astype(np.uint8)
    low, high = 0.0, 2.0**bits - 1
    if int(dataset.get("PixelRepresentation") or 0):
        low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    slope = float(dataset.get("RescaleSlope", 1))
    intercept = float(dataset.get("RescaleIntercept", 0))
    values: NDArray[Any] = apply_rescale(pixels, dataset)
    if "WindowWidth" in dataset:
        values = apply_windowing(values, dataset)  # keeps the range that rescaling gave
    share = (values.astype(np.float32) - low * slope - intercept) / ((high - low) * slope)
    grey = np.clip(share, 0, 1) * 255
    shown: NDArray[np.float32] = 255 - grey if kind == "MONOCHROME1" else grey
    return shown.round().astype(np.uint8)


def is_lossy(dataset: Any) -> bool:
    """Return whether the frames of a dataset were compressed with loss, now or before."""
    from pydicom import uid

    lossless = {
        uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless,
        uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.RLELossless,
    }  # fmt: skip
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax not in lossless:
        return True
    return str(dataset.get("LossyImageCompression", "00")) == "01"
