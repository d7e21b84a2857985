from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from ultra.data.frames import (
    check_image,
    clean_frame,
    decode_frame,
    drop_duplicates,
    encode_frame,
    find_text,
    is_jpeg,
    sample_evenly,
    thumbnail,
)

CAPS = {"max_bytes": 1_000_000, "max_pixels": 100_000}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 60, height: int = 40) -> Image.Image:
    row = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.tile(row, (height, 1)))


def speckle(height: int = 200, width: int = 300, seed: int = 0) -> np.ndarray:
    """Log-compressed Rayleigh speckle, blurred as a beam blurs it."""
    rng = np.random.default_rng(seed)
    field = rng.normal(size=(2, height, width))
    field = ndimage.gaussian_filter(field, (0, 2, 5))
    envelope = np.hypot(*field)
    decibels = 20 * np.log10(envelope / envelope.max() + 1e-4)
    return np.clip(255 * (1 + decibels / 70), 0, 255).astype(np.uint8)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_whole_image_gives_its_size(kind: str) -> None:
    assert check_image(encoded(gradient(), kind), **CAPS) == (60, 40)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JPEG or PNG"),
        (b"\xff\xd8\xff but no JPEG", "no JPEG or PNG"),
        (encoded(gradient(), "GIF"), "no JPEG or PNG"),
        (encoded(gradient(), "BMP"), "no JPEG or PNG"),
        (encoded(gradient(), "JPEG")[:-60], "damaged or cut short"),
        (encoded(gradient(), "PNG")[:-30], "damaged or cut short"),
        (encoded(gradient(500, 300), "PNG"), "500 x 300 pixels, at most 100000 are let in"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels, at most 100000 are let in"),
        (png_header(2_000_000, 2_000_000), "more than the 100000 pixels"),
        (bytes(1_000_001), "1000001 bytes, at most 1000000 are let in"),
    ],
)
def test_what_is_no_good_image_is_refused_in_one_plain_line(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        check_image(data, **CAPS)
    message = str(refused.value)
    assert "\n" not in message
    assert "PIL" not in message
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", decode)
    with pytest.raises(ValueError, match="pixels"):
        check_image(png_header(9_000, 9_000), **CAPS)


def test_metadata_does_not_survive_cleaning() -> None:
    exif = Image.Exif()
    exif[0x010E] = "ZHANG SAN"
    jpeg = encoded(gradient(), "JPEG", quality=95, exif=exif, comment=b"ZHANG SAN")
    png = io.BytesIO()
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Patient", "ZHANG SAN")
    gradient().save(png, "PNG", pnginfo=info)
    for data in (jpeg, png.getvalue(), jpeg + b"ZHANG SAN"):
        assert b"ZHANG SAN" in data
        clean = clean_frame(data, **CAPS)
        assert b"ZHANG SAN" not in clean
        assert is_jpeg(clean) == is_jpeg(data)
        assert not Image.open(io.BytesIO(clean)).getexif()
        before, after = (decode_frame(d, **CAPS).astype(int) for d in (data, clean))
        assert np.abs(before - after).max() <= (4 if is_jpeg(data) else 0)


def test_a_frame_is_turned_upright_as_its_metadata_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(gradient(60, 40), "JPEG", exif=exif)
    assert decode_frame(data, **CAPS).shape == (60, 40)


def test_metadata_that_cannot_be_read_turns_nothing() -> None:
    data = encoded(gradient(60, 40), "PNG", exif=b"Exif\0\0no TIFF here")
    with pytest.raises(SyntaxError):
        Image.open(io.BytesIO(data)).getexif()
    assert decode_frame(data, **CAPS).shape == (40, 60)


def test_every_kind_of_pixel_becomes_grey_or_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert decode_frame(encoded(deep, "PNG"), **CAPS).tolist() == [[0, 1, 255]]
    red = Image.new("RGBA", (2, 1), (200, 10, 20, 128))
    assert decode_frame(encoded(red, "PNG"), **CAPS).tolist() == [[[200, 10, 20]] * 2]
    palette = Image.new("RGB", (2, 1), (9, 8, 7)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert decode_frame(encoded(palette, "PNG"), **CAPS).tolist() == [[[9, 8, 7]] * 2]
    bits = Image.new("1", (2, 1), 1)
    assert decode_frame(encoded(bits, "PNG"), **CAPS).tolist() == [[255, 255]]


def test_lossless_sources_stay_lossless() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_frame(encode_frame(pixels, lossy=False), **CAPS), pixels)
    assert is_jpeg(encode_frame(pixels, lossy=True))


def test_duplicates_are_measured_against_the_frame_kept_last() -> None:
    levels = [10, 11, 11.9, 12, 13.9, 14, 14, 10]
    frames = [np.full((3, 4), level, dtype=np.float32) for level in levels]
    assert drop_duplicates(frames, 2.0) == [0, 3, 5, 7]
    assert drop_duplicates(frames, 0.0) == list(range(8))
    assert drop_duplicates([], 2.0) == []


def test_a_thumbnail_is_the_mean_of_each_area() -> None:
    pixels = np.kron(np.arange(64, dtype=np.uint8), np.ones((128, 2), dtype=np.uint8))
    assert thumbnail(pixels).shape == (64, 64)
    np.testing.assert_array_equal(thumbnail(pixels)[5], np.arange(64))


@pytest.mark.parametrize(
    ("count", "cap", "expected"),
    [
        (10, 4, [0, 3, 6, 9]),
        (5, 5, [0, 1, 2, 3, 4]),
        (3, 64, [0, 1, 2]),
        (7, 1, [3]),
        (120, 2, [0, 119]),
        (0, 4, []),
    ],
)
def test_sampling_is_even(count: int, cap: int, expected: list[int]) -> None:
    assert sample_evenly(count, cap) == expected


@pytest.mark.parametrize("size", [8, 10, 12, 16, 24, 40])
@pytest.mark.parametrize("text", ["ZHANG SAN", "1975-03-02", "ID:20240317"])
@pytest.mark.parametrize("tone", [255, 130])
def test_text_is_found_where_it_stands(size: int, text: str, tone: int) -> None:
    pixels = speckle() // 3
    pixels[:60] = 0
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text((20, 5), text, fill=tone, font=ImageFont.load_default(size))
    boxes = find_text(np.asarray(image))
    assert boxes
    assert all(top < 60 for _, top, _, _ in boxes)


@pytest.mark.parametrize("size", [12, 24])
def test_white_text_over_tissue_is_found(size: int) -> None:
    image = Image.fromarray(speckle() // 2)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text((60, 100), "LI MING 52", fill=255, font=font)
    assert find_text(np.asarray(image))


def test_tissue_ticks_and_markers_are_not_text() -> None:
    assert find_text(speckle()) == []
    image = Image.new("RGB", (300, 200))
    draw = ImageDraw.Draw(image)
    for y in range(10, 190, 12):
        draw.rectangle((290, y, 294, y + 1), fill=(255, 255, 255))  # depth scale
    for x in range(10, 280, 20):
        draw.rectangle((x, 190, x + 1, 195), fill=(255, 255, 255))  # width scale
    draw.ellipse((140, 5, 150, 15), fill=(0, 200, 100))  # probe marker
    draw.rectangle((4, 40, 16, 140), fill=(255, 255, 255))  # grey bar
    draw.line((30, 150, 200, 120), fill=(255, 255, 255))  # caliper
    assert find_text(np.asarray(image)) == []
