from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_list


def note(image_id: Any, caption: Any = "心影不大，双肺清晰。") -> dict[str, Any]:
    return {"image_id": image_id, "caption": caption}


def test_groups_are_rebuilt_and_conflicts_counted(tmp_path: Path) -> None:
    rows = [
        note("162_1"),
        note("163_1", "双肺清晰。如果您有任何问题或担忧，请咨询医生。"),
        note("162_2"),
        note("164_1"),
        note("162_3", "心脏大小正常。"),
        note("165"),
        note("166_1", ""),
        note("166_2"),
        note("167_1"),
        note("162_1"),
    ]
    names = ("162_1", "162_2", "162_3", "163_1", "164_1", "165", "166_2")
    files = {f"{name}.png": picture(i, "PNG") for i, name in enumerate(names)}
    data = json_list({"version": [1], "annotations": rows})
    found = import_set(tmp_path, "openi-zh", "openi-zh.json", {"openi-zh.json": data, **files})
    counts = found.counts
    assert (counts.exams, counts.frames, counts.quarantined) == (5, 8, 2)
    assert counts.notes == {"conflicting captions": 1, "leaked chatter of the translator": 1}
    exam = found.exams["162"]
    assert (exam.findings, exam.modality, len(exam.frames)) == ("心影不大，双肺清晰。", "DX", 4)
    assert list(found.exams) == ["162", "163", "164", "165", "166"]
    assert found.reasons == [
        (
            "openi-zh.json item 7",
            "wrong values: caption: empty",
        ),
        ("167", "missing file: 167_1.png"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (note("../1_1"), "path outside the folder: '../1_1.png'"),
        (note("/etc_1"), "path outside the folder: '/etc_1.png'"),
        (note(None), "wrong values: image_id: "),
        (note("1_1", ["a"]), "wrong values: caption: input should be a valid string"),
        ({"img": "1.png", "prompt": "a", "label": "b"}, "missing keys: image_id, caption"),
        (7, "malformed line: not a JSON object"),
        ([[]], "malformed line: not a JSON object"),
    ],
)
def test_a_bad_annotation_says_what_is_wrong(tmp_path: Path, row: Any, reason: str) -> None:
    files = {"o.json": json_list({"annotations": [row, note("2_1")]}), "2_1.png": picture(1)}
    found = import_set(tmp_path, "openi-zh", "o.json", files)
    ((_, why),) = found.reasons
    assert why.startswith(reason)
    assert list(found.exams) == ["2"]


def test_more_images_than_are_let_in(tmp_path: Path) -> None:
    rows = [note(f"1_{i}") for i in range(1025)]
    found = import_set(tmp_path, "openi-zh", "o.json", {"o.json": json_list({"annotations": rows})})
    ((_, why),) = found.reasons
    assert why == "over the caps: 1025 files, at most 1024 are let in"
