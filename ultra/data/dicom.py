"""Frames out of DICOM files: decoded, cropped to ultrasound regions, shown to be free of text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultra.data.frames import (
    Box,
    drop_duplicates,
    encode_frame,
    find_text,
    sample_evenly,
    thumbnail,
)

MAX_CINE_FRAMES = 10_000

MIN_CINE_FRAMES = 8
"""Distinct frames that prove what moves and what is overlay; fewer are judged as stills."""

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_TISSUE_OR_COLOUR = (1, 2)
_SPATIAL_2D = 1
_STATIC_CONTRAST = 24
_MASK_MARGIN = 4
_MAX_MASKED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class DicomFrames:
    """What a DICOM file gave: encoded frames in time order and the evidence that each is clean.

    Attributes:
        frames: JPEG where the file was compressed with loss, PNG otherwise.
        frame_sizes: (width, height) of each frame in pixels.
        frame_sources: `name.dcm#12`, counted from 0; with several panes `name.dcm#12@336,24`, the
            pane's left and top.
        evidence: what shows that a frame carries no identity.
        num_duplicates: frames dropped because they repeat the one before.
    """

    frames: tuple[bytes, ...]
    frame_sizes: tuple[tuple[int, int], ...]
    frame_sources: tuple[str, ...]
    evidence: tuple[str, ...]
    num_duplicates: int


@dataclass(frozen=True, slots=True)
class _Pane:
    """One region and what a first pass over its frames found."""

    region: Box
    chosen: tuple[int, ...] = ()
    num_duplicates: int = 0
    overlay: tuple[Box, ...] = ()
    evidence: str = ""

    def crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        left, top, right, bottom = self.region
        return pixels[top:bottom, left:right]


def is_dicom(data: bytes) -> bool:
    """Return whether data begins as a DICOM file does."""
    return data[128:132] == b"DICM"


def read_dicom(
    data: bytes,
    source: str,
    *,
    max_pixels: int,
    max_frames: int,
    duplicate_threshold: float,
    max_total_pixels: float = math.inf,
) -> DicomFrames:
    """Return the frames of an ultrasound file that are shown to carry no identity.

    Every frame is cropped to a tissue or colour region of the file; two panes give two frames.
    A cine's overlay (text that stands still while the tissue moves) is masked to black. A still
    offers no motion to tell letters from tissue, and no letters are read here: anything in it
    that looks like text refuses the file. `BurnedInAnnotation` is never trusted.

    Args:
        data: the file.
        source: its name, for `frame_sources`.
        max_pixels: of one whole frame, checked before decoding.
        max_frames: kept of each pane, evenly sampled.
        duplicate_threshold: as `drop_duplicates`.
        max_total_pixels: of all whole frames together, which bounds the time this takes.

    Raises:
        ValueError: when the file cannot be decoded, or a frame cannot be shown to be clean; the
            message says why.
    """
    dataset = _parse(data)
    try:
        _check_size(dataset, max_pixels, max_total_pixels)
        panes = [_Pane(region) for region in find_regions(dataset)]
    except (TypeError, AttributeError, OverflowError):  # two values where one belongs, and such
        raise ValueError("a header that makes no sense") from None
    panes = _survey(dataset, panes, max_frames, duplicate_threshold)
    return _extract(dataset, panes, source)


def find_regions(dataset: Any) -> list[Box]:
    """Return the boxes of the tissue and colour regions of a dataset, largest first.

    A region that lies mostly inside a larger one (a colour box, say) is left out.

    Raises:
        ValueError: when there is none, or one does not fit the image and so none can be trusted.
    """
    width, height = int(dataset.Columns), int(dataset.Rows)
    boxes: list[Box] = []
    for item in dataset.get("SequenceOfUltrasoundRegions") or []:
        if (
            item.get("RegionDataType") in _TISSUE_OR_COLOUR
            and item.get("RegionSpatialFormat") == _SPATIAL_2D
        ):
            boxes.append(_region_box(item, width, height))
    if not boxes:
        raise ValueError("no ultrasound region says where the tissue is")
    boxes.sort(key=lambda box: -_area(box))
    apart: list[Box] = []
    for box in boxes:
        if all(_area(_common(box, other)) <= _area(box) / 2 for other in apart):
            apart.append(box)
    return sorted(apart, key=lambda box: (box[1], box[0]))


def _region_box(item: Any, width: int, height: int) -> Box:
    try:
        x0, y0 = int(item.RegionLocationMinX0), int(item.RegionLocationMinY0)
        x1, y1 = int(item.RegionLocationMaxX1), int(item.RegionLocationMaxY1)
    except (AttributeError, TypeError, ValueError):
        raise ValueError("an ultrasound region without a location") from None
    shown = f"region ({x0}, {y0}) to ({x1}, {y1})"
    # Corners are inclusive, yet real machines write the width itself: one pixel is forgiven.
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise ValueError(f"{shown} does not fit the image of {width} x {height}")
    box = (x0, y0, min(x1 + 1, width), min(y1 + 1, height))
    share = _area(box) / (width * height)
    if not 0.1 <= share <= 0.98:
        raise ValueError(f"{shown} covers {share:.0%} of the image; 10% to 98% can be trusted")
    return box


def _area(box: Box) -> int:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def _common(a: Box, b: Box) -> Box:
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _parse(data: bytes) -> Any:
    import pydicom
    from pydicom.pixels.decoders.base import get_decoder

    if _DEFLATED in data[:4096]:  # pydicom would inflate it whole, whatever its size
        raise ValueError("deflated DICOM is not supported")
    try:
        dataset = pydicom.dcmread(io.BytesIO(data))
        complete = all(key in dataset for key in ("PixelData", "Rows", "Columns"))
        syntax = dataset.file_meta.TransferSyntaxUID
    except Exception:  # pydicom raises many kinds for damaged files
        raise ValueError("damaged or not DICOM") from None
    if not complete:
        raise ValueError("no pixels")
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise ValueError(f"transfer syntax {syntax.name} is not supported")
    return dataset


def _check_size(dataset: Any, max_pixels: int, max_total_pixels: float) -> None:
    rows, columns, count = int(dataset.Rows), int(dataset.Columns), _num_frames(dataset)
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


def _num_frames(dataset: Any) -> int:
    try:
        return int(dataset.get("NumberOfFrames") or 1)
    except ValueError:
        raise ValueError("a number of frames that is none") from None


def _survey(dataset: Any, panes: Sequence[_Pane], max_frames: int, threshold: float) -> list[_Pane]:
    """Return the panes with the frames to keep and the overlay to mask, from one pass."""
    thumbnails: list[list[NDArray[np.float32]]] = [[] for _ in panes]
    sums: list[Any] = [0.0] * len(panes)
    for pixels in decode_frames(dataset, range(_num_frames(dataset))):
        for index, pane in enumerate(panes):
            crop = pane.crop(pixels)
            thumbnails[index].append(thumbnail(crop))
            sums[index] = sums[index] + crop.astype(np.float32)
    surveyed = []
    for pane, thumbs, total in zip(panes, thumbnails, sums, strict=True):
        distinct = drop_duplicates(thumbs, threshold)
        chosen = tuple(distinct[i] for i in sample_evenly(len(distinct), max_frames))
        pane = replace(pane, chosen=chosen, num_duplicates=len(thumbs) - len(distinct))
        if len(distinct) >= MIN_CINE_FRAMES:
            pane = _with_overlay(pane, (total / len(thumbs)).round().astype(np.uint8))
        else:
            pane = replace(pane, evidence=f"{_shown(pane.region)}; no text-like shape in the still")
        surveyed.append(pane)
    return surveyed


def _with_overlay(pane: _Pane, mean: NDArray[np.uint8]) -> _Pane:
    """Return a cine's pane with the static text that the mean of all its frames shows.

    Over time moving tissue blurs and an overlay does not, so fainter letters are found here.
    """
    height, width = mean.shape[:2]
    overlay = tuple(
        _common(_grown(box), (0, 0, width, height)) for box in find_text(mean, _STATIC_CONTRAST)
    )
    masked = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in overlay:
        masked[top:bottom, left:right] = True
    if masked.mean() > _MAX_MASKED_SHARE:
        raise ValueError(
            f"static text covers {masked.mean():.0%} of the region; up to {_MAX_MASKED_SHARE:.0%} "
            "is masked"
        )
    found = ", ".join(_shown(box) for box in overlay)
    evidence = f"{_shown(pane.region)}; static check over time" + (
        f", masked {found} of the crop" if overlay else ""
    )
    return replace(pane, overlay=overlay, evidence=evidence)


def _grown(box: Box) -> Box:
    # Sideways by a letter's height: what stands beside static letters may change, as a clock does.
    margin = max(_MASK_MARGIN, box[3] - box[1])
    return box[0] - margin, box[1] - _MASK_MARGIN, box[2] + margin, box[3] + _MASK_MARGIN


def _shown(box: Box) -> str:
    return f"({box[0]}, {box[1]}) to ({box[2] - 1}, {box[3] - 1})"


def _extract(dataset: Any, panes: Sequence[_Pane], source: str) -> DicomFrames:
    """Return the chosen frames, masked, checked once more and encoded, from a second pass."""
    lossy = _is_lossy(dataset)
    wanted = sorted({index for pane in panes for index in pane.chosen})
    frames, sizes, sources, evidence = [], [], [], []
    for index, pixels in zip(wanted, decode_frames(dataset, wanted), strict=True):
        for pane in panes:
            if index not in pane.chosen:
                continue
            crop = pane.crop(pixels).copy()
            for left, top, right, bottom in pane.overlay:
                crop[top:bottom, left:right] = 0
            _refuse_text(crop, pane, index)
            at = f"@{pane.region[0]},{pane.region[1]}" if len(panes) > 1 else ""
            frames.append(encode_frame(np.ascontiguousarray(crop), lossy=lossy))
            sizes.append((crop.shape[1], crop.shape[0]))
            sources.append(f"{source}#{index}{at}")
            evidence.append(f"cropped to {pane.evidence}")
    num_duplicates = sum(pane.num_duplicates for pane in panes)
    return DicomFrames(tuple(frames), tuple(sizes), tuple(sources), tuple(evidence), num_duplicates)


def _refuse_text(crop: NDArray[np.uint8], pane: _Pane, index: int) -> None:
    boxes = find_text(crop)
    if boxes:
        raise ValueError(
            f"frame {index}: something like text at {_shown(boxes[0])} of region "
            f"{_shown(pane.region)}; no text is read here, so it cannot be shown to be harmless"
        )


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


def _is_lossy(dataset: Any) -> bool:
    from pydicom import uid

    lossless = {
        uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000Lossless,
        uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.RLELossless,
    }  # fmt: skip
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax not in lossless:
        return True
    return str(dataset.get("LossyImageCompression", "00")) == "01"
