from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_lines
from ultra.types import Conversation, Turn

IMAGES = {f"{name}.png": picture(i, "PNG") for i, name in enumerate("abc")}


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]


def test_lines_with_one_and_with_several_images(tmp_path: Path) -> None:
    rows = [
        {"id": "case001.png", "messages": said("<image>看到什么？", "囊肿。"), "images": ["a.png"]},
        {"messages": said("<image><image>What?", "A cyst."), "images": ["b.png", "c.png"]},
        {"id": "E3", "messages": said("问", "答", "再问", "再答"), "image": "c.png"},
        {"id": "E4", "messages": said("问", "答")},
        {"id": "E5", "messages": said("<image>问", "答"), "images": ["gone.png"]},
        {"id": "case001.png", "messages": said("<image>问", "答"), "images": ["b.png"]},
    ]
    found = import_set(tmp_path, "messages", "m.jsonl", {"m.jsonl": json_lines(rows), **IMAGES})
    assert (found.counts.exams, found.counts.frames, found.counts.quarantined) == (3, 4, 3)
    assert found.counts.notes == {"image markers that are not as many as the images": 1}
    assert found.reasons == [
        ("E4", "no frames: the list is empty"),
        ("E5", "missing file: gone.png"),
        ("case001.png", "duplicate exam_id: also at m.jsonl line 1"),
    ]
    one, several, rounds = found.exams.values()
    turns = (Turn("user", "看到什么？"), Turn("assistant", "囊肿。"))
    assert one.conversations == (Conversation("instruct", "conversation", turns, "zh"),)
    assert several.exam_id == "m.jsonl line 2"
    assert several.conversations[0].language == "en"
    assert len(several.frames) == 2
    assert len(rounds.conversations[0].turns) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": []}, "bad conversation: no answer at its end"),
        ({"messages": said("问", "")}, "bad conversation: an empty answer"),
        ({"messages": [{"role": "user", "content": None}]}, "wrong values: messages.0.content: "),
        ({"messages": {"role": "user"}}, "wrong values: messages: input should be a valid tuple"),
        ({"messages": said("问", "答")[1:]}, "bad conversation: turn 1 must be the user's"),
        ({"images": "..\\a.png"}, "path outside the folder: "),
        ({"images": 7}, "wrong values: images: input should be a valid tuple"),
        ({"split": "holdout"}, "wrong values: split: input should be 'train'"),
    ],
)
def test_a_bad_line_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    row = {"id": "E", "messages": said("问", "答"), "images": ["a.png"], **changes}
    found = import_set(tmp_path, "messages", "m.jsonl", {"m.jsonl": json_lines([row]), **IMAGES})
    ((name, why),) = found.reasons
    assert name == "E"
    assert why.startswith(reason)


def test_a_line_of_another_format_lacks_its_messages(tmp_path: Path) -> None:
    rows = [{"id": "E", "image": "a.png", "conversations": []}]
    found = import_set(tmp_path, "messages", "m.jsonl", {"m.jsonl": json_lines(rows)})
    assert found.reasons == [("E", "missing keys: messages")]
