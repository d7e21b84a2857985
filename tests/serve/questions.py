"""What the tests of the endpoint ask, and of whom."""

from __future__ import annotations

import base64
import gc
import io
import shutil
from pathlib import Path
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


def without(checkpoint: str, backbones: Path, names: list[str], folder: Path) -> str:
    """A copy of a checkpoint whose base weights of these names are nowhere."""
    shutil.copytree(checkpoint, folder)
    config = folder / "config.yaml"
    text = config.read_text()
    for name in names:
        text = text.replace(str(backbones / name), f"/missing/{name}")
    config.write_text(text)
    return str(folder)


def count_modules(kind: type) -> int:
    gc.collect()
    return sum(isinstance(o, kind) for o in gc.get_objects())
