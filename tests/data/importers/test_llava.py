from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_lines, json_list
from ultra.types import Conversation, Turn

IMAGES = {f"{name}.jpg": picture(i) for i, name in enumerate("abc")}


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)
    ]


def test_a_list_in_both_spellings(tmp_path: Path) -> None:
    domain = {"chest_xray": False, "mri": True, "histology": False, "gross": False}
    rows = [
        {"id": 1, "image": "a.jpg", "conversations": said("<image>\n这是什么？", "囊肿。")},
        {
            "id": "2",
            "image": ["b.jpg", "c.jpg"],
            "domain": domain,
            "conversatons": said("<image>\n<image>\nWhat is it?", "A cyst.", "Where?", "Liver."),
        },
        {"id": "3", "conversations": said("你好", "你好。")},
        {"image": "c.jpg", "conversations": [{"from": "system", "value": "S"}, *said("问", "答")]},
    ]
    found = import_set(
        tmp_path, "llava", "l.json", {"l.json": json_list(rows), **IMAGES}, stage="align"
    )
    counts = found.counts
    assert (counts.exams, counts.frames, counts.quarantined) == (3, 4, 1)
    assert counts.notes == {"image markers that are not as many as the images": 1}
    assert found.reasons == [("3", "no frames: the list is empty")]
    first, second, third = found.exams.values()
    assert first.conversations == (
        Conversation(
            "align", "conversation", (Turn("user", "这是什么？"), Turn("assistant", "囊肿。"))
        ),
    )
    assert (first.modality, second.modality) == ("US", "MR")
    assert [turn.content for turn in second.conversations[0].turns] == [
        "What is it?", "A cyst.", "Where?", "Liver.",
    ]  # fmt: skip
    assert second.conversations[0].language == "en"
    assert third.exam_id == "l.json item 4"
    assert [turn.role for turn in third.conversations[0].turns] == ["system", "user", "assistant"]


def test_all_that_is_asked_about_an_image_is_one_patient_s(tmp_path: Path) -> None:
    rows = [{"id": i, "image": "a.jpg", "conversations": said("问", "答")} for i in range(4)]
    found = import_set(tmp_path, "llava", "l.jsonl", {"l.jsonl": json_lines(rows), **IMAGES})
    assert len(found.exams) == 4
    assert len({exam.patient_key for exam in found.exams.values()}) == 1


def test_what_the_exporter_adds_is_read(tmp_path: Path) -> None:
    row = {"id": 1, "image": "a.jpg", "conversations": said("问", "答"), "patient_id": "P"}
    row |= {"modality": "CT", "split": "test"}
    found = import_set(tmp_path, "llava", "l.jsonl", {"l.jsonl": json_lines([row]), **IMAGES})
    assert (found.exams["1"].modality, found.exams["1"].split) == ("CT", "test")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"conversations": None}, "wrong values: conversations: input should be a valid tuple"),
        ({"conversations": "x"}, "wrong values: conversations: input should be a valid tuple"),
        ({"conversations": []}, "bad conversation: no answer at its end"),
        ({"conversations": said("问")}, "bad conversation: no answer at its end"),
        ({"conversations": said("问", "答", "问")}, "bad conversation: no answer at its end"),
        ({"conversations": said("问", " ")}, "bad conversation: an empty answer"),
        ({"conversations": said("问", "<image>")}, "bad conversation: an empty answer"),
        ({"conversations": said("问", "答")[::-1]}, "bad conversation: turn 1 must be the user's"),
        (
            {"conversations": [*said("问", "答"), *said("问", "答")[1:]]},
            "bad conversation: turn 3 must be the user's",
        ),
        (
            {"conversations": [{"from": "tool", "value": "x"}]},
            "bad conversation: turn 1 is nobody's: 'tool'",
        ),
        ({"conversations": [{"from": "human"}]}, "missing keys: conversations.0.content"),
        ({"conversations": [{"value": "x"}]}, "missing keys: conversations.0.role"),
        ({"conversations": [7]}, "wrong values: conversations.0: input should be a valid dict"),
        ({"image": {"path": "a.jpg"}}, "wrong values: image: input should be a valid tuple"),
        ({"image": [None]}, "wrong values: image.0: input should be a valid string"),
        ({"image": "/etc/passwd"}, "path outside the folder: '/etc/passwd'"),
        ({"image": ["a.jpg", "../b.jpg"]}, "path outside the folder: '../b.jpg'"),
        ({"image": []}, "no frames: the list is empty"),
        ({"image": ""}, "no frames: the list is empty"),
        ({"image": "a\0.jpg"}, "path of no file: 'a\\x00.jpg'"),
        ({"image": "x" * 300}, "path of no file: 'xxx"),
        ({"image": "x/" * 600}, "path of no file: 'x/x/"),
        ({"image": "gone.jpg"}, "missing file: gone.jpg"),
        ({"domain": {"mri": "perhaps"}}, "wrong values: domain.mri: "),
        ({"id": [1]}, "wrong values: id: input should be a valid string"),
        ({"id": "\ud800"}, "wrong values: id: input should be a valid string, unable to parse"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    row = {"id": 1, "image": "a.jpg", "conversations": said("问", "答"), **changes}
    good = {"id": 2, "image": "a.jpg", "conversations": said("问", "答")}
    text = f"{json.dumps(row)}\n{json.dumps(good)}".encode()
    found = import_set(tmp_path, "llava", "l.jsonl", {"l.jsonl": text, **IMAGES})
    ((_, why),) = found.reasons
    assert why.startswith(reason)
    assert list(found.exams) == ["2"]
