"""The images of a question, whatever they come as, into the frames that the encoder reads."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ultra.config import DataConfig
from ultra.data.dicom import is_dicom
from ultra.data.frames import decode_frame, drop_duplicates, encode_frame, is_jpeg, thumbnail
from ultra.serve.dicom import read_frames
from ultra.serve.fetch import Fetcher
from ultra.serve.limits import ApiError, Limits
from ultra.serve.security import decode_data_url

FORMATS = ("JPEG", "PNG", "WEBP")


def open_images(urls: Sequence[str], limits: Limits) -> tuple[tuple[bytes, ...], int]:
    """Return the frames of a group, and how many of them nearly repeat the one kept before.

    What an image is, its content alone says: JPEG, PNG, WebP, or DICOM, whose frames are cropped
    and checked as `prepare` does it. The frames are JPEG or PNG.

    Raises:
        ApiError: for the first image that cannot be used, or too many or too few frames.
    """
    if not 1 <= len(urls) <= limits.max_frames:
        raise ApiError(
            f"{len(urls)} images; a question is about 1 to {limits.max_frames} frames of one exam",
            param="messages",
        )
    fetcher = Fetcher(limits.allowed_image_hosts, limits.allowed_image_networks)
    frames: list[bytes] = []
    thumbnails = []
    for number, url in enumerate(urls, 1):
        try:
            for frame, pixels in _open(url, limits, fetcher):
                frames.append(frame)
                thumbnails.append(thumbnail(pixels))
        except ValueError as error:
            if isinstance(error, ApiError) and error.status != 400:
                raise
            code = getattr(error, "code", None)
            raise ApiError(f"image {number}: {error}", param="messages", code=code) from None
    if len(frames) > limits.max_frames:
        raise ApiError(
            f"{len(frames)} frames with those of the DICOM files, at most {limits.max_frames}",
            param="messages",
        )
    distinct = drop_duplicates(thumbnails, DataConfig().duplicate_threshold)
    return tuple(frames), len(frames) - len(distinct)


def _open(url: str, limits: Limits, fetcher: Fetcher) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
    max_bytes = limits.max_image_mib * 2**20
    if limits.allowed_image_hosts and url[:5].lower() != "data:":
        data = fetcher.fetch(url, max_bytes)
    elif is_dicom(_beginning(url)):
        data = decode_data_url(url, limits.max_dicom_mib * 2**20)
    else:
        data = decode_data_url(url, max_bytes)
    if is_dicom(data):
        for frame, _, _ in read_frames(data, limits):
            pixels = decode_frame(frame, max_bytes=len(frame), max_pixels=limits.max_image_pixels)
            yield frame, pixels
        return
    pixels = decode_frame(
        data, max_bytes=max_bytes, max_pixels=limits.max_image_pixels, formats=FORMATS
    )
    yield (data if _is_plain(data) else encode_frame(pixels, lossy=False)), pixels


def _beginning(url: str) -> bytes:
    """Return the first bytes of a data URL, as far as they can be decoded."""
    head = url.partition(",")[2][:240]
    try:
        return base64.b64decode(head[: len(head) // 4 * 4])
    except ValueError:
        return b""


def _is_plain(data: bytes) -> bool:
    """Return whether the encoder, which turns nothing upright, reads these bytes as they are."""
    is_known = is_jpeg(data) or data[:8] == b"\x89PNG\r\n\x1a\n"
    return is_known and not re.search(rb"Exif\0|eXIf", data)
