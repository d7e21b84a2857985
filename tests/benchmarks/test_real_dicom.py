"""What becomes of every real ultrasound file, as reference and reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.real_dicom import bring_in, to_markdown, ultrasound_files
from ultra.data.ocr import open_reader

NO_REGION = "no ultrasound region says where the tissue is"
UNREAD = "something like text at"
FULL = "text covers 20% of the region"
LETTERS = "OCR found text, masked"

EXPECTED: dict[str, tuple[str, int, str]] = {
    # file: (reason without OCR, frames with OCR, what is said of them with OCR)
    "ExplVR_BigEnd.dcm": (NO_REGION, 0, NO_REGION),
    "JPGLosslessP14SV1_1s_1f_8b.dcm": (UNREAD, 1, LETTERS),  # its header denies its text
    "OBXXXX1A.dcm": (UNREAD, 1, LETTERS),
    "OBXXXX1A_2frame.dcm": (UNREAD, 0, FULL),
    "OBXXXX1A_expb.dcm": (UNREAD, 1, LETTERS),
    "OBXXXX1A_expb_2frame.dcm": (UNREAD, 0, FULL),
    "OBXXXX1A_rle.dcm": (UNREAD, 1, LETTERS),
    "OBXXXX1A_rle_2frame.dcm": (UNREAD, 0, FULL),
    "US1_J2KI.dcm": (NO_REGION, 0, NO_REGION),
    "US1_J2KR.dcm": (NO_REGION, 0, NO_REGION),
    "US1_UNCI.dcm": (NO_REGION, 0, NO_REGION),
    "US1_UNCR.dcm": (NO_REGION, 0, NO_REGION),
    "color-pl.dcm": (NO_REGION, 0, NO_REGION),
    "color-px.dcm": (NO_REGION, 0, NO_REGION),
    "color3d_jpeg_baseline.dcm": ("", 16, "static check and OCR over time"),
    "examples_jpeg2k.dcm": (NO_REGION, 0, NO_REGION),
    "examples_palette.dcm": ("(120, 60) to (800, 518) does not fit", 0, "does not fit the image"),
    "examples_rgb_color.dcm": (NO_REGION, 0, NO_REGION),
    "examples_ybr_color.dcm": ("(84, 31) to (595, 414) does not fit", 0, "does not fit the image"),
    "gdcm-US-ALOKA-16.dcm": (UNREAD, 2, LETTERS),  # two panes
    "gdcm-US-ALOKA-16_big.dcm": (UNREAD, 2, LETTERS),
}


@pytest.fixture(scope="module")
def files() -> dict[str, Path]:
    return {path.name: path for path in ultrasound_files()}


def test_every_file_is_known(files: dict[str, Path]) -> None:
    assert sorted(files) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_without_letters_read_only_the_cine_can_be_shown_to_be_clean(
    files: dict[str, Path], name: str
) -> None:
    reason, *_ = EXPECTED[name]
    outcome = bring_in(files[name], None)
    assert outcome.frames == (0 if reason else 16)
    assert reason in outcome.said


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_with_letters_read_they_are_masked_or_the_file_is_refused(
    files: dict[str, Path], name: str
) -> None:
    _, frames, said = EXPECTED[name]
    outcome = bring_in(files[name], open_reader("require"))
    assert outcome.frames == frames
    assert said in outcome.said


def test_the_table_is_for_people() -> None:
    row = {
        "file": "a.dcm", "machine": "X", "pixels": "3 x 2, 1", "colours": "RGB", "annotation": "",
        "regions": 1, "ocr": {"frames": 2, "said": "clean"}, "plain": {"frames": 0, "said": "why"},
    }  # fmt: skip
    assert to_markdown([row]).splitlines()[-1] == (
        "| `a.dcm` | X | 3 x 2, 1 (RGB) | 1 | nothing | **2 frames**: clean | refused: why |"
    )
