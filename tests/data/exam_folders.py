"""Exam folders for tests to read."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
from PIL import Image

from ultra import storage


def picture(seed: int, kind: str = "JPEG", size: tuple[int, int] = (48, 32)) -> bytes:
    """A frame that no other seed gives, in blocks so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (size[1] // 8, size[0] // 8), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((8, 8), dtype=np.uint8))).save(buffer, kind)
    return buffer.getvalue()


def exam_line(exam_id: str, paths: list[str], **changes: Any) -> dict[str, Any]:
    """A line of an index, every key there."""
    return {
        "exam_id": exam_id,
        "patient_id": f"patient of {exam_id}",
        "site": "肝脏",
        "findings": f"所见 {exam_id}",
        "diagnosis": "肝囊肿",
        "frames": paths,
        **changes,
    }


def write_folder(uri: Any, lines: list[dict[str, Any] | str], files: dict[str, bytes]) -> str:
    """Write an exam folder and return its address; a line is an object or raw text."""
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    storage.write_bytes(f"{uri}/exams.jsonl", "\n".join(texts).encode())
    for name, data in files.items():
        storage.write_bytes(f"{uri}/{name}", data)
    return str(uri)
