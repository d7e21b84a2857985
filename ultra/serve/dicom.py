"""DICOM files into frames that a question may hold, by the same path as `prepare`."""

from __future__ import annotations

import base64
from typing import Any

from ultra.config import DataConfig
from ultra.data.dicom import is_dicom, read_dicom
from ultra.data.frames import is_jpeg, sample_evenly
from ultra.serve.api import ApiError, Limits

MAX_TOTAL_PIXELS = 500_000_000
"""Of a whole cine: 20 to 30 s of one core, which nobody can cancel."""


def open_dicom(data: bytes, limits: Limits) -> dict[str, Any]:
    """Return the frames of a file as data URLs, each with its source and what shows it clean.

    There are never more than a question may hold.

    Raises:
        ApiError: for what `prepare` would put into quarantine, with the same reason.
    """
    if not is_dicom(data):
        raise ApiError("not a DICOM file")
    try:
        found = read_dicom(
            data,
            "",
            max_pixels=limits.max_image_pixels,
            max_frames=limits.max_frames,
            duplicate_threshold=DataConfig().duplicate_threshold,
            max_total_pixels=MAX_TOTAL_PIXELS,
        )
    except ValueError as error:
        raise ApiError(str(error), code="dicom_refused") from None
    columns = list(zip(found.frames, found.frame_sources, found.evidence, strict=True))
    # Each pane has its share of frames, so two panes may come to twice as many.
    kept = [columns[i] for i in sample_evenly(len(columns), limits.max_frames)]
    frames = [
        {"url": _data_url(frame), "source": source, "evidence": evidence}
        for frame, source, evidence in kept
    ]
    return {"object": "list", "data": frames}


def _data_url(frame: bytes) -> str:
    kind = "jpeg" if is_jpeg(frame) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(frame).decode()}"
