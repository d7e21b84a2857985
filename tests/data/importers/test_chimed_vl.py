from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_lines, json_list

IMAGES = {f"images/{name}.jpg": picture(i) for i, name in enumerate("abc")}
SAID = [{"from": "human", "value": "<image>\n描述图像"}, {"from": "gpt", "value": "肝囊肿。"}]
ASKED = [{"role": "user", "content": "<image>描述"}, {"role": "assistant", "content": "囊肿。"}]
ROWS = [
    {"id": 1, "image": "a.jpg", "conversations": SAID},
    {"id": 2, "images": ["b.jpg", "c.jpg"], "messages": ASKED},
    {"id": 3, "image": "c.jpg", "caption": "右肾结石。"},
    {"id": 4, "conversatons": SAID},
    {"id": 5, "image": "a.jpg"},
    {"id": 6, "image": "a.jpg", "caption": ""},
    {"id": 7, "image": "gone.jpg", "text": "左肾结石。"},
]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("ChiMed-VL-Alignment.jsonl", "align"),
        ("ChiMed-VL-Instruction.json", "instruct"),
        ("ChiMed-VL-Chat.json", "instruct"),
        ("part.json", "align"),
    ],
)
def test_rows_of_three_kinds_for_the_stage_of_the_file(
    tmp_path: Path, name: str, stage: str
) -> None:
    data = (json_lines if name.endswith("l") else json_list)(ROWS)
    images = f"{tmp_path}/set/images"
    default = stage if name == "part.json" else "instruct"
    found = import_set(
        tmp_path, "chimed-vl", name, {name: data, **IMAGES}, images_uri=images, stage=default
    )
    counts = found.counts
    assert (counts.exams, counts.frames, counts.quarantined) == (3, 4, 4)
    assert counts.notes == {"image markers that are not as many as the images": 1}
    said, asked, captioned = found.exams.values()
    assert [e.conversations[0].stage for e in (said, asked)] == [stage, stage]
    assert said.conversations[0].turns[0].content == "描述图像"
    assert (captioned.findings, captioned.conversations) == ("右肾结石。", ())
    assert {exam.modality for exam in found.exams.values()} == {"OT"}
    assert found.reasons == [
        ("4", "no frames: the list is empty"),
        ("5", "missing keys: conversations"),
        ("6", "wrong values: caption: empty"),
        ("7", "missing file: gone.jpg"),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": 1, "messages": 7}, "wrong values: messages: "),
        ({"id": 1, "image": "../a.jpg", "caption": "x"}, "path outside the folder: '../a.jpg'"),
        ({"id": 1, "image": {}, "caption": "x"}, "wrong values: image: "),
        ({"id": 1, "image": "a.jpg", "report": ["x"]}, "wrong values: report: "),
        ({"id": 1, "image": "a.jpg", "conversations": SAID[1:]}, "bad conversation: turn 1 must"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    found = import_set(tmp_path, "chimed-vl", "c.json", {"c.json": json_list([row])})
    ((_, why),) = found.reasons
    assert why.startswith(reason)
