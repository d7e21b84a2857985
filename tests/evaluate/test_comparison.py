"""Other models beside ours."""

from __future__ import annotations

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.evaluate.bootstrap import bootstrap_differences
from ultra.evaluate.comparison import NOT_ASKED, difference_rows, line_up
from ultra.evaluate.metrics import strict_metrics
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.tokenizers import tokenize_char

METRICS = {"strict/em": strict_metrics("char", tokenize_char)["strict/em"]}


def answer(exam: int, text: str, **more: object) -> Prediction:
    return make_prediction(text, "囊肿", exam_id=f"e{exam}", question_id=str(exam), **more)


OURS = [answer(i, "囊肿") for i in range(6)]


def test_answers_stand_beside_the_questions_they_are_to() -> None:
    given = [
        answer(4, "结节"), answer(1, "", unanswered="429"), answer(9, "别的"),
        answer(0, "囊肿", question="another"),
    ]  # fmt: skip
    found = line_up(OURS, given)
    assert [p.exam_id for p in found] == [p.exam_id for p in OURS]
    assert [p.answer for p in found] == ["", "", "", "", "结节", ""]
    assert [p.unanswered for p in found] == [NOT_ASKED, "429", *[NOT_ASKED] * 2, "", NOT_ASKED]


def test_the_difference_is_over_what_both_answered() -> None:
    texts = ["囊肿", "结节", "结节", "囊肿"]
    given = [answer(i, text) for i, text in enumerate(texts)]
    others = {"gpt": line_up(OURS, given), "mute": line_up(OURS, [])}
    (row,) = difference_rows(METRICS, OURS, others, 200)
    (expected,) = bootstrap_differences(METRICS, given, OURS[:4], 200).values()
    assert row == {
        "compared_with": "gpt", "metric": "strict/em", "model": 1, "other": 1 / 2,
        "difference": 1 / 2, "low95": expected.low, "high95": expected.high,
        "p_value": expected.p_value, "questions": 4, "exams": 4,
    }  # fmt: skip
    assert 0 <= row["low95"] < 1 / 2 < row["high95"] <= 1
    assert difference_rows(METRICS, OURS, others, 0) == []


def test_what_we_did_not_answer_is_left_out_too() -> None:
    ours = [answer(0, "", unanswered="?"), *OURS[1:]]
    (row,) = difference_rows(METRICS, ours, {"same": OURS}, 50)
    assert (row["questions"], row["difference"]) == (5, pytest.approx(0))
