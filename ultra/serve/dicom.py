"""DICOM files into frames that a question may hold, by the same path as `prepare`.

With `ultra[ocr]` installed letters are read and masked here too. The reader is loaded when the
first file comes, and takes 230 MB of each ingress.
"""

from __future__ import annotations

import base64
import threading
from typing import Any

from ultra.config import DataConfig
from ultra.data.dicom import is_dicom, read_dicom
from ultra.data.frames import is_jpeg, sample_evenly
from ultra.data.ocr import open_reader
from ultra.serve.limits import ApiError, Limits, too_busy

MAX_TOTAL_PIXELS = 500_000_000
"""Of a whole cine: 20 to 30 s of one core, which nobody can cancel."""


Found = tuple[bytes, str, str]
"""A frame, its source and what shows that it carries no identity."""

_opening = threading.Lock()


def open_dicom(data: bytes, limits: Limits) -> dict[str, Any]:
    """Return the frames of a file as data URLs, each with its source and what shows it clean.

    Raises:
        ApiError: as `read_frames`.
    """
    frames = [
        {"url": _data_url(frame), "source": source, "evidence": evidence}
        for frame, source, evidence in read_frames(data, limits)
    ]
    return {"object": "list", "data": frames}


def read_frames(data: bytes, limits: Limits) -> list[Found]:
    """Return the frames of a file, never more than a question may hold.

    Raises:
        ApiError: for what `prepare` would put into quarantine, with the same reason, and while
            another file is being read: it takes a core, and the other threads are for questions.
    """
    if not is_dicom(data):
        raise ApiError("not a DICOM file")
    if not _opening.acquire(blocking=False):
        raise too_busy()
    try:
        found = read_dicom(
            data,
            "",
            max_pixels=limits.max_image_pixels,
            max_frames=limits.max_frames,
            duplicate_threshold=DataConfig().duplicate_threshold,
            max_total_pixels=MAX_TOTAL_PIXELS,
            reader=open_reader("auto"),
        )
    except ValueError as error:
        raise ApiError(str(error), code="dicom_refused") from None
    finally:
        _opening.release()
    columns = list(zip(found.frames, found.frame_sources, found.evidence, strict=True))
    # Each pane has its share of frames, so two panes may come to twice as many.
    return [columns[i] for i in sample_evenly(len(columns), limits.max_frames)]


def _data_url(frame: bytes) -> str:
    kind = "jpeg" if is_jpeg(frame) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(frame).decode()}"
