"""Frames as the pictures that encoders see."""

from __future__ import annotations

import io

from PIL import Image


def decode(frame: bytes) -> Image.Image:
    """Return a frame as an RGB image."""
    with Image.open(io.BytesIO(frame)) as image:
        return image.convert("RGB")
