from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.importers.importing import config_of, import_set, json_list
from ultra.data.prepare import list_entries
from ultra.storage import StorageError
from ultra.types import Conversation, Turn


def row(img_id: int, qid: int, **changes: Any) -> dict[str, Any]:
    return {
        "img_id": img_id,
        "img_name": f"xmlab{img_id}/source.jpg",
        "question": "这张图片的成像方式是什么?",
        "answer": "MRI",
        "q_lang": "zh",
        "location": "Abdomen",
        "modality": "MRI",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
        **changes,
    }


YES_OR_NO = {
    "question": "Is this healthy?",
    "answer": "No",
    "q_lang": "en",
    "answer_type": "CLOSED",
    "content_type": "Abnormality",
}
IMAGES = {f"imgs/xmlab{i}/source.jpg": picture(i) for i in (1, 2, 3)}
FILES = {
    "train.json": json_list(
        [row(1, 12995), row(1, 0, **YES_OR_NO), row(1, 1, answer=""), row(4, 2), row(1, 3)]
    ),
    "validate.json": json_list([row(2, 5, modality="X-Ray", location="Lung"), row(1, 7)]),
    "test.json": json_list([row(3, 6)]),
    "mask.json": json_list([{"question": "not of the set"}]),
    "imgs/xmlab1/question.json": json_list([row(1, 12995)]),
    **IMAGES,
}


def test_the_folder_as_published(tmp_path: Path) -> None:
    found = import_set(tmp_path, "slake", "", FILES)
    counts = found.counts
    assert (counts.exams, counts.frames, counts.quarantined) == (3, 3, 3)
    assert counts.splits == {"test": 1, "train": 1, "validation": 1}
    assert found.reasons == [
        (
            "train.json item 3",
            "wrong values: answer: empty",
        ),
        ("4", "missing file: imgs/xmlab4/source.jpg"),
        ("1", "duplicate exam_id: also at train.json item 1"),
    ]
    first = found.exams["1"]
    assert (first.site, first.modality, first.split) == ("Abdomen", "MR", "train")
    zh, en, third = first.conversations
    turns = (Turn("user", "这张图片的成像方式是什么?"), Turn("assistant", "MRI"))
    assert zh == Conversation("instruct", "Modality", turns, "zh", False, "12995")
    assert (en.language, en.closed, en.task, en.question_id) == ("en", True, "Abnormality", "0")
    assert third.question_id == "3"
    assert (found.exams["2"].modality, found.exams["2"].split) == ("DX", "validation")


def test_one_file_with_its_images_elsewhere(tmp_path: Path) -> None:
    files = {"slake/test.json": json_list([row(3, 6)]), "pictures/xmlab3/source.jpg": picture(3)}
    images = f"{tmp_path}/set/pictures"
    found = import_set(tmp_path, "slake", "slake/test.json", files, images_uri=images)
    assert found.counts.splits == {"test": 1}


def test_the_folder_on_an_object_store(s3_bucket: str) -> None:
    found = import_set(f"{s3_bucket}/slake", "slake", "", FILES)
    assert found.counts.splits == {"test": 1, "train": 1, "validation": 1}
    assert ("4", "missing file: imgs/xmlab4/source.jpg") in found.reasons


def test_a_folder_without_a_split_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(StorageError, match="no file named after a split"):
        list(list_entries(config_of(tmp_path, "slake")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qid": None}, "wrong values: qid: input should be a valid string"),
        ({"q_lang": "fr"}, "wrong values: q_lang: input should be 'en' or 'zh'"),
        ({"answer_type": "yes"}, "wrong values: answer_type: "),
        ({"img_name": "../../source.jpg"}, "path outside the folder: "),
        ({"img_name": ["a"]}, "wrong values: img_name: "),
        ({"question": "\0"}, "wrong values: question: control characters"),
        ({"answer": "<image>"}, "bad conversation: an empty answer"),
    ],
)
def test_a_bad_question_says_what_is_wrong(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    files = {"train.json": json_list([row(1, 1) | changes, row(2, 2)]), **IMAGES}
    found = import_set(tmp_path, "slake", "train.json", files)
    ((_, why),) = found.reasons
    assert why.startswith(reason)
    assert list(found.exams) == ["2"]
