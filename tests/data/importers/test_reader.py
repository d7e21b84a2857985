from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from pydicom.data import get_testdata_file

from tests.data.exam_folders import exam_line, picture, write_folder
from ultra.config import DataConfig
from ultra.data.frames import check_image, is_jpeg
from ultra.data.importers.entry import ExamEntry, patient_key
from ultra.data.importers.folder import list_exams
from ultra.data.importers.reader import ImportedExam, MissingFiles, images_uri, read_exam
from ultra.types import Conversation, Turn


def signed(folder: str, **changes: object) -> DataConfig:
    return DataConfig.model_validate(
        {
            "format": "folder",
            "source_uri": folder,
            "assume_deidentified": "Dr. Wang, 2026-01-05",
            "patient_key_secret": "key",
            **changes,
        }
    )


def read_one(folder: str, **changes: object) -> ImportedExam:
    config = signed(folder, **changes)
    (entry,) = list_exams(config)
    return read_exam(entry, config)


def real(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path, name
    return Path(path).read_bytes()


def test_an_exam_of_images_becomes_a_frame_group(tmp_path: Path) -> None:
    line = exam_line("E1", ["a.jpg", "sub/b.png"], history="体检。", patient_id=17)
    files = {"a.jpg": picture(1), "sub/b.png": picture(2, "PNG")}
    imported = read_one(write_folder(tmp_path, [line], files))
    group = imported.group
    assert (group.exam_id, group.site, group.history) == ("E1", "肝脏", "体检。")
    assert (group.findings, group.diagnosis, group.modality) == ("所见 E1", "肝囊肿", "US")
    assert group.frame_sources == ("1", "2")
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
    imported = read_one(folder, max_frames=5)
    assert imported.group.frame_sources[:2] == ("1", "2#0")
    assert len(imported.group.frames) == 5
    assert imported.num_duplicates == 52
    assert imported.evidence[0].startswith("stated by")
    assert imported.evidence[1].startswith("cropped to (84, 31) to (595, 414); static check")


def test_near_duplicate_images_are_dropped_and_counted(tmp_path: Path) -> None:
    files = {"a.png": picture(1, "PNG"), "b.png": picture(1, "PNG"), "c.png": picture(3, "PNG")}
    imported = read_one(write_folder(tmp_path, [exam_line("E1", list(files))], files))
    assert imported.group.frame_sources == ("1", "3")
    assert imported.num_duplicates == 1


def test_a_dicom_needs_no_statement_and_an_image_does(tmp_path: Path) -> None:
    files = {"a.png": picture(1, "PNG"), "b.dcm": real("color3d_jpeg_baseline.dcm")}
    lines = [exam_line("E1", ["a.png"]), exam_line("E2", ["b.dcm"])]
    unsigned = signed(write_folder(tmp_path, lines, files), assume_deidentified="", max_frames=3)
    image, dicom = list_exams(unsigned)
    with pytest.raises(ValueError, match=r"identity not excluded: a.png: .*assume_deidentified"):
        read_exam(image, unsigned)
    assert len(read_exam(dicom, unsigned).group.frames) == 3


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
    files = {} if data is None else {"a.jpg": data}
    folder = write_folder(tmp_path, [exam_line("E1", ["a.jpg"])], files)
    with pytest.raises(ValueError, match=reason) as refused:
        read_one(folder, max_frame_bytes=40_000, max_frame_pixels=100_000)
    assert "\n" not in str(refused.value)
    assert folder not in str(refused.value)


def test_every_missing_file_is_counted_and_the_first_is_named(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, [exam_line("E1", ["a.jpg", "no.jpg", "x/no.jpg"])], {"a.jpg": picture(1)}
    )
    with pytest.raises(MissingFiles, match=r"^missing file: no\.jpg and 1 more$") as refused:
        read_one(folder)
    assert refused.value.paths == ["no.jpg", "x/no.jpg"]


def test_texts_and_ids_come_without_identities(tmp_path: Path) -> None:
    line = exam_line(
        "20240317065",
        ["a.jpg"],
        site="肝脏 检查医师：王小明",
        history="患者姓名：张建国，电话13912345678。",
        findings="肝右叶见12mm囊肿，2024年3月17日复查。",
        diagnosis="肝囊肿。",
    )
    imported = read_one(write_folder(tmp_path, [line], {"a.jpg": picture(1)}))
    group = imported.group
    assert group.exam_id == patient_key("20240317065", "key")
    assert group.site == "肝脏 检查医师：[姓名]"
    assert group.history == "患者姓名：[姓名]，电话[电话]。"
    assert group.findings == "肝右叶见12mm囊肿，[日期]复查。"
    assert group.diagnosis == "肝囊肿。"
    assert imported.scrubbed == {"exam_id": 1, "姓名": 2, "电话": 1, "日期": 1}


def test_conversations_come_without_identities(tmp_path: Path) -> None:
    config = signed(write_folder(tmp_path, [], {"a.jpg": picture(1)}))
    turns = (Turn("user", "患者姓名：李四海。病变是什么？"), Turn("assistant", "囊肿。"))
    entry = ExamEntry(
        "x line 1", "E1", "P1", frames=("a.jpg",),
        conversations=(Conversation("instruct", "kind", turns, question_id="7"),),
    )  # fmt: skip
    (conversation,) = read_exam(entry, config).group.conversations
    assert conversation.turns[0].content == "患者姓名：[姓名]。病变是什么？"
    assert (conversation.turns[1], conversation.question_id) == (turns[1], "7")


@pytest.mark.parametrize(
    ("source", "images", "expected"),
    [
        ("s3://b/set", "", "s3://b/set"),
        ("s3://b/set/train.json", "", "s3://b/set"),
        ("train.jsonl", "", "."),
        ("s3://b/set/train.json", "s3://b/images", "s3://b/images"),
    ],
)
def test_paths_of_frames_begin_beside_the_annotations(
    source: str, images: str, expected: str
) -> None:
    assert images_uri(DataConfig(source_uri=source, images_uri=images)) == expected
