"""What the tests of the endpoint ask."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def encode_image(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, size[::-1], dtype=np.uint8)
    return encode_pixels(pixels, kind)


def encode_pixels(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


FRAMES = (encode_image(0), encode_image(1, kind="JPEG"), encode_image(2))


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def ask_user(text: str, *frames: bytes) -> dict[str, Any]:
    """A user message with frames, as OpenAI's clients write it."""
    urls = [f"data:image/any;base64,{base64.b64encode(f).decode()}" for f in frames]
    return {"role": "user", "content": [*map(image_part, urls), {"type": "text", "text": text}]}
