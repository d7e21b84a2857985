from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.importers.importing import config_of, import_set, write_set
from tests.data.videos import film
from ultra.data.importers.entry import patient_key
from ultra.data.prepare import list_entries
from ultra.storage import StorageError

HEADER = (
    "Filename,Patient ID,Label,Zone,B-lines,Pleural_effusion,Age,Doctor 1 comment,"
    "Doctor 2 comment,License,split\n"
)
FILMS = {
    "cov/a.mp4": film("mp4", [1, 2, 2, 3]),
    "cov/b.gif": film("gif", [4, 5]),
    "c.avi": film("avi", [6, 7, 8]),
}


def test_a_table_of_lung_ultrasound(tmp_path: Path) -> None:
    table = HEADER + (
        'cov/a.mp4,P1,covid,R1,1,0,1,"Thick, irregular line",,CC-BY,train\n'
        "cov/b.gif,P1,healthy,R2,0,0,40,Normal.,A-lines.,CC-BY,Train\n"
        "c.avi,P2,,L1,1.0,1,,,,CC0,TEST\n"
        "c.avi,P2,,L1,0,0,,,,CC0,test\n"
        "gone.mp4,P2,covid,L1,0,0,,,,CC0,test\n"
        "cov/b.gif,P2,covid,L1,0,0,,,,CC0,later\n"
        "c.avi,P2,covid,L1,0,0,,,,CC0,test\n"
        ",P2,covid,L1,0,0,,,,CC0,test\n"
    )
    found = import_set(tmp_path, "video", "t.csv", {"t.csv": table.encode(), **FILMS})
    counts = found.counts
    assert (counts.exams, counts.frames, counts.duplicates_dropped) == (3, 8, 1)
    assert counts.splits == {"test": 1, "train": 2}
    one, two, three = found.exams.values()
    assert one.findings == "B-lines; Thick, irregular line"
    assert (one.diagnosis, one.site, one.split) == ("covid", "R1", "train")
    assert one.frame_sources == ("1#0", "1#1", "1#3")
    assert one.patient_key == two.patient_key == patient_key("P1", "key") != three.patient_key
    assert two.findings == "Normal.; A-lines."
    assert (three.findings, three.diagnosis, three.split) == (
        "B-lines; Pleural effusion",
        "",
        "test",
    )
    assert not any(re.search(r"\d|cov", exam_id) for exam_id in found.exams)
    assert counts.scrubbed == {}
    assert [reason for _, reason in found.reasons] == [
        "empty report: neither findings nor diagnosis",
        "missing file: gone.mp4",
        "wrong values: split: 'later' is none",
        "duplicate exam_id: also at t.csv line 4",
        "wrong values: filename: empty",
    ]


def test_a_table_of_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "video": "c.avi", "诊断": "正常", "所见": "A线。", "肺泡": False, "年龄": None},
        {"id": 2, "video": "c.avi", "consolidation": True, "report": float("nan")},
        {"id": 3, "video": ["c.avi"], "label": "x"},
        {"id": 4, "video": "../c.avi", "label": "x"},
        {"id": 5, "label": "x"},
        {"id": 6, "video": "c.avi", "label": "x", "report": "\ud800"},
        {"id": 7, "video": "c.avi", "label": "x", "B\0-lines": 1},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    found = import_set(tmp_path, "video", "t.jsonl", {"t.jsonl": lines, **FILMS})
    assert [(e.findings, e.diagnosis) for e in found.exams.values()] == [
        ("A线。", "正常"),
        ("consolidation", ""),
    ]
    assert found.reasons == [
        ("3", "wrong values: video: input should be a valid string"),
        ("4", "path outside the folder: '../c.avi'"),
        ("5", "missing keys: filename"),
        (
            "6",
            "wrong values: findings and comments: input should be a valid string, unable to parse "
            "raw data as a unicode string",
        ),
        ("7", "wrong values: findings and comments: control characters"),
    ]


def test_a_tree_keeps_a_folder_together(tmp_path: Path) -> None:
    files = {**FILMS, "notes.txt": b"", "cov/cut.mp4": FILMS["cov/a.mp4"][:-300]}
    found = import_set(tmp_path, "video", "", files)
    assert (found.counts.exams, found.counts.frames, found.counts.quarantined) == (3, 8, 1)
    alone, first, second = found.exams.values()
    assert alone.patient_key != first.patient_key == second.patient_key == patient_key("cov", "key")
    ((_, reason),) = found.reasons
    assert reason == "unreadable video: cov/cut.mp4: damaged or cut short"


def test_links_in_a_circle_give_each_video_once(tmp_path: Path) -> None:
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "self.mp4").symlink_to("self.mp4")
    found = import_set(tmp_path, "video", "", {"a/x.gif": FILMS["cov/b.gif"]})
    assert (found.counts.exams, found.reasons) == (1, [])


def test_a_tree_on_an_object_store(s3_bucket: str) -> None:
    found = import_set(f"{s3_bucket}/videos", "video", "", FILMS)
    assert (found.counts.exams, found.counts.frames, found.reasons) == (3, 8, [])


def test_a_name_in_another_encoding_is_told(tmp_path: Path) -> None:
    write_set(tmp_path, {"good.gif": FILMS["cov/b.gif"]})
    with open(os.fsencode(tmp_path / "set") + b"/" + "肝.gif".encode("gb18030"), "wb") as file:
        file.write(FILMS["cov/b.gif"])
    found = import_set(tmp_path, "video", "", {})
    assert found.counts.exams == 1
    ((_, reason),) = found.reasons
    assert reason == "path of no file: '\\udcb8\\udcce.gif'"


def test_videos_need_a_statement(tmp_path: Path) -> None:
    found = import_set(tmp_path, "video", "", {"a.gif": FILMS["cov/b.gif"]}, assume_deidentified="")
    ((_, reason),) = found.reasons
    assert reason == (
        "identity not excluded: a.gif: a plain image or video needs data.assume_deidentified"
    )


def test_a_folder_that_does_not_exist_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        list(list_entries(config_of(tmp_path, "video")))
