"""Small videos for tests to read."""

from __future__ import annotations

import io

import av
import numpy as np
from numpy.typing import NDArray

KINDS = {
    "mp4": ("mp4", "libx264", "yuv420p"),
    "avi": ("avi", "mjpeg", "yuvj420p"),
    "lossless.avi": ("avi", "ffv1", "bgr0"),
    "gif": ("gif", "gif", "rgb8"),
}
"""Container, codec and pixels, by the ending of a name."""


def blocks(seed: int, size: tuple[int, int] = (64, 48)) -> NDArray[np.uint8]:
    """An RGB picture in blocks of eight pixels that no other seed gives, in colours GIF has."""
    rng = np.random.default_rng(seed)
    cells = 255 * rng.integers(0, 2, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return np.kron(cells, np.ones((8, 8, 1), dtype=np.uint8))


def film(kind: str, seeds: list[int], size: tuple[int, int] = (64, 48)) -> bytes:
    """A video of one picture for each seed."""
    container_name, codec, pixels = KINDS[kind]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container_name) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        for seed in seeds:
            frame = av.VideoFrame.from_ndarray(blocks(seed, size), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
