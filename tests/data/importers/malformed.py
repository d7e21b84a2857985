"""What may be wrong with a set: a table of damaged files, bad paths and bad rows, with the reasons.

Everything random comes from one seed, so the table is the same in every run.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.exam_folders import picture
from tests.data.test_dicom import REGION, dicom_bytes, region, tissue
from tests.data.test_frames import png_header
from tests.data.videos import film

MAX_BYTES = 2**20
"""Of one file that is no cine, in these tests."""

_RNG = np.random.default_rng(20260105)
_JPEG, _PNG = picture(1, size=(256, 192)), picture(2, "PNG", (256, 192))
_FILMS = {kind: film(kind, list(range(6))) for kind in ("mp4", "avi", "gif")}
_STILL = dicom_bytes(tissue(1), region(*REGION))


def _cut(data: bytes, low: float, high: float) -> bytes:
    return data[: int(len(data) * _RNG.uniform(low, high))]


def _patched(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def _saved(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(_PNG)).save(buffer, kind, **options)
    return buffer.getvalue()


_SIZE_OF_JPEG = _JPEG.index(b"\xff\xc0") + 5
_IMAGE, _VIDEO, _DICOM = "unreadable image", "unreadable video", "unsafe or unreadable DICOM"
_CUT, _NOTHING = "damaged or cut short", "no JPEG or PNG that can be read"

FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", _IMAGE, _NOTHING),
    "text": (b"no image at all", _IMAGE, _NOTHING),
    "zeros": (bytes(4096), _IMAGE, _NOTHING),
    "noise": (_RNG.bytes(4096), _IMAGE, _NOTHING),
    "page": (b"<html><body>404</body></html>", _IMAGE, _NOTHING),
    "pointer": (b"version https://git-lfs\noid sha256:0\n", _IMAGE, _NOTHING),
    "jpeg-head": (_JPEG[:3], _IMAGE, _NOTHING),
    "jpeg-cut-early": (_cut(_JPEG, 0.5, 0.6), _IMAGE, _CUT),
    "jpeg-cut-late": (_cut(_JPEG, 0.8, 0.95), _IMAGE, _CUT),
    "jpeg-bomb": (_patched(_JPEG, _SIZE_OF_JPEG, b"\xff\xf0\xff\xf0"), _IMAGE, "more than the"),
    "png-cut-early": (_cut(_PNG, 0.3, 0.5), _IMAGE, _CUT),
    "png-cut-late": (_cut(_PNG, 0.7, 0.9), _IMAGE, _CUT),
    "png-bomb": (png_header(9000, 9000), _IMAGE, "9000 x 9000 pixels, at most 25000000"),
    "png-huge-bomb": (png_header(60_000, 60_000), _IMAGE, "more than the 25000000 pixels"),
    "png-endless": (png_header(2**31 - 1, 2**31 - 1), _IMAGE, "more than the 25000000 pixels"),
    "png-hollow": (png_header(400, 300), _IMAGE, _CUT),
    "png-animated": (
        _saved("PNG", save_all=True, append_images=[Image.new("L", (256, 192))]),
        _IMAGE,
        "several pictures in one file",
    ),
    "bmp": (_saved("BMP"), _IMAGE, _NOTHING),
    "tiff": (_saved("TIFF"), _IMAGE, _NOTHING),
    "webp": (_saved("WEBP"), _IMAGE, _NOTHING),
    "large": (_JPEG + bytes(MAX_BYTES), "over the caps", f"more than the {MAX_BYTES} bytes"),
    "mp4-cut": (_cut(_FILMS["mp4"], 0.4, 0.9), _VIDEO, _CUT),
    "mp4-head": (_FILMS["mp4"][:32], _VIDEO, _CUT),
    "avi-cut": (_cut(_FILMS["avi"], 0.4, 0.9), _VIDEO, _CUT),
    "avi-head": (_FILMS["avi"][:12], _VIDEO, _CUT),
    "gif-cut": (_cut(_FILMS["gif"], 0.4, 0.9), _VIDEO, _CUT),
    "gif-bomb": (
        _patched(_FILMS["gif"], 6, struct.pack("<HH", 65535, 65535)),
        _VIDEO,
        "65535 x 65535 pixels, at most 25000000",
    ),
    "gif-hollow": (_FILMS["gif"][:13] + b";", _VIDEO, _CUT),
    "dicom-cut": (_cut(_STILL, 0.5, 0.9), _DICOM, "damaged pixel data"),
    "dicom-head": (_STILL[:140], _DICOM, "no pixels"),
    "dicom-no-region": (dicom_bytes(tissue(1)), _DICOM, "no ultrasound region"),
    "dicom-lying-region": (
        dicom_bytes(tissue(1), region(0, 0, 9000, 9000)),
        _DICOM,
        "region (0, 0) to (9000, 9000) does not fit",
    ),
    "dicom-bomb": (
        dicom_bytes(tissue(1), region(*REGION), Rows=65535, Columns=65535),
        _DICOM,
        "65535 x 65535 pixels, at most 25000000 are let in",
    ),
}
"""Damaged files: content, kind of the reason, and how what follows the path in it begins."""


def write_images(folder: Path) -> None:
    """Write every damaged file, a good one, and links that lead nowhere or in a circle."""
    for name, (data, _, _) in FILES.items():
        folder.joinpath(f"{name}.png").write_bytes(data)
    folder.joinpath("good.png").write_bytes(_PNG)
    folder.joinpath("directory.png").mkdir()
    folder.joinpath("self.png").symlink_to("self.png")
    folder.joinpath("one.png").symlink_to("two.png")
    folder.joinpath("two.png").symlink_to("one.png")
    folder.joinpath("dangling.png").symlink_to("nowhere.png")
    folder.joinpath("loop").symlink_to(".")


PATHS: dict[str, tuple[str, str]] = {
    "missing": ("nowhere.png", "missing file: nowhere.png"),
    "self-link": ("self.png", "missing file: self.png"),
    "circle-of-links": ("one.png", "missing file: one.png"),
    "dangling-link": ("dangling.png", "missing file: dangling.png"),
    "endless-links": ("loop/" * 60 + "good.png", "missing file: loop/loop/"),
    "directory": ("directory.png", "unreadable file: directory.png"),
    "through-a-file": ("good.png/a.png", "missing file: good.png/a.png"),
    "parent": ("../good.png", "path outside the folder: '../good.png'"),
    "inner-parent": ("a/../../good.png", "path outside the folder"),
    "absolute": ("/etc/passwd.png", "path outside the folder: '/etc/passwd.png'"),
    "other-store": ("s3://bucket/good.png", "path outside the folder"),
    "web": ("http://localhost/good.png", "path outside the folder"),
    "drive": ("C:\\good.png", "path outside the folder"),
    "windows-parent": ("..\\good.png", "path outside the folder"),
    "long-name": ("肝" * 90 + ".png", "path of no file: '肝肝"),
    "long-path": ("a/" * 600 + "good.png", "path of no file: 'a/a/"),
    "nul": ("a\0.png", ""),
    "escape": ("\x1b[31m.png", ""),
}
"""Paths and their reasons; control characters are refused by the row or by its path."""

LINES: dict[str, tuple[bytes, str]] = {
    "cut": (b'{"id": "x', "malformed line: not JSON"),
    "single-quotes": (b"{'id': 1}", "malformed line: not JSON"),
    "two-objects": (b"{} {}", "malformed line: not JSON"),
    "deep-list": (b"[" * 100_000, "malformed line: not JSON"),
    "deep-object": (b'{"a":' * 100_000, "malformed line: not JSON"),
    "digits": (b'{"id": ' + b"9" * 5000 + b"}", "malformed line: not JSON"),
    "nul-bytes": (bytes(64), "malformed line: not JSON"),
    "gb18030": ('{"id": "肝脏"}'.encode("gb18030"), "malformed line: not utf-8 text"),
    "utf-16": ('{"id": "a"}'.encode("utf-16"), "malformed line: not utf-8 text"),
    "latin-1": ('{"id": "é"}'.encode("latin-1"), "malformed line: not utf-8 text"),
    "list": (b"[1]", "malformed line: not a JSON object"),
    "number": (b"7", "malformed line: not a JSON object"),
    "null": (b"null", "malformed line: not a JSON object"),
    "empty": (b"{}", "missing keys: "),
    "other-columns": (b'{"a": 1, "b": [2]}', "missing keys: "),
}
"""Lines of JSON lines that are no row."""

ITEMS: dict[str, tuple[bytes, str]] = {
    "list": (b"[1]", "malformed line: not a JSON object"),
    "number": (b"1e999", "malformed line: not a JSON object"),
    "null": (b"null", "malformed line: not a JSON object"),
    "text": (b'"\\u0000"', "malformed line: not a JSON object"),
    "deep-list": (b"[" * 5000 + b"]" * 5000, "malformed record: nested deeper than 64"),
    "deep-object": (
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "malformed record: nested deeper than 64",
    ),
    "empty": (b"{}", "missing keys: "),
    "other-columns": (b'{"a": 1, "b": [2]}', "missing keys: "),
}
"""Items of a JSON list that are no row."""

TABLE_ROWS: dict[str, tuple[bytes, str]] = {
    "too-few": (b"a,b", "malformed row: not as many columns as the header has"),
    "too-many": (b"," * 40, "malformed row: not as many columns as the header has"),
    "gb18030": ("肝脏".encode("gb18030"), "malformed row: not as many columns"),
    "loose-quote": (b'"a"b,c', "malformed row: ',' expected after '\"'"),
}
"""Lines of a CSV file that are no row."""

VALUES: dict[str, Any] = {
    "null": None,
    "list": [1],
    "object": {"a": {"b": 1}},
    "true": True,
    "infinite": float("inf"),
    "control": "a\0b",
}
"""What stands where a text belongs."""


def as_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).replace("Infinity", "1e999").encode()


Row = Callable[[str, str], dict[str, Any]]
"""Makes the good row of an exam's name and its image."""
