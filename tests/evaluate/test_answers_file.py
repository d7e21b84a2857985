"""Answers given elsewhere, with the quirks that such files have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.conftest import ask, make_exam
from ultra.config import ConfigError
from ultra.evaluate.answers_file import AnswersFile, find_strays, read_answers
from ultra.storage import StorageError
from ultra.types import FrameGroup


def write(path: Path, *lines: dict[str, Any] | str) -> str:
    texts = [x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(texts).encode())
    return str(path)


def llava(question_id: int | str, text: str) -> dict[str, Any]:
    return {
        "question_id": question_id, "prompt": "?", "text": text, "answer_id": "x",
        "model_id": "llava", "metadata": {},
    }  # fmt: skip


@pytest.fixture
def exams() -> list[FrameGroup]:
    def about(question_id: str, *texts: str) -> Any:
        return replace(ask("instruct", "kind", *texts), question_id=question_id)

    return [
        make_exam("a", "test", about("1", "一？", "囊肿"), about("2", "二？", "结节")),
        make_exam("b", "test", about("q-3", "三？", "否"), about("", "四？", "是")),
    ]


def test_answers_find_their_questions_in_any_order(exams: list[FrameGroup], tmp_path: Path) -> None:
    uri = write(
        tmp_path / "answers.jsonl",
        llava("q-3", " 否 "), llava(99, "谁也没问"), "", llava(1, "囊肿"), llava(1, "囊肿"),
    )  # fmt: skip
    found = AnswersFile(uri).answer(exams)
    assert [(p.question, p.answer, p.unanswered) for p in found] == [
        ("一？", "囊肿", ""),
        ("二？", "", "no answer in the file"),
        ("三？", "否", ""),
        ("四？", "", "the question has no id"),
    ]
    assert {(p.chosen, p.scores) for p in found} == {(None, None)}
    assert find_strays(uri, found) == ["99"]


def test_an_empty_answer_is_an_answer(exams: list[FrameGroup], tmp_path: Path) -> None:
    uri = write(tmp_path / "answers.jsonl", llava(1, ""), {"question_id": 2, "answer": "结节"})
    first, second, *_ = AnswersFile(uri).answer(exams)
    assert (first.answer, first.unanswered) == ("", "")
    assert (second.answer, second.unanswered) == ("结节", "")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([llava(1, "囊肿"), llava(1, "结节")], "line 2: another answer to question 1 than before"),
        ([{"question_id": 1}], "line 1: missing keys: text"),
        ([{"text": "囊肿"}], "line 1: missing keys: question_id"),
        ([llava(1, "囊肿"), "{"], "line 2: malformed line: not JSON"),
        ([{"question_id": 1, "text": None}], "line 1: wrong values: text"),
    ],
)
def test_what_cannot_be_read_is_an_error(tmp_path: Path, lines: list[Any], reason: str) -> None:
    uri = write(tmp_path / "answers.jsonl", *lines)
    with pytest.raises(ConfigError, match=rf"evaluate.others: .*answers.jsonl: .*{reason}"):
        read_answers(uri)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere.jsonl"):
        read_answers(str(tmp_path / "nowhere.jsonl"))


def test_one_id_for_two_questions_is_an_error(exams: list[FrameGroup], tmp_path: Path) -> None:
    uri = write(tmp_path / "answers.jsonl", llava(1, "囊肿"))
    found = AnswersFile(uri).answer(exams)
    with pytest.raises(ConfigError, match="two questions have the id 1: 一？ / 又一？"):
        find_strays(uri, [*found, replace(found[0], question="又一？")])
