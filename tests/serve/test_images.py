"""What images may come as, and what the encoder gets of them."""

from __future__ import annotations

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from tests.serve.questions import FRAMES, encode_image, encode_pixels
from ultra.data.frames import decode_frame
from ultra.model.pictures import decode
from ultra.serve import dicom
from ultra.serve.dicom import open_dicom
from ultra.serve.images import open_images
from ultra.serve.limits import ApiError, Limits

LIMITS = Limits(max_frames=4, max_image_mib=1, max_image_pixels=40_000, max_dicom_mib=2)
PIXELS = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)


def as_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def save(kind: str, pixels: np.ndarray = PIXELS, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str) -> bytes:
    other = Image.fromarray(255 - PIXELS)
    return save(kind, save_all=True, append_images=[other])


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save("JPEG", exif=exif, quality=100, subsampling=0)


def open_one(data: bytes, kind: str = "image/png") -> bytes:
    (frame,), _ = open_images([as_url(data, kind)], LIMITS)
    return frame


def test_jpeg_and_png_pass_as_they_are() -> None:
    frames, num_near = open_images([as_url(frame) for frame in FRAMES], LIMITS)
    assert frames == FRAMES
    assert num_near == 0


def test_webp_becomes_png_of_the_same_pixels() -> None:
    # Whatever the client calls it, the content says what it is.
    frame = open_one(save("WEBP", lossless=True), "image/jpeg")
    assert frame[:4] == b"\x89PNG"
    assert np.array_equal(np.asarray(decode(frame)), PIXELS)


def test_an_image_that_lies_on_its_side_is_turned_upright_without_its_metadata() -> None:
    frame = open_one(turned(6))
    expected = decode_frame(turned(6), max_bytes=10**6, max_pixels=10**6)
    assert expected.shape == (24, 20, 3)
    assert np.array_equal(np.asarray(decode(frame)), expected)
    assert b"Exif" not in frame


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind) -> None:
    with pytest.raises(ApiError, match="image 1: several pictures in one file"):
        open_one(animation(kind))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
def test_other_formats_are_refused(kind) -> None:
    with pytest.raises(
        ApiError, match="image 1: no JPEG or PNG or WEBP that can be read"
    ) as raised:
        open_one(save(kind), "image/png")
    assert raised.value.param == "messages"


def test_a_dicom_file_becomes_frames_as_at_its_own_route() -> None:
    data = Path(get_testdata_file("color3d_jpeg_baseline.dcm", download=False)).read_bytes()
    limits = LIMITS.model_copy(update={"max_image_pixels": 10**6, "max_dicom_mib": 16})
    frames, _ = open_images([as_url(data, "application/dicom")], limits)
    shown = open_dicom(data, limits)["data"]
    assert [as_url(f, f"image/{'jpeg' if f[0] == 255 else 'png'}") for f in frames] == [
        s["url"] for s in shown
    ]
    assert len(frames) == 4
    with pytest.raises(ApiError, match="5 frames with those of the DICOM files, at most 4"):
        open_images([as_url(FRAMES[0]), as_url(data)], limits)
    with pytest.raises(ApiError, match="image 1: more than the 2097152 bytes"):
        open_images([as_url(data)], LIMITS)


def test_one_dicom_file_at_a_time() -> None:
    data = Path(get_testdata_file("color3d_jpeg_baseline.dcm", download=False)).read_bytes()
    with dicom._opening, pytest.raises(ApiError) as raised:
        open_dicom(data, LIMITS)
    assert (raised.value.status, raised.value.retry_after_s) == (429, 5.0)


def test_a_dicom_file_without_a_clean_region_is_refused_with_its_reason() -> None:
    data = Path(get_testdata_file("CT_small.dcm", download=False)).read_bytes()
    with pytest.raises(ApiError, match="no ultrasound region") as raised:
        open_one(data)
    assert raised.value.code == "dicom_refused"


@pytest.mark.parametrize("count", [0, 5])
def test_too_few_and_too_many_images(count) -> None:
    with pytest.raises(ApiError, match=f"{count} images; a question is about 1 to 4 frames"):
        open_images([as_url(FRAMES[0])] * count, LIMITS)


def test_near_repeats_are_counted() -> None:
    again = encode_pixels(np.minimum(np.asarray(decode(FRAMES[0])), 254) + 1)
    urls = [as_url(FRAMES[0]), as_url(again), as_url(encode_image(9))]
    assert open_images(urls, LIMITS)[1] == 1


def test_an_address_is_read_only_where_its_host_is_listed() -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(FRAMES[1])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        host = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(ApiError, match="image 1: only data URLs"):
            open_images([f"{host}/1.jpg"], LIMITS)
        update = {"allowed_image_hosts": (host,), "allowed_image_networks": ("127.0.0.0/8",)}
        frames, _ = open_images(
            [f"{host}/1.jpg", as_url(FRAMES[0])], LIMITS.model_copy(update=update)
        )
        assert frames == (FRAMES[1], FRAMES[0])
    finally:
        server.shutdown()
        server.server_close()
