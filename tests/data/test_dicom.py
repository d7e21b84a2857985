from __future__ import annotations

import io
import tracemalloc
from itertools import pairwise
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    MPEG4HP41,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    UltrasoundMultiFrameImageStorage,
)
from scipy import ndimage

from ultra.data.dicom import DicomFrames, is_dicom, read_dicom
from ultra.data.dicom_file import decode_frames, find_regions
from ultra.data.frames import check_image, find_text, is_jpeg

CAPS = {"max_bytes": 10**8, "max_pixels": 10**8}
WIDTH, HEIGHT = 300, 200
REGION = (20, 30, 279, 189)  # inclusive corners, as in the file


def real(name: str) -> bytes:
    path = get_testdata_file(f"{name}.dcm", download=False)
    assert path, name
    with open(path, "rb") as file:
        return file.read()


def parsed(name: str) -> Dataset:
    return pydicom.dcmread(io.BytesIO(real(name)))


def read(data: bytes, **options: Any) -> DicomFrames:
    defaults = {"max_pixels": 10**6, "max_frames": 64, "duplicate_threshold": 2.0}
    return read_dicom(data, "name.dcm", **{**defaults, **options})


def pixels_of(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)))


def region(x0: int, y0: int, x1: int, y1: int, kind: int = 1, space: int = 1) -> Dataset:
    item = Dataset()
    item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1, y1
    item.RegionDataType, item.RegionSpatialFormat = kind, space
    return item


def tissue(num_frames: int, seed: int = 0) -> np.ndarray:
    """Frames of a moving sector: speckle that changes, black around it."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(
        rng.normal(size=(2, num_frames, HEIGHT, WIDTH)), (0, 0.7, 2, 5)
    )
    envelope = np.hypot(*fields)
    decibels = 20 * np.log10(envelope / envelope.max() + 1e-4)
    frames = np.clip(160 * (1 + decibels / 70), 0, 255)
    frames[:, :60] = 0
    return frames.astype(np.uint8)


def written(pixels: np.ndarray, text: str, at: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text(at, text, fill=220, font=ImageFont.load_default(14))
    return np.asarray(image)


def dicom_bytes(
    frames: np.ndarray, *regions: Dataset, big_endian: bool = False, **tags: Any
) -> bytes:
    """Frames (N, H, W) grey or (N, H, W, 3) RGB as an uncompressed file."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRBigEndian if big_endian else ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    dataset.Modality = "US"
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = frames.shape[:3]
    bits = frames.dtype.itemsize * 8
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.SamplesPerPixel = 3 if frames.ndim == 4 else 1
    dataset.PhotometricInterpretation = "RGB" if frames.ndim == 4 else "MONOCHROME2"
    if frames.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.SequenceOfUltrasoundRegions = list(regions)
    for key, value in tags.items():
        setattr(dataset, key, value)
    dataset.PixelData = frames.astype(
        frames.dtype.newbyteorder(">" if big_endian else "<")
    ).tobytes()
    dataset["PixelData"].VR = "OW" if bits > 8 else "OB"
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def real_cine() -> DicomFrames:
    return read(real("color3d_jpeg_baseline"))


def test_a_real_cine_comes_out_cropped_thinned_masked_and_clean(real_cine: DicomFrames) -> None:
    assert len(real_cine.frames) == 64
    assert real_cine.num_duplicates == 52
    assert set(real_cine.frame_sizes) == {(512, 384)}
    assert all(is_jpeg(frame) for frame in real_cine.frames)
    assert check_image(real_cine.frames[0], **CAPS) == (512, 384)
    indices = [int(source.removeprefix("name.dcm#")) for source in real_cine.frame_sources]
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] > 110
    for frame in real_cine.frames:
        assert find_text(pixels_of(frame)) == []
        # The depth figure "19" stood at the lower right, the probe marker stays at the top.
        assert pixels_of(frame)[366:382, 488:512].max() < 12
        assert pixels_of(frame)[5:14, 292:301].max() > 100
    assert set(real_cine.evidence) == {
        "cropped to (84, 31) to (595, 414); static check over time "
        "found text, masked (480, 364) to (511, 383) of the crop"
    }


def test_the_cap_on_frames_samples_a_cine_evenly() -> None:
    few = read(real("color3d_jpeg_baseline"), max_frames=5)
    indices = [int(source.rsplit("#")[1]) for source in few.frame_sources]
    assert len(indices) == 5
    assert all(15 < b - a < 45 for a, b in pairwise(indices))


def test_a_long_cine_is_never_whole_in_memory() -> None:
    frames = np.repeat(tissue(8), 40, axis=0)  # 320 frames, 19 MB
    data = dicom_bytes(np.repeat(frames[..., None], 3, axis=-1), region(*REGION))
    del frames
    tracemalloc.start()
    result = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(result.frames) == 8
    assert result.num_duplicates == 312
    # The parser's copy of the file, thumbnails and a frame at a time; all frames would be twice.
    assert peak < 1.3 * len(data)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("examples_ybr_color", r"region \(84, 31\) to \(595, 414\) does not fit .* 320 x 240"),
        ("examples_palette", r"region \(120, 60\) to \(800, 518\) does not fit .* 800 x 350"),
        ("examples_rgb_color", "no ultrasound region"),
        ("examples_jpeg2k", "no ultrasound region"),
        ("ExplVR_BigEnd", "no ultrasound region"),
        ("US1_J2KI", "no ultrasound region"),
        ("US1_J2KR", "no ultrasound region"),
        ("US1_UNCI", "no ultrasound region"),
        ("US1_UNCR", "no ultrasound region"),
        ("color-pl", "no ultrasound region"),
        ("color-px", "no ultrasound region"),
        ("CT_small", "no ultrasound region"),
        ("OBXXXX1A", "something like text"),
        ("OBXXXX1A_rle", "something like text"),
        ("OBXXXX1A_expb", "something like text"),
        ("OBXXXX1A_2frame", "something like text"),
        ("OBXXXX1A_rle_2frame", "something like text"),
        ("OBXXXX1A_expb_2frame", "something like text"),
        ("gdcm-US-ALOKA-16", "something like text"),
        ("gdcm-US-ALOKA-16_big", "something like text"),
        # This file says BurnedInAnnotation NO, and is full of it.
        ("JPGLosslessP14SV1_1s_1f_8b", "something like text"),
    ],
)
def test_real_files_that_cannot_be_shown_clean_are_refused(name: str, reason: str) -> None:
    assert is_dicom(real(name))
    with pytest.raises(ValueError, match=reason) as refused:
        read(real(name))
    assert "\n" not in str(refused.value)


def test_two_panes_of_a_still_are_two_frames() -> None:
    dataset = parsed("gdcm-US-ALOKA-16")
    whole = next(decode_frames(dataset, [0]))
    stored = dataset.pixel_array.copy()
    black = stored[30, 34 + 100]
    for left, top, right, bottom in find_text(whole):
        stored[max(0, top - 6) : bottom + 6, max(0, left - 24) : right + 24] = black
    dataset.PixelData = stored.tobytes()
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset)
    result = read(buffer.getvalue())
    assert result.frame_sources == ("name.dcm#0@32,24", "name.dcm#0@336,24")
    assert result.frame_sizes == ((304, 392), (304, 392))
    assert not any(is_jpeg(frame) for frame in result.frames)
    assert result.num_duplicates == 0
    right = pixels_of(result.frames[1])
    np.testing.assert_array_equal(right[100:], whole[124:416, 336:640])


def test_encodings_of_one_picture_decode_alike() -> None:
    def decoded(name: str) -> np.ndarray:
        return next(decode_frames(parsed(name), [0]))

    palette = decoded("OBXXXX1A")
    assert palette.shape == (600, 800, 3)
    assert palette.dtype == np.uint8
    np.testing.assert_array_equal(palette[40, 10], [37, 62, 94])  # the blue bar
    for name in ("OBXXXX1A_rle", "OBXXXX1A_expb", "OBXXXX1A_2frame"):
        np.testing.assert_array_equal(decoded(name), palette)
    np.testing.assert_array_equal(decoded("gdcm-US-ALOKA-16"), decoded("gdcm-US-ALOKA-16_big"))
    lossless = decoded("US1_UNCR")
    np.testing.assert_array_equal(decoded("US1_J2KR"), lossless)
    difference = np.abs(decoded("US1_J2KI").astype(int) - lossless)
    assert difference.mean() < 3
    assert decoded("ExplVR_BigEnd").shape == (60, 80, 3)


def test_ybr_becomes_the_rgb_that_another_decoder_gives() -> None:
    dataset = parsed("color3d_jpeg_baseline")
    jpeg = next(iter(generate_frames(dataset.PixelData, number_of_frames=120)))
    expected = pixels_of(jpeg).astype(int)
    found = next(decode_frames(dataset, [0])).astype(int)
    assert found.shape == expected.shape == (480, 640, 3)
    assert np.abs(found - expected).mean() < 1
    green = found[40, 380]  # the probe marker
    assert green[1] > green[0] + 40


def test_grey_is_inverted_windowed_and_brought_to_8_bits() -> None:
    ramp = np.arange(WIDTH) * 200.0
    frames = np.broadcast_to(ramp, (1, HEIGHT, WIDTH)).astype(np.uint16)

    def decoded(**tags: Any) -> np.ndarray:
        dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(frames, region(*REGION), **tags)))
        return next(decode_frames(dataset, [0]))[0].astype(float)

    np.testing.assert_allclose(decoded(), ramp * 255 / 65535, atol=0.51)
    inverted = decoded(PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(inverted, 255 - ramp * 255 / 65535, atol=0.51)
    # PS3.3 C.11.2.1.2: black up to centre - 0.5 - (width - 1) / 2, white from the same above.
    windowed = decoded(WindowCenter=20_000, WindowWidth=10_001)
    expected = np.clip((ramp - 19_999.5) / 10_000 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(windowed, expected, atol=0.51)


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_still_without_text_passes_whatever_its_byte_order(big_endian: bool) -> None:
    frames = tissue(1)
    outside = written(frames[0], "ZHANG SAN", (30, 5))[None]  # above the region
    result = read(dicom_bytes(outside, region(*REGION), big_endian=big_endian))
    assert result.frame_sources == ("name.dcm#0",)
    np.testing.assert_array_equal(pixels_of(result.frames[0]), frames[0, 30:190, 20:280])


def test_a_still_with_text_in_its_region_is_refused() -> None:
    still = written(tissue(1)[0], "ZHANG SAN", (40, 35))[None]
    with pytest.raises(ValueError, match="no text is read here"):
        read(dicom_bytes(still, region(*REGION), BurnedInAnnotation="NO"))


def test_static_text_of_a_cine_is_masked_even_over_tissue() -> None:
    frames = tissue(12)
    marked = np.stack([written(frame, "LI MING 52", (100, 120)) for frame in frames])
    result = read(dicom_bytes(marked, region(*REGION)))
    assert len(result.frames) == 12
    assert "masked" in result.evidence[0]
    for frame in result.frames:
        shown = pixels_of(frame)
        assert shown[94:102, 82:150].max() == 0  # where the letters stood, in the crop
        assert shown[40:80].max() > 40


def test_text_that_comes_and_goes_in_a_cine_is_refused() -> None:
    frames = tissue(12)
    frames[7] = written(frames[7], "LI MING 52", (40, 35))
    with pytest.raises(ValueError, match=r"frame 7, region .* something like text"):
        read(dicom_bytes(frames, region(*REGION)))


def test_a_frozen_cine_is_judged_as_a_still() -> None:
    frozen = np.repeat(written(tissue(1)[0], "LI MING", (40, 35))[None], 20, axis=0)
    with pytest.raises(ValueError, match="something like text"):
        read(dicom_bytes(frozen, region(*REGION)))


def test_a_cine_covered_with_text_is_refused() -> None:
    frames = tissue(12)
    for index in range(12):
        for y in range(30, 180, 12):
            frames[index] = written(frames[index], "ZHANG SAN 1975-03-02 M 52", (30, y))
    with pytest.raises(ValueError, match="text covers"):
        read(dicom_bytes(frames, region(*REGION)))


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([], "no ultrasound region"),
        ([region(*REGION, kind=10)], "no ultrasound region"),
        ([region(*REGION, space=3)], "no ultrasound region"),
        ([region(20, 30, WIDTH + 1, 189)], "does not fit"),
        ([region(20, 30, 10, 189)], "does not fit"),
        ([region(*REGION), region(0, 0, WIDTH, HEIGHT + 5)], "does not fit"),
        ([region(20, 30, 60, 60)], "covers 2% of the image"),
        ([region(0, 0, WIDTH, HEIGHT)], "covers 100% of the image"),
    ],
)
def test_a_region_must_be_one_that_can_be_trusted(regions: list[Dataset], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(dicom_bytes(tissue(1), *regions))


def test_regions_one_pixel_too_large_are_clamped_and_nested_ones_left_out() -> None:
    dataset = Dataset()
    dataset.Columns, dataset.Rows = WIDTH, HEIGHT
    colour_box = region(100, 80, 240, 170, kind=2)
    dataset.SequenceOfUltrasoundRegions = [colour_box, region(20, 30, WIDTH, HEIGHT)]
    assert find_regions(dataset) == [(20, 30, WIDTH, HEIGHT)]


def test_damaged_and_hostile_files_give_one_plain_line() -> None:
    good = dicom_bytes(tissue(2), region(*REGION))
    cine = real("color3d_jpeg_baseline")
    dataset = parsed("color3d_jpeg_baseline")

    def changed(**tags: Any) -> bytes:
        for key, value in tags.items():
            setattr(dataset, key, value)
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, dataset)
        return buffer.getvalue()

    jpeg = io.BytesIO()
    Image.new("L", (5000, 4000)).save(jpeg, "JPEG")
    assert dataset.file_meta.TransferSyntaxUID == JPEGBaseline8Bit
    cases = [
        (b"no DICOM at all", "damaged or not DICOM"),
        (good[:-40_000], "damaged pixel data"),
        (cine[: len(cine) // 2], "no pixels"),
        (good.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"), "deflated"),
        (changed(NumberOfFrames=1, PixelData=encapsulate([jpeg.getvalue()])), "5000 x 4000"),
        (changed(NumberOfFrames=10**6), "1000000 frames, at most 10000"),
        (changed(Rows=60_000, Columns=60_000), "60000 x 60000 pixels, at most 1000000"),
    ]
    dataset.file_meta.TransferSyntaxUID = MPEG4HP41
    cases.append((changed(Rows=480, Columns=640, NumberOfFrames=1), "is not supported"))
    for data, reason in cases:
        with pytest.raises(ValueError, match=reason) as refused:
            read(data)
        assert "\n" not in str(refused.value)
        assert refused.value.__cause__ is None
    with pytest.raises(ValueError, match="no pixels"):
        read(real("rtplan"))
