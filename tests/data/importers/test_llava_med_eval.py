from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import import_set, json_lines, json_list
from ultra.types import Conversation, Turn

IMAGES = {"a.jpg": picture(1), "b.jpg": picture(2)}
CHAT = {
    "question_id": 0,
    "image": "a.jpg",
    "pair_id": "27",
    "text": "What organ?\n<image>",
    "type": "detailed_description",
    "gpt4_answer": "The liver.",
    "fig_caption": "Figure 1. Liver.",
    "fig_label": "F1",
    "in_text_mention": ["As figure 1 shows.", {"tokens": "And here.", "start": 3}],
    "domain": {"chest_xray": False, "ct_scan": True},
}
QUESTION = {
    "id": 11934,
    "image": "b.jpg",
    "answer_type": "CLOSED",
    "conversations": [
        {"from": "human", "value": "Is it normal?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def test_lines_of_the_chat_test(tmp_path: Path) -> None:
    plain = {k: CHAT[k] for k in ("image", "text", "gpt4_answer")} | {"question_id": "q2"}
    rows = [CHAT, plain, {**CHAT, "question_id": 3, "image": "gone.jpg"}]
    found = import_set(
        tmp_path, "llava-med-eval", "qa50.jsonl", {"qa50.jsonl": json_lines(rows), **IMAGES}
    )
    assert (found.counts.exams, found.counts.quarantined) == (2, 1)
    assert found.counts.splits == {"test": 2}
    assert found.reasons == [("3", "missing file: gone.jpg")]
    exam = found.exams["0"]
    assert exam.findings == "Figure 1. Liver.\nAs figure 1 shows.\nAnd here."
    assert exam.modality == "CT"
    turns = (Turn("user", "What organ?"), Turn("assistant", "The liver."))
    assert exam.conversations == (
        Conversation("instruct", "detailed_description", turns, "en", None, "0"),
    )
    assert (found.exams["q2"].modality, found.exams["q2"].conversations[0].task) == (
        "OT",
        "conversation",
    )
    assert found.exams["q2"].patient_key == exam.patient_key


def test_a_list_of_questions(tmp_path: Path) -> None:
    rows = [
        QUESTION,
        {**QUESTION, "id": 2, "answer_type": "OPEN"},
        {**QUESTION, "id": 3, "conversations": QUESTION["conversations"] * 2},  # type: ignore[operator]
        {**QUESTION, "id": 4, "answer_type": "MAYBE"},
    ]
    files = {"slake_test.json": json_list(rows), **IMAGES}
    found = import_set(tmp_path, "llava-med-eval", "slake_test.json", files)
    assert found.counts.splits == {"test": 2}
    assert found.counts.notes == {}
    (asked,) = found.exams["11934"].conversations
    assert (asked.closed, asked.question_id, asked.task) == (True, "11934", "vqa")
    assert found.exams["2"].conversations[0].closed is False
    assert found.reasons == [
        ("3", "bad conversation: 4 turns where a question has two"),
        ("4", "wrong values: answer_type: input should be 'OPEN' or 'CLOSED'"),
    ]


def test_the_training_half_of_a_set_is_for_training(tmp_path: Path) -> None:
    files = {"train.json": json_list([QUESTION]), **IMAGES}
    found = import_set(tmp_path, "llava-med-eval", "train.json", files)
    assert found.counts.splits == {"train": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing keys: question_id, image, text, gpt4_answer"),
        ({**CHAT, "gpt4_answer": ""}, "bad conversation: an empty answer"),
        ({**CHAT, "in_text_mention": 7}, "wrong values: in_text_mention: "),
        ({**CHAT, "in_text_mention": [{"start": 1}]}, "wrong values: in_text_mention.0: "),
        ({**CHAT, "domain": "mri"}, "wrong values: domain: input should be a valid dict"),
        ({**CHAT, "image": ["a.jpg"]}, "wrong values: image: input should be a valid string"),
        ({**CHAT, "image": "../a.jpg"}, "path outside the folder: '../a.jpg'"),
        ({**QUESTION, "image": ""}, "no frames: the list is empty"),
        ({**QUESTION, "conversations": []}, "bad conversation: no answer at its end"),
    ],
)
def test_a_bad_row_says_what_is_wrong(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    files = {"e.jsonl": json_lines([row]), **IMAGES}
    ((_, why),) = import_set(tmp_path, "llava-med-eval", "e.jsonl", files).reasons
    assert why.startswith(reason)
