"""What the tests of the endpoint ask, and of whom."""

from __future__ import annotations

import base64
import gc
import io
import json
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


CANARIES = {name: f"canary-{name}-鸟-7f3a91c5" for name in ("system", "user", "answer")}
"""Texts of a question and its answer that occur nowhere else."""

CANARY_IMAGE = encode_image(20_261_125)


def find_canaries(text: str) -> list[str]:
    """The names of the canaries that a text holds: plain, escaped or in base64.

    Of an image any 36 bytes in a row are enough.
    """
    forms = {}
    for name, canary in CANARIES.items():
        escaped = json.dumps(canary)[1:-1]
        quoted = escaped.replace("\\", "\\\\")
        forms[name] = {canary, escaped, quoted, *_base64_forms(canary.encode())}
    # From anywhere in the file, but not of its head, which all images of this kind share.
    pieces = [CANARY_IMAGE[i : i + 24] for i in range(64, len(CANARY_IMAGE) - 24, 12)]
    forms["image"] = {f for p in pieces for f in (*_reprs(p), p.hex(), *_base64_forms(p))}
    return [name for name, texts in forms.items() if any(form in text for form in texts)]


def _base64_forms(data: bytes) -> list[str]:
    """What is the same in the base64 of anything that holds the data, wherever in it."""
    forms = []
    for before in range(3):
        whole = base64.b64encode(bytes(before) + data).decode()
        first = (before * 8 + 5) // 6  # characters that also hold bits of what stands before
        forms.append(whole[first : (before + len(data)) // 3 * 4])
    return forms


def _reprs(data: bytes) -> list[str]:
    """What Python writes for bytes: single quotes are escaped where there are double ones."""
    escaped = repr(data + b"'\"")[2:-4]
    return [escaped, escaped.replace("\\'", "'")]
