from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.importers.test_dicom import file_of
from ultra import storage
from ultra.config import DataConfig
from ultra.data.importers.dicom_table import list_exams
from ultra.data.importers.entry import ExamEntry, patient_key
from ultra.data.importers.reader import MissingFiles, read_exam

FILES = {
    "s1/1.dcm": file_of("1.2.7", "P1", AccessionNumber="A7", BodyPartExamined="LIVER"),
    "s1/2.dcm": file_of("1.2.7", "P1", seed=1, AccessionNumber="A7"),
    "s2/1.dcm": file_of("1.2.8", "P2", seed=2, AccessionNumber="A8"),
    "s3/1.dcm": file_of("1.2.9", "P3", seed=3),
}


def entries(folder: Path, name: str, table: bytes) -> tuple[DataConfig, list[ExamEntry]]:
    for path, data in {**FILES, name: table}.items():
        storage.write_bytes(f"{folder}/{path}", data)
    config = DataConfig(
        format="dicom-table", source_uri=f"{folder}/{name}", patient_key_secret="key"
    )
    return config, list(list_exams(config))


def test_chinese_columns_name_studies_by_accession(tmp_path: Path) -> None:
    table = "\ufeff检查号,部位,所见,提示\nA7,,见囊肿,囊肿\nA8,甲状腺,回声均匀,未见异常\n".encode()
    config, (first, second, left) = entries(tmp_path, "reports.csv", table)
    assert first == ExamEntry(
        source="reports.csv line 2",
        exam_id=patient_key("A7", "key"),
        patient_id=patient_key("P1", "key"),
        site="肝脏",
        findings="见囊肿",
        diagnosis="囊肿",
        frames=("s1/1.dcm", "s1/2.dcm"),
    )
    assert (second.site, second.frames) == ("甲状腺", ("s2/1.dcm",))
    assert left.reason == "no report: no row of the table names this study"
    assert len(read_exam(first, config).group.frames) == 2


@pytest.mark.parametrize(
    ("row", "frames"),
    [
        ({"study_uid": "1.2.7"}, ("s1/1.dcm", "s1/2.dcm")),
        ({"accession": "A8"}, ("s2/1.dcm",)),
        ({"path": "s1"}, ("s1/1.dcm", "s1/2.dcm")),
        ({"path": "s1/2.dcm"}, ("s1/2.dcm",)),
        ({"path": "s1/2.dcm; s1/1.dcm"}, ("s1/2.dcm", "s1/1.dcm")),
    ],
)
def test_a_row_names_its_files_in_three_ways(
    tmp_path: Path, row: dict[str, str], frames: tuple[str, ...]
) -> None:
    line = json.dumps({"exam_id": "E1", "findings": "见囊肿", **row}).encode()
    _, (entry, *_) = entries(tmp_path, "reports.jsonl", line)
    assert (entry.frames, entry.reason) == (frames, "")
    assert entry.exam_id == patient_key("E1", "key")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing keys: one of path, study_uid, accession must say which files"),
        ({"accession": "A99"}, "no DICOM: no ultrasound file has the row's accession"),
        ({"study_uid": "9.9"}, "no DICOM: no ultrasound file has the row's study_uid"),
        ({"path": "s1; s2"}, "several patients: in the files of one exam"),
        ({"path": "../s1"}, "path outside the folder: '../s1'"),
        ({"path": "s1", "findings": ""}, "empty report: neither findings nor diagnosis"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(
    tmp_path: Path, row: dict[str, str], reason: str
) -> None:
    line = json.dumps({"exam_id": "E1", "findings": "见囊肿", **row}).encode()
    _, (entry, *_) = entries(tmp_path, "reports.jsonl", line)
    assert entry.reason == reason


def test_a_file_that_is_not_there_is_a_missing_one(tmp_path: Path) -> None:
    line = json.dumps({"exam_id": "E1", "findings": "见囊肿", "path": "s1;s7/1.dcm"}).encode()
    config, (entry, *_) = entries(tmp_path, "reports.jsonl", line)
    with pytest.raises(MissingFiles, match=r"missing file: s7/1\.dcm"):
        read_exam(entry, config)
