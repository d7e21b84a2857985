"""Frames out of video files: mp4, avi and gif, told by their content."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ultra.data.frames import drop_duplicates, encode_frame, sample_evenly, thumbnail

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".gif")

MAX_VIDEO_FRAMES = 10_000

MAX_VIDEO_PIXELS = 2**33
"""Of all frames together, which bounds the time a file takes: 4,000 frames of 1920 x 1080."""

_UNKNOWN_SIZE = 2**32 - 1


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """What a video gave: encoded frames in time order.

    Attributes:
        frames: JPEG where the video was compressed with loss, PNG otherwise.
        frame_sizes: (width, height) of each frame in pixels.
        frame_sources: `name#12`, counted from 0.
        num_duplicates: frames dropped because they repeat the one before.
    """

    frames: tuple[bytes, ...]
    frame_sizes: tuple[tuple[int, int], ...]
    frame_sources: tuple[str, ...]
    num_duplicates: int


def video_kind(data: bytes) -> str:
    """Return mp4, avi or gif for data that begins as such a file does, else an empty text."""
    if data[4:8] == b"ftyp":
        return "mp4"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    return "gif" if data[:6] in (b"GIF87a", b"GIF89a") else ""


def read_video(
    data: bytes,
    source: str,
    *,
    max_pixels: int,
    max_frames: int,
    duplicate_threshold: float,
) -> VideoFrames:
    """Return the frames of a video that do not repeat the one before, evenly sampled.

    It is decoded twice, one frame at a time: to learn which frames differ, then to keep some.
    Sound, and which way is up, are left aside. Nothing shows that such frames carry no identity.

    Args:
        data: the file.
        source: its name, for `frame_sources`.
        max_pixels: of one frame, checked before decoding.
        max_frames: kept.
        duplicate_threshold: as `drop_duplicates`.

    Raises:
        ValueError: when it cannot be decoded whole, or is over the caps.
    """
    count = 0

    def thumbnails() -> Iterator[NDArray[np.float32]]:
        nonlocal count
        for pixels, _ in _decode(data, max_pixels):
            count += 1
            yield thumbnail(pixels)

    distinct = drop_duplicates(thumbnails(), duplicate_threshold)
    if not distinct:
        raise ValueError("no frames")
    chosen = [distinct[i] for i in sample_evenly(len(distinct), max_frames)]
    frames, sizes, sources = [], [], []
    for index, (pixels, lossy) in enumerate(_decode(data, max_pixels)):
        if index in chosen:
            frames.append(encode_frame(pixels, lossy=lossy))
            sizes.append((pixels.shape[1], pixels.shape[0]))
            sources.append(f"{source}#{index}")
        if index == chosen[-1]:
            break
    return VideoFrames(tuple(frames), tuple(sizes), tuple(sources), count - len(distinct))


def _decode(data: bytes, max_pixels: int) -> Iterator[tuple[NDArray[np.uint8], bool]]:
    """Yield the frames one at a time, as (H, W) grey or (H, W, 3) RGB, and whether with loss."""
    total = 0
    with _open(data, max_pixels) as (container, stream):
        lossy = bool(stream.codec_context.codec.lossy)
        frames = container.decode(stream)
        for count in range(1, MAX_VIDEO_FRAMES + 2):
            try:
                frame = next(frames, None)
                if frame is None:
                    return
                _check_size(frame.width, frame.height, max_pixels)
                grey = frame.format.name.startswith("gray")
                pixels = frame.to_ndarray(format="gray" if grey else "rgb24")
            except _OverCaps:
                raise
            except Exception:  # FFmpeg's errors are of many kinds
                raise ValueError("damaged or cut short") from None
            total += frame.width * frame.height
            if count > MAX_VIDEO_FRAMES:
                raise ValueError(f"more than the {MAX_VIDEO_FRAMES} frames that are let in")
            if total > MAX_VIDEO_PIXELS:
                raise ValueError(
                    f"more than the {MAX_VIDEO_PIXELS} pixels that are let in together"
                )
            yield pixels, lossy


class _OverCaps(ValueError):
    pass


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if not 0 < width * height <= max_pixels:
        raise _OverCaps(f"{width} x {height} pixels, at most {max_pixels} are let in")


@contextmanager
def _open(data: bytes, max_pixels: int) -> Iterator[tuple[Any, Any]]:
    """Yield the container and its pictures; what the header says is checked before."""
    import av

    kind = video_kind(data)
    if _is_cut(data, kind):
        raise ValueError("damaged or cut short")
    if kind == "gif":  # FFmpeg calls a size it does not take 0 x 0
        width, height = (int.from_bytes(data[i : i + 2], "little") for i in (6, 8))
        _check_size(width, height, max_pixels)
    try:
        # By name: else a file might pass for a list of other files to open.
        container = av.open(io.BytesIO(data), format=kind)
    except Exception:
        raise ValueError("damaged or cut short") from None
    with container:
        if not container.streams.video:
            raise ValueError("no pictures in it")
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None:
            raise ValueError("a codec that is not supported")
        _check_size(context.width, context.height, max_pixels)
        context.thread_count = 1  # Ray gives a task one CPU
        context.options = {"max_pixels": str(max_pixels)}
        yield container, stream


def _is_cut(data: bytes, kind: str) -> bool:
    """Return whether a file ends before its own end, which FFmpeg may not mind."""
    if kind == "gif":
        return not data.rstrip(b"\0").endswith(b";")
    if kind == "avi":
        size = int.from_bytes(data[4:8], "little")
        return size != _UNKNOWN_SIZE and size + 8 > len(data)
    place, size = 0, 8
    while place < len(data) and size >= 8:  # a box of size 0 reaches to the end
        size = int.from_bytes(data[place : place + 4], "big")
        if size == 1:
            size = int.from_bytes(data[place + 8 : place + 16], "big")
        place += size
    return place > len(data)
