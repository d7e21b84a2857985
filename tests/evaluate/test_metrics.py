"""Scores against values worked by hand."""

from __future__ import annotations

from math import exp

import pytest

from ultra.evaluate import metrics
from ultra.evaluate.metrics import tokenize_char
from ultra.evaluate.predictions import Prediction


def predict(
    exam_id: str, chosen: int, valid: tuple[bool, ...] | None, **more: object
) -> Prediction:
    values = {
        "patient_key": "p", "site": "肝脏", "task": "kind", "question": "病变是什么？",
        "answer": "囊肿", "truth": "囊肿", "scores": (0.0,) * len(valid or (1,)),
        "brightest": None, "darkest": None, "token_ids": (1,), "finish_reason": "stop",
        "content_sha256": exam_id,
    }  # fmt: skip
    return Prediction(exam_id=exam_id, chosen=chosen, valid=valid, **{**values, **more})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("右肾囊肿，大小12mm×1.5 CM。", [*"右肾囊肿大小", "12", "mm", "×", "1.5", "cm"]),
        ("ＣＤＦＩ：Ⅱ级", ["cdfi", "ii", "级"]),
        ("１２毫米", ["12", "毫", "米"]),
        ("A-B_c", ["a", "b", "c"]),
        (" 。，\n", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert tokenize_char(text) == tokens


def test_exact_match_ignores_form_and_nothing_else() -> None:
    same = [("右肾。", "右肾"), ("１２ｍｍ", "12 mm"), ("Cyst", "cyst")]
    assert metrics.exact_match(same) == 1
    assert metrics.exact_match([*same, ("右肾", "左肾")]) == 0.75


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("右肾", "右肾上极", 2 * 2 / 6),
        ("不包含", "包含", 2 * 2 / 5),
        ("扩大的心脏。", "肥大的心脏。", 0.8),
        ("肾肾肾", "肾囊", 2 * 1 / 5),  # clipped: one of the three counts
        ("", "肾", 0.0),
        ("", "。", 1.0),
    ],
)
def test_f1(answer: str, truth: str, expected: float) -> None:
    assert metrics.f1([(answer, truth)], tokenize_char) == pytest.approx(expected)


def test_f1_is_the_mean_over_answers() -> None:
    pairs = [("肾", "肾"), ("肝", "肾")]
    assert metrics.f1(pairs, tokenize_char) == 0.5


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("扩大的心脏", "肥大的心脏")], (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        ([("囊肿", "囊肿")], 1.0),
        ([("囊肿", "囊肿"), ("肝脏可见囊肿。", "肝脏可见囊肿")], 1.0),
        ([("右肾", "右肾上极")], exp(1 - 4 / 2)),  # too short: the brevity penalty alone
        ([("右肾上极", "右肾")], 0.0),  # of its trigrams none can match
        (
            [("左侧", "左侧"), ("右侧", "左侧")],
            (3 / 4 * 1 / 2) ** 0.5,
        ),  # counts, not scores, add up
        ([("肾肾", "肾囊")], 0.0),
        ([("", "囊肿")], 0.0),
    ],
)
def test_bleu(pairs: list[tuple[str, str]], expected: float) -> None:
    assert metrics.bleu(pairs, tokenize_char) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("是", True), ("是的。", True), ("包含", True), ("存在囊肿", True), ("Yes, it is", True),
        ("否。", False), ("不包含", False), ("没有，未见结节", False), ("不是的", False),
        ("No nodule", False), ("NOT", False), ("不存在", False), ("未见异常", False),
        ("无", False), ("有，左侧", True),
        ("无回声", None), ("有回声", None), ("normal", None), ("notable", None), ("囊肿", None),
        ("", None), ("。", None),
    ],
)  # fmt: skip
def test_polarity(text: str, expected: bool | None) -> None:
    assert metrics.polarity(text) is expected


def test_closed_accuracy_counts_yes_and_no_questions_only() -> None:
    pairs = [
        ("不包含", "包含"),  # four of five characters match, and the answer is wrong
        ("没有", "不存在"),
        ("是", "有"),
        ("囊肿", "是"),  # says neither
        ("囊肿", "囊肿"),  # an open question
        ("是", "未见异常"),  # an open question that begins like a no
    ]
    assert metrics.closed_accuracy(pairs) == 2 / 4
    assert metrics.closed_accuracy(pairs[-2:]) is None


def test_names_carry_suite_and_tokenizer() -> None:
    scores = metrics.SUITES["strict"]([("右肾", "右肾上极")], "char")
    assert scores == {
        "strict/em": 0.0,
        "strict/f1-char": pytest.approx(2 / 3),
        "strict/bleu4-char": pytest.approx(exp(-1)),
        "strict/closed_accuracy": None,
    }


def test_selection_counts_each_exam_once_and_only_where_there_is_a_choice() -> None:
    mixed, other = (False, True, False, False), (True, False)
    exams = metrics.gradable_exams(
        [
            predict("a", 1, mixed),
            predict("a", 1, mixed, task="side"),
            predict("b", 1, other),
            predict("all", 0, (True, True)),
            predict("none", 0, (False, False)),
            predict("unknown", 0, None),
        ]
    )
    assert [p.exam_id for p in exams] == ["a", "b"]
    assert metrics.selection_accuracy(exams) == 0.5
    assert metrics.selection_chance(exams) == (1 / 4 + 1 / 2) / 2
    assert metrics.selection_accuracy([]) is None
    assert metrics.selection_chance([]) is None
