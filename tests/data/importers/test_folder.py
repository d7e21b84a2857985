from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import exam_line, write_folder
from ultra import storage
from ultra.config import DataConfig
from ultra.data.importers.entry import ExamEntry
from ultra.data.importers.folder import list_exams
from ultra.data.importers.reader import read_exam


def entries(folder: str) -> list[ExamEntry]:
    return list(list_exams(DataConfig(format="folder", source_uri=folder)))


def test_a_line_becomes_an_entry(tmp_path: Path) -> None:
    line = exam_line("E1", ["a.jpg", "sub/b.png"], history="体检。", patient_id=17)
    assert entries(write_folder(tmp_path, [line], {})) == [
        ExamEntry(
            source="exams.jsonl line 1",
            exam_id="E1",
            patient_id="17",
            site="肝脏",
            history="体检。",
            findings="所见 E1",
            diagnosis="肝囊肿",
            frames=("a.jpg", "sub/b.png"),
        )
    ]


@pytest.mark.parametrize(
    ("text", "exam_id", "reason"),
    [
        ("{", "exams.jsonl line 1", "malformed line: not JSON"),
        ("[" * 100_000, "exams.jsonl line 1", "malformed line: not JSON"),
        ("[1]", "exams.jsonl line 1", "malformed line: not a JSON object"),
        ('{"exam_id": "E9"}', "E9", "missing keys: patient_id, site, findings, diagnosis, frames"),
        (exam_line("E9", [], frames="a.jpg"), "E9", "wrong values: frames: "),
        (exam_line("E9", [], frames=[1, None]), "E9", "wrong values: frames.1: "),
        (exam_line("E9", ["a"], site=None), "E9", "wrong values: site: input should be a valid s"),
        (exam_line("E9", ["a"], patient_id=True), "E9", "wrong values: patient_id: "),
        (exam_line("", ["a"]), "exams.jsonl line 1", "wrong values: exam_id: "),
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
def test_a_bad_line_says_what_is_wrong(
    tmp_path: Path, text: Any, exam_id: str, reason: str
) -> None:
    line = text if isinstance(text, str) else json.dumps(text)
    (entry,) = entries(write_folder(tmp_path, [line], {}))
    assert entry.exam_id == exam_id
    assert entry.reason.startswith(reason)
    with pytest.raises(ValueError, match=reason.split(":")[0]):
        read_exam(entry, DataConfig(source_uri=str(tmp_path)))


def test_half_a_report_is_enough(tmp_path: Path) -> None:
    (entry,) = entries(write_folder(tmp_path, [exam_line("E9", ["a"], findings="")], {}))
    assert entry.reason == ""


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    line = "\ufeff" + json.dumps(exam_line("E1", ["a.jpg"]))
    (entry,) = entries(write_folder(tmp_path, [line], {}))
    assert (entry.exam_id, entry.reason) == ("E1", "")


def test_a_folder_without_an_index_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(storage.StorageError, match=r"exams.jsonl") as refused:
        entries(str(tmp_path))
    assert "\n" not in str(refused.value)
