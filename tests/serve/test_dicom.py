"""DICOM files opened for the page."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydicom.data import get_testdata_file

from tests.data.test_dicom import REGION, dicom_bytes, pixels_of, region, tissue, written
from ultra.data import ocr
from ultra.data.dicom import read_dicom
from ultra.serve import dicom
from ultra.serve.dicom import open_dicom
from ultra.serve.limits import ApiError, Limits

LIMITS = Limits(max_frames=5)


def real(name: str) -> bytes:
    path = get_testdata_file(f"{name}.dcm", download=False)
    assert path, name
    with open(path, "rb") as file:
        return file.read()


def test_frames_are_those_of_prepare() -> None:
    data = real("color3d_jpeg_baseline")
    options = {"max_pixels": 10**6, "max_frames": 5, "duplicate_threshold": 2.0}
    found = read_dicom(data, "", **options, reader=ocr.open_reader("auto"))
    listed = open_dicom(data, LIMITS)["data"]
    assert [base64.b64decode(frame["url"].partition(",")[2]) for frame in listed] == [*found.frames]
    assert [frame["source"] for frame in listed] == [*found.frame_sources]
    assert [frame["evidence"] for frame in listed] == [*found.evidence]
    assert {frame["url"].partition(",")[0] for frame in listed} == {"data:image/jpeg;base64"}


@pytest.fixture(scope="module")
def named() -> bytes:
    """A still with a name in its region."""
    return dicom_bytes(written(tissue(1)[0], "ZHANG SAN", (120, 60))[None], region(*REGION))


def test_a_still_with_letters_is_let_in_without_them(named: bytes, tmp_path: Path) -> None:
    from tests.serve.stand_in import run_stand_in

    with run_stand_in(tmp_path / "log", {"max_image_pixels": 10**6}) as (address, _):
        reply = httpx.post(f"{address}/v1/frames", content=named, timeout=60)
    assert reply.status_code == 200, reply.text
    (frame,) = reply.json()["data"]
    assert "OCR found text, masked" in frame["evidence"]
    options = {"max_pixels": 10**6, "max_frames": 5, "duplicate_threshold": 2.0}
    (prepared,) = read_dicom(named, "", **options, reader=ocr.read_letters).frames
    shown = base64.b64decode(frame["url"].partition(",")[2])
    assert shown == prepared
    letters = np.s_[60 - 30 + 4 : 60 - 30 + 13, 120 - 20 + 2 : 120 - 20 + 60]
    assert not pixels_of(shown)[letters].any()
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert "ZHANG" not in log
    assert "rapidocr" not in log.lower()


def test_without_a_reader_a_still_with_letters_is_refused(
    named: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr, "find_spec", lambda name: None)
    with pytest.raises(ApiError, match="text") as raised:
        open_dicom(named, Limits(max_image_pixels=10**6))
    assert raised.value.code == "dicom_refused"


def test_several_panes_do_not_come_to_more_than_a_question_may_hold(monkeypatch) -> None:
    def read_more(*args, **options):
        return read_dicom(*args, **{**options, "max_frames": 5})

    monkeypatch.setattr(dicom, "read_dicom", read_more)
    assert len(open_dicom(real("color3d_jpeg_baseline"), Limits(max_frames=3))["data"]) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\xff\xd8\xff", "not a DICOM file"),
        (real("examples_ybr_color"), "region"),
        (real("examples_ybr_color")[:9000], "no pixels"),
    ],
)
def test_what_prepare_would_refuse_is_refused(data, reason) -> None:
    with pytest.raises(ApiError, match=reason) as raised:
        open_dicom(data, LIMITS)
    assert raised.value.status == 400


def test_a_cine_that_would_take_too_long_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(dicom, "MAX_TOTAL_PIXELS", 119 * 480 * 640)
    with pytest.raises(ApiError, match=r"120 frames of 640 x 480 pixels, at most 36556800"):
        open_dicom(real("color3d_jpeg_baseline"), LIMITS)
