from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from pydicom.data import get_testdata_file

from tests.data.exam_folders import exam_line, picture, write_folder
from ultra import storage
from ultra.config import DataConfig
from ultra.data.frames import check_image, is_jpeg
from ultra.data.importers.folder import list_exams, parse_line, patient_key, read_exam

SIGNED = DataConfig(
    source="folder", assume_deidentified="Dr. Wang, 2026-01-05", patient_key_secret="key"
)


def real(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path, name
    return Path(path).read_bytes()


def test_an_exam_of_images_becomes_a_frame_group(tmp_path: Path) -> None:
    line = exam_line("E1", ["a.jpg", "sub/b.png"], history="体检。", patient_id=17)
    folder = write_folder(tmp_path, [line], {"a.jpg": picture(1), "sub/b.png": picture(2, "PNG")})
    (entry,) = list_exams(folder)
    imported = read_exam(entry, folder, SIGNED)
    group = imported.group
    assert (group.exam_id, group.site, group.history) == ("E1", "肝脏", "体检。")
    assert (group.findings, group.diagnosis, group.modality) == ("所见 E1", "肝囊肿", "US")
    assert group.frame_sources == ("a.jpg", "sub/b.png")
    assert group.frame_sizes == ((48, 32), (48, 32))
    assert group.valid is None
    assert [is_jpeg(frame) for frame in group.frames] == [True, False]
    assert check_image(group.frames[0], max_bytes=10**6, max_pixels=10**6) == (48, 32)
    assert imported.evidence == ("stated by Dr. Wang, 2026-01-05",) * 2
    assert imported.num_duplicates == 0
    expected = hmac.new(b"key", b"17", hashlib.sha256).hexdigest()[:16]
    assert group.patient_key == expected == patient_key("17", "key")
    assert patient_key("17", "other") != expected


def test_the_kind_of_a_file_follows_from_its_content(tmp_path: Path) -> None:
    files = {"a.dcm": picture(1), "b.jpg": real("color3d_jpeg_baseline.dcm")}
    folder = write_folder(tmp_path, [exam_line("E1", ["a.dcm", "b.jpg"])], files)
    (entry,) = list_exams(folder)
    imported = read_exam(entry, folder, SIGNED.model_copy(update={"max_frames": 5}))
    assert imported.group.frame_sources[:2] == ("a.dcm", "b.jpg#0")
    assert len(imported.group.frames) == 5
    assert imported.num_duplicates == 52
    assert imported.evidence[0].startswith("stated by")
    assert imported.evidence[1].startswith("cropped to (84, 31) to (595, 414); static check")


def test_near_duplicate_images_are_dropped_and_counted(tmp_path: Path) -> None:
    files = {"a.png": picture(1, "PNG"), "b.png": picture(1, "PNG"), "c.png": picture(3, "PNG")}
    folder = write_folder(tmp_path, [exam_line("E1", list(files))], files)
    (entry,) = list_exams(folder)
    imported = read_exam(entry, folder, SIGNED)
    assert imported.group.frame_sources == ("a.png", "c.png")
    assert imported.num_duplicates == 1


def test_a_dicom_needs_no_statement_and_an_image_does(tmp_path: Path) -> None:
    files = {"a.png": picture(1, "PNG"), "b.dcm": real("color3d_jpeg_baseline.dcm")}
    lines = [exam_line("E1", ["a.png"]), exam_line("E2", ["b.dcm"])]
    folder = write_folder(tmp_path, lines, files)
    unsigned = SIGNED.model_copy(update={"assume_deidentified": "", "max_frames": 3})
    image, dicom = list_exams(folder)
    with pytest.raises(ValueError, match=r"identity not excluded: a.png: .*assume_deidentified"):
        read_exam(image, folder, unsigned)
    assert len(read_exam(dicom, folder, unsigned).group.frames) == 3


@pytest.mark.parametrize(
    ("text", "exam_id", "reason"),
    [
        ("{", "line 7", "malformed line: not JSON"),
        ("[" * 100_000, "line 7", "malformed line: not JSON"),
        ("[1]", "line 7", "malformed line: not a JSON object"),
        ('{"exam_id": "E9"}', "E9", "missing keys: patient_id, site, findings, diagnosis, frames"),
        (exam_line("E9", [], frames="a.jpg"), "E9", "wrong values: frames must be a list of paths"),
        (exam_line("E9", ["a"], site=None), "E9", "wrong values: site must be a text"),
        (exam_line("", ["a"]), "line 7", "wrong values: exam_id must be a text or number"),
        (exam_line("E9", ["a"], findings=" ", diagnosis=""), "E9", "empty report: neither"),
        (exam_line("E9", []), "E9", "no frames: the list is empty"),
        (exam_line("E9", ["a"] * 1025), "E9", "over the caps: 1025 files"),
        (exam_line("E9", ["ok.jpg", "../x.jpg"]), "E9", "path outside the folder: '../x.jpg'"),
        (exam_line("E9", ["sub/../../x.jpg"]), "E9", "path outside the folder"),
        (exam_line("E9", ["/etc/passwd"]), "E9", "path outside the folder: '/etc/passwd'"),
        (exam_line("E9", ["s3://other/x.jpg"]), "E9", "path outside the folder"),
        (exam_line("E9", ["C:\\x.jpg"]), "E9", "path outside the folder"),
        (exam_line("E9", ["..\\x.jpg"]), "E9", "path outside the folder"),
        (exam_line("E9", [""]), "E9", "path outside the folder"),
    ],
)
def test_a_bad_line_says_what_is_wrong(text: Any, exam_id: str, reason: str) -> None:
    entry = parse_line(7, text if isinstance(text, str) else json.dumps(text))
    assert entry.exam_id == exam_id
    assert entry.reason.startswith(reason)
    with pytest.raises(ValueError, match=reason.split(":")[0]):
        read_exam(entry, "nowhere", SIGNED)


def test_half_a_report_is_enough() -> None:
    line = exam_line("E9", ["a"], findings="")
    assert parse_line(1, json.dumps(line)).reason == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "missing file: a.jpg"),
        (picture(1)[:-40], "unreadable image: a.jpg: damaged or cut short"),
        (b"text", "unreadable image: a.jpg: no JPEG or PNG"),
        (picture(1, size=(640, 480)), "unreadable image: a.jpg: 640 x 480 pixels"),
        (bytes(40_001), "over the caps: a.jpg: more than the 40000 bytes"),
        (real("examples_ybr_color.dcm"), "unsafe or unreadable DICOM: a.jpg: region"),
        (real("examples_ybr_color.dcm")[:9000], "unsafe or unreadable DICOM: a.jpg: no pixels"),
    ],
)
def test_a_bad_file_says_which_and_why(tmp_path: Path, data: bytes | None, reason: str) -> None:
    folder = write_folder(
        tmp_path, [exam_line("E1", ["a.jpg"])], {} if data is None else {"a.jpg": data}
    )
    (entry,) = list_exams(folder)
    config = SIGNED.model_copy(update={"max_frame_bytes": 40_000, "max_frame_pixels": 100_000})
    with pytest.raises(ValueError, match=reason) as refused:
        read_exam(entry, folder, config)
    assert "\n" not in str(refused.value)
    assert folder not in str(refused.value)


def test_the_second_of_two_exams_with_one_id_is_bad(tmp_path: Path) -> None:
    lines = [exam_line("E1", ["a.jpg"]), "", exam_line("E2", ["a.jpg"]), exam_line("E1", ["a.jpg"])]
    found = list(list_exams(write_folder(tmp_path, lines, {})))
    assert [(entry.line, entry.exam_id) for entry in found] == [(1, "E1"), (3, "E2"), (4, "E1")]
    assert [entry.reason for entry in found] == ["", "", "duplicate exam_id: also on line 1"]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    line = "\ufeff" + json.dumps(exam_line("E1", ["a.jpg"]))
    (entry,) = list_exams(write_folder(tmp_path, [line], {}))
    assert (entry.exam_id, entry.reason) == ("E1", "")


def test_a_folder_without_an_index_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match=r"exams.jsonl") as refused:
        list(list_exams(str(tmp_path)))
    assert "\n" not in str(refused.value)
