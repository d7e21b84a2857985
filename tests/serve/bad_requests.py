"""Requests that nobody should send, by families; each is refused in its own way."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tests.serve.questions import FRAMES, ask_user, encode_image, image_part
from tests.serve.test_dicom import real

CHAT = "/v1/chat/completions"
LIMITS = {
    "max_frames": 3, "max_image_mib": 1, "max_image_pixels": 10_000, "max_dicom_mib": 1,
    "body_timeout_s": 1,
}  # fmt: skip
KEY = "a-key"
GOOD = {"model": "ultra", "messages": [ask_user("见囊肿？", FRAMES[0])]}
TEXT = json.dumps(GOOD)


@dataclass(frozen=True)
class Bad:
    """A request, and how it is refused.

    Attributes:
        param: the field that is to blame, or the beginning of its path; None where none is.
    """

    name: str
    body: bytes = b""
    param: str | None = None
    status: int = 400
    method: str = "POST"
    path: str = CHAT
    headers: tuple[tuple[str, str], ...] = field(default=(("Authorization", f"Bearer {KEY}"),))


def bad_requests(store: str) -> list[Bad]:
    """All of them; `store` is the address of a server that images may be read from."""
    return [
        *_broken_json(), *_wrong_types(), *_wrong_numbers(), *_wrong_messages(), *_wrong_images(),
        *_wrong_urls(store), *_wrong_http(),
    ]  # fmt: skip


def _ask(name: str, param: str | None, **fields: Any) -> Bad:
    return Bad(name, json.dumps({**GOOD, **fields}).encode(), param)


def _ask_about(name: str, data: bytes) -> Bad:
    return _ask(name, "messages", messages=[ask_user("a", data)])


def _with(value: str, name: str = "user") -> bytes:
    """A good question with one more field, of any text as its value."""
    return f'{TEXT[:-1]}, "{name}": {value}}}'.encode()


def _broken_json() -> Iterator[Bad]:
    for cut in range(1, len(TEXT), len(TEXT) // 25):
        yield Bad(f"JSON cut at {cut}", TEXT[:cut].encode())
    values = {
        "nothing": b"", "space": b" \n", "null": b"null", "a number": b"1", "a string": b'"x"',
        "a list": b"[]", "true": b"true", "NaN": b"NaN", "two values": TEXT.encode() * 2,
        "a tail": TEXT.encode() + b"x", "a byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
        "UTF-16": TEXT.encode("utf-16"), "UTF-32": TEXT.encode("utf-32"), "zeros": bytes(100),
        "single quotes": TEXT.replace('"', "'").encode(), "a form": b"model=ultra&messages=x",
        "no comma": TEXT.replace(", ", " ").encode(), "no colon": TEXT.replace(": ", " ").encode(),
        "a comma too many": TEXT[:-1].encode() + b",}", "a comment": b"/* x */" + TEXT.encode(),
        "XML": b"<?xml version='1.0'?><a/>", "a pickle": b"\x80\x04\x95N.", "gzip": b"\x1f\x8b\x08",
        "brackets": b"[" * 100_000, "braces": b'{"a":' * 100_000, "an image": FRAMES[0],
    }  # fmt: skip
    for name, body in values.items():
        yield Bad(f"JSON: {name}", body)
    texts = {
        "a lone surrogate": '"\\ud800"', "a low surrogate": '"\\udc00"', "half": '"\\ud83d\\u0041"',
        "a bad escape": '"\\x41"', "half an escape": '"\\u12"', "a raw newline": '"\n"',
        "5000 digits": "9" * 5000, "5000 digits below 0": "-" + "9" * 5000, "hexadecimal": "0x1",
        "a leading zero": "01", "a plus": "+1", "a point": "1.", "an exponent": "1e",
        "None": "None",
        "deep lists": "[" * 5000 + "]" * 5000, "deep objects": '{"a":' * 5000 + "1" + "}" * 5000,
    }  # fmt: skip
    for name, text in texts.items():
        yield Bad(f"JSON with {name}", _with(text))
    for bad in (b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe8\x82", b"\x80"):
        yield Bad(f"JSON with the bytes {bad.hex()}", _with('"?"').replace(b"?", bad))


WRONG: dict[str, Any] = {
    "null": None, "true": True, "0": 0, "1.5": 1.5, "-1": -1, "text": "x", "no text": "",
    "a list": [], "a list of null": [None], "an object": {}, "an object in a list": [{}],
}  # fmt: skip
ALLOWED = {
    "model": [], "messages": [],
    "stream": ["null", "true"], "stream_options": ["null", "an object"],
    "max_tokens": ["null"], "max_completion_tokens": ["null"],
    "temperature": ["null", "0", "1.5"], "top_p": ["null"],
    "seed": ["null", "0", "-1"], "stop": ["null", "text", "a list"], "n": ["null"],
    "response_format": ["null"],
    "tools": ["null", "0", "no text", "a list", "an object"],
    "logprobs": ["null", "0", "no text", "a list", "an object"],
    "frequency_penalty": ["null", "0", "no text", "a list", "an object"],
}  # fmt: skip
"""Field -> those of WRONG that are right for it."""


def _wrong_types() -> Iterator[Bad]:
    for name, right in ALLOWED.items():
        for kind in WRONG.keys() - set(right):
            status = 404 if name == "model" and isinstance(WRONG[kind], str) else 400
            body = json.dumps({**GOOD, name: WRONG[kind]}).encode()
            yield Bad(f"{name}: {kind}", body, name, status)
    for name in ("model", "messages"):
        rest = {key: value for key, value in GOOD.items() if key != name}
        yield Bad(f"no {name}", json.dumps(rest).encode(), name)
    for kind in ("text", "0", "a list", "an object"):
        options = {"include_usage": WRONG[kind]}
        yield _ask(f"include_usage: {kind}", "stream_options.include_usage", stream_options=options)
    for kind in ("json_object", "json_schema", "", None, 1):
        yield _ask(f"format {kind}", "response_format.type", response_format={"type": kind})


def _wrong_numbers() -> Iterator[Bad]:
    numbers = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "1e400")
    for name in ("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "n"):
        for number in numbers:
            yield Bad(f"{name}: {number[:9]}", _with(number, name), name)
    beyond = {
        "temperature": (2.0001, -0.0001, 1e308), "top_p": (0, 1.0001, -1), "n": (0, 2, -1, 128),
        "seed": (2**63, -(2**63) - 1, 2**64), "max_tokens": (0, -1, 2**31, 10**6),
        "max_completion_tokens": (0, -1, 2**31, 10**6),
    }  # fmt: skip
    for name, values in beyond.items():
        for value in values:
            yield _ask(f"{name}: {value}", name, **{name: value})
    for stop in (["a"] * 5, ["a", ""], ["a" * 101], "a" * 101, [["a"]], ["a", 1]):
        yield _ask(f"stop: {str(stop)[:20]}", "stop", stop=stop)


def _wrong_messages() -> Iterator[Bad]:
    frame = ask_user("a", FRAMES[0])
    for role in ("tool", "function", "User", "", "root", None, 1, ["user"], {"user": 1}, "user\0"):
        message = {**frame, "role": role}
        yield _ask(f"role {role!r}", "messages.0.role", messages=[message])
    for content in (None, 1, True, {}, [1], ["a"], [None], [[]], [{}], [{"type": None}]):
        message = {"role": "user", "content": content}
        yield _ask(f"content {content!r}", "messages.0.content", messages=[message])
    image = image_part("x")["image_url"]
    parts: list[dict] = [
        {"type": "video_url", "video_url": image}, {"type": "input_audio", "input_audio": {}},
        {"type": "file", "file": {}}, {"type": "TEXT", "text": "a"}, {"type": "text"},
        {"type": "text", "text": 1}, {"type": "text", "text": ["a"]}, {"type": "image_url"},
        {"type": "image_url", "image_url": "data:,"}, {"type": "image_url", "image_url": {}},
        {"type": "image_url", "image_url": {"url": 1}}, {"text": "a"},
        {"type": "image_url", "image_url": {"url": None}}, {"type": "image_url", "image_url": []},
    ]  # fmt: skip
    for number, part in enumerate(parts):
        message = {"role": "user", "content": [part]}
        yield _ask(f"part {number}", "messages.0.content.0", messages=[message])
    answer, text = {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}
    conversations = {
        "an answer last": [frame, answer], "an answer first": [answer, frame], "two": [frame, text],
        "a system message last": [frame, {"role": "system", "content": "s"}],
        "images of the system": [{**frame, "role": "system"}, frame],
        "images of the assistant": [frame, {**frame, "role": "assistant"}, text],
        "no image": [text], "no text": [ask_user("", FRAMES[0])], "blanks": [ask_user(" \n",
        FRAMES[0])],
        "65537 characters": [ask_user("a" * 65_537, FRAMES[0])], "4 frames": [ask_user("a",
        *[FRAMES[0]] * 4)],
        "300 frames": [ask_user("a", *[FRAMES[0]] * 300)], "5000 messages": [text, answer] * 2500,
        "10000 parts": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 10_000}],
        "an image later": [text, answer, ask_user("a", b"x")],
    }  # fmt: skip
    for name, messages in conversations.items():
        yield _ask(f"messages: {name}", "messages", messages=messages)
    yield _ask("no role", "messages.0.role", messages=[{"content": "a"}])
    yield _ask("no content", "messages.0.content", messages=[{"role": "user"}])


def _png(width: int, height: int, rows: bytes, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _animation(kind: str) -> bytes:
    first, *rest = [Image.open(io.BytesIO(encode_image(seed))) for seed in range(3)]
    buffer = io.BytesIO()
    first.save(buffer, kind, save_all=True, append_images=rest)
    return buffer.getvalue()


def _wrong_images() -> Iterator[Bad]:
    png, jpeg = FRAMES[0], FRAMES[1]
    webp, dicom = encode_image(3, kind="WEBP"), real("examples_ybr_color")
    for kind, data in {"PNG": png, "JPEG": jpeg, "WebP": webp}.items():
        for cut in range(1, len(data) - 30, len(data) // 20):
            yield _ask_about(f"{kind} cut at {cut}", data[:cut])
    for cut in (100, 132, 140, 300, 1000, 5000, 20_000, len(dicom) // 2):
        yield _ask_about(f"DICOM cut at {cut}", dicom[:cut])
    yield _ask_about("DICOM without a region", dicom)
    for name, head in {
        "GIF": b"GIF89a", "ZIP": b"PK\x03\x04", "PDF": b"%PDF-1.7\n", "HTML": b"<script>",
        "ELF": b"\x7fELF",
        "SVG": b"<svg/>", "TIFF": b"II*\0", "BMP": b"BM", "JPEG 2000": b"\0\0\0\x0cjP  ",
        "a space": b" ",
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n", "ICO": b"\0\0\1\0", "PCX": b"\x0a\5\1\1",
        "MZ": b"MZ",
    }.items():  # fmt: skip
        yield _ask_about(f"{name} before a PNG", head + png)
        yield _ask_about(f"{name} alone", head)
    for kind in ("GIF", "TIFF", "BMP", "ICO", "PPM", "JPEG2000", "TGA", "DDS"):
        yield _ask_about(f"a {kind}", encode_image(0, kind=kind))
    for kind in ("PNG", "WEBP", "GIF"):
        yield _ask_about(f"an animated {kind}", _animation(kind))
    yield _ask_about("100 x 101 pixels", encode_image(0, (100, 101)))
    for width, height in ((40_000, 40_000), (2**31 - 1, 2**31 - 1), (10_001, 1), (0, 5), (5, 0)):
        yield _ask_about(f"PNG of {width} x {height}", _png(width, height, bytes(1000)))
    yield _ask_about("PNG of no known colour", _png(9, 9, bytes(1000), colour=5))
    yield _ask_about("PNG without pixels", _png(9, 9, b""))
    yield _ask_about("more than a MiB", bytes(2**20 + 9))
    yield _ask_about("nothing", b"")
    yield _ask_about("DICOM of zeros", bytes(128) + b"DICM" + bytes(5000))
    for place in range(8, 33, 4):
        yield _ask_about(f"PNG with byte {place} wrong", png[:place] + b"\xff" + png[place + 1 :])


def _wrong_urls(store: str) -> Iterator[Bad]:
    host = store.removeprefix("http://")
    encoded = base64.b64encode(FRAMES[0]).decode()
    urls = [
        "", "x", "/etc/passwd", "file:///etc/passwd", "file://localhost/etc/passwd",
        "ftp://a/1.png",
        "FILE:/etc/passwd", "gopher://a/", "s3://bucket/1.png", "javascript:alert(1)", "blob:x",
        "http:" "//127.0.0.1/1.png", "http://localhost/1.png", "http://[::1]/1.png", "http://0/1.png",
        "http://2130706433/", "http:" "//0x7f.1/", "http:" "//169.254.169.254/latest/meta-data/",
        "http:" "//10.0.0.1/",
        "https:" "//192.168.0.1/", "http://[fd00::1]/", "http://[::ffff:127.0.0.1]/",
        "https:" "//example.org/1.png",
        "http://", "http:///1.png", "http://a:99999/", "http://a\r\nHost: b/", "//a/1.png",
        "http://\ud800",
        f"https://{host}/1.png", f"http://user@{host}/1.png", f"http://{host}.example.org/1.png",
        f"http:" f"//example.org@{host}/1.png", f"http:" f"//example.org#@{host}/1.png",
        f"ftp://{host}/1.png",
        *(f"{store}/to?{there}" for there in (
            "http:" "//127.0.0.2/", "http:" "//169.254.169.254/", "file:///etc/passwd", "ftp://a/",
            "//example.org/",
            f"{store}/none", f"{store}/packed", f"{store}/text", "http://", "data:,x",
        )),
        f"{store}/loop", f"{store}/none", f"{store}/packed", f"{store}/text", f"{store}/large",
        f"{store}/empty",
        "data:", "data:,", "data:text/plain,hello", "data:image/png,x", "data:image/png;base64",
        "data:;base64,",
        "data:image/png;base64,####", f"data:image/png;base64,{encoded[:-2]}",
        f"data:image/png;base64,{encoded}=",
        f"data:image/png;base64, {encoded}", f"data:image/png;base64,{encoded}\n",
        "data:image/svg+xml,<svg/>",
        "data:image/png;base64,%69", f"data:image/png,{encoded}",
        "data:image/png;base64," + "A" * 1_500_000,
        "data:text/html;base64,PGI+", "data:image/png;base64,肝",
    ]  # fmt: skip
    for number, url in enumerate(urls):
        message = {"role": "user", "content": [image_part(url), {"type": "text", "text": "a"}]}
        yield _ask(
            f"URL {number}: {url[:50]!r}",
            None if "\ud800" in url else "messages",
            messages=[message],
        )


def _wrong_http() -> Iterator[Bad]:
    good = TEXT.encode()
    key = ("Authorization", f"Bearer {KEY}")
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield Bad(f"{method} a question", good, status=405, method=method)
    for path in ("/v1/models", "/health/ready", "/metrics", "/health/live"):
        yield Bad(f"POST {path}", good, status=405, path=path)
    for path in (
        "/v1", "/v1/completions", "/v1/chat", "/V1/chat/completions", "/docs", "/openapi.json",
        "/.env",
        "/v1/files", "/%2e%2e/etc/passwd", "/page.css/x", "/v1/models/", "/v1/models/x",
        "/v1/models/%00",
    ):  # fmt: skip
        yield Bad(f"GET {path}", status=404, method="GET", path=path)
    for value in (
        None,
        "",
        "Bearer",
        "Bearer x",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        "Bearer é",
    ):
        headers = () if value is None else (("Authorization", value),)
        yield Bad(f"key {value!r}", good, status=401, headers=headers)
    for ticket in ("", "x", "1 2 3", "zz 1", f"{'a' * 32} x", f"{'a' * 32}", "\xff 1"):
        headers = (key, ("x-ultra-ticket", ticket))
        yield Bad(f"ticket {ticket!r}", good, headers=headers)
    for begun in ("x", "1,2", "1.5", "\xff"):
        headers = (key, ("x-ultra-ticket", f"{'a' * 32} 1.0"), ("x-ultra-begun", begun))
        yield Bad(f"begun {begun!r}", good, headers=headers)
    yield Bad("6 MiB", bytes(6 * 2**20), status=413)
    yield Bad("6 MiB of brackets", b"[" * 6 * 2**20, status=413)
    frames = {"nothing": b"", "a PNG": FRAMES[0], "text": b"x" * 500, "JSON": good}
    dicom = real("examples_ybr_color")
    frames |= {f"DICOM cut at {cut}": dicom[:cut] for cut in (132, 200, 2000, 9000, 50_000)}
    frames["DICOM without a region"] = dicom
    for name, body in frames.items():
        yield Bad(f"frames of {name}", body, path="/v1/frames")
    yield Bad("frames of 2 MiB", bytes(2**21), status=413, path="/v1/frames")
