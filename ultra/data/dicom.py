"""Frames out of DICOM files: decoded, cropped to ultrasound regions, shown to be free of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultra.data.dicom_file import (
    check_header,
    decode_frames,
    find_regions,
    is_lossy,
    no_warnings,
    num_frames,
    parse_dicom,
)
from ultra.data.frames import Box, drop_duplicates, encode_frame, sample_evenly, thumbnail
from ultra.data.ocr import Reader
from ultra.data.overlay import (
    Overlay,
    check_frame,
    find_cine_overlay,
    find_still_overlay,
    mask,
    show,
)

MIN_CINE_FRAMES = 8
"""Distinct frames that prove what moves and what is overlay; fewer are judged as stills."""


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
    """One region and what a first pass over its frames found; a still has no overlay yet."""

    region: Box
    chosen: tuple[int, ...] = ()
    num_duplicates: int = 0
    overlay: Overlay | None = None

    def crop(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        left, top, right, bottom = self.region
        return np.ascontiguousarray(pixels[top:bottom, left:right])


def is_dicom(data: bytes) -> bool:
    """Return whether data begins as a DICOM file does."""
    return data[128:132] == b"DICM"


@no_warnings()
def read_dicom(
    data: bytes,
    source: str,
    *,
    max_pixels: int,
    max_frames: int,
    duplicate_threshold: float,
    max_total_pixels: float = math.inf,
    reader: Reader | None = None,
) -> DicomFrames:
    """Return the frames of an ultrasound file that are shown to carry no identity.

    Every frame is cropped to a tissue or colour region of the file; two panes give two frames.
    The text that stands over the tissue is masked to black: in a cine what stands still while the
    tissue moves, and with a reader what it reads, in stills as well. A still that holds anything
    like text is refused without one. `BurnedInAnnotation` is never trusted.

    Args:
        data: the file.
        source: its name, for `frame_sources`.
        max_pixels: of one whole frame, checked before decoding.
        max_frames: kept of each pane, evenly sampled.
        duplicate_threshold: as `drop_duplicates`.
        max_total_pixels: of all whole frames together, which bounds the time this takes.
        reader: as `ocr.open_reader` gives it.

    Raises:
        ValueError: when the file cannot be decoded, or a frame cannot be shown to be clean; the
            message says why.
    """
    dataset = parse_dicom(data)
    check_header(dataset, max_pixels, max_total_pixels)
    panes = [_Pane(region) for region in find_regions(dataset)]
    panes = _survey(dataset, panes, max_frames, duplicate_threshold, reader)
    return _extract(dataset, panes, source, reader)


def _survey(
    dataset: Any, panes: Sequence[_Pane], max_frames: int, threshold: float, reader: Reader | None
) -> list[_Pane]:
    """Return the panes with the frames to keep and a cine's overlay, from one pass."""
    thumbnails: list[list[NDArray[np.float32]]] = [[] for _ in panes]
    sums: list[Any] = [0.0] * len(panes)
    for pixels in decode_frames(dataset, range(num_frames(dataset))):
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
            mean = (total / len(thumbs)).round().astype(np.uint8)
            pane = replace(pane, overlay=find_cine_overlay(mean, reader))
        surveyed.append(pane)
    return surveyed


def _extract(
    dataset: Any, panes: Sequence[_Pane], source: str, reader: Reader | None
) -> DicomFrames:
    """Return the chosen frames, masked, checked once more and encoded, from a second pass."""
    lossy = is_lossy(dataset)
    wanted = sorted({index for pane in panes for index in pane.chosen})
    frames, sizes, sources, evidence = [], [], [], []
    for index, pixels in zip(wanted, decode_frames(dataset, wanted), strict=True):
        for pane in panes:
            if index not in pane.chosen:
                continue
            try:
                crop, shown = _clean(pane, pixels, reader)
            except ValueError as error:
                raise ValueError(f"frame {index}, region {show(pane.region)}: {error}") from None
            at = f"@{pane.region[0]},{pane.region[1]}" if len(panes) > 1 else ""
            frames.append(encode_frame(crop, lossy=lossy))
            sizes.append((crop.shape[1], crop.shape[0]))
            sources.append(f"{source}#{index}{at}")
            evidence.append(f"cropped to {show(pane.region)}; {shown}")
    num_duplicates = sum(pane.num_duplicates for pane in panes)
    return DicomFrames(tuple(frames), tuple(sizes), tuple(sources), tuple(evidence), num_duplicates)


def _clean(
    pane: _Pane, pixels: NDArray[np.uint8], reader: Reader | None
) -> tuple[NDArray[np.uint8], str]:
    """Return a pane's part of a frame, its overlay masked, and what shows that none is left."""
    crop = pane.crop(pixels)
    overlay = pane.overlay or find_still_overlay(crop, reader)
    crop = mask(crop, overlay.boxes)
    if pane.overlay:
        check_frame(crop, reader)
    return crop, overlay.evidence
