"""Answers that were given elsewhere, matched with the questions by their ids.

A line of the file reads as LLaVA writes it,

    {"question_id": 17, "prompt": "…", "text": "肝囊肿", "answer_id": "…", "model_id": "…"}

of which `question_id` and `text` (or `answer`) are read. The order of lines does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import AliasChoices, Field

from ultra.config import ConfigError
from ultra.data.importers.entry import Name, Row, parse
from ultra.data.importers.records import read_records
from ultra.evaluate.predictions import Prediction, answer_question, questions_of
from ultra.types import FrameGroup

NO_ID = "the question has no id"
NO_ANSWER = "no answer in the file"


class AnswerRow(Row):
    """A line of the file."""

    question_id: Name
    text: str = Field(validation_alias=AliasChoices("text", "answer"))


class AnswersFile:
    """Answers questions with what a file holds.

    Args:
        uri: the file.
    """

    def __init__(self, uri: str) -> None:
        self.answers = read_answers(uri)

    def answer(self, groups: Sequence[FrameGroup]) -> list[Prediction]:
        """Return the predictions for every question of every group."""
        predictions = []
        for group in groups:
            for question in questions_of(group):
                text = self.answers.get(question.question_id)
                reason = "" if text is not None else NO_ANSWER if question.question_id else NO_ID
                predictions.append(answer_question(group, question, text or "", unanswered=reason))
        return predictions


def read_answers(uri: str) -> dict[str, str]:
    """Return question id -> answer; a line that comes twice counts once.

    Raises:
        ConfigError: for a line that is no answer, or two answers to one question.
        StorageError: when there is no such file.
    """
    answers: dict[str, str] = {}
    for record in read_records(uri):
        try:
            row = parse(record, AnswerRow)
        except ValueError as error:
            raise ConfigError(f"evaluate.others: {uri}: {record.place}: {error}") from None
        if answers.setdefault(row.question_id, row.text) != row.text:
            raise ConfigError(
                f"evaluate.others: {uri}: {record.place}: another answer to question "
                f"{row.question_id} than before"
            )
    return answers


def find_strays(uri: str, predictions: Iterable[Prediction]) -> list[str]:
    """Return the ids of a file that are not among the questions asked, in its order.

    Raises:
        ConfigError: when two questions have one id, so that an answer cannot be matched.
        StorageError: when there is no such file.
    """
    asked: dict[str, str] = {}
    for p in predictions:
        if p.question_id and asked.setdefault(p.question_id, p.question) != p.question:
            raise ConfigError(
                f"evaluate.others: {uri}: two questions have the id {p.question_id}: "
                f"{asked[p.question_id]} / {p.question}"
            )
    return [question_id for question_id in read_answers(uri) if question_id not in asked]
