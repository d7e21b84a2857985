"""The suite `strict` against values worked by hand."""

from __future__ import annotations

from math import exp

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.evaluate import metrics
from ultra.evaluate.tokenizers import tokenize_char

Pairs = list[tuple[str, str]]

STRICT = metrics.strict_metrics("char", tokenize_char)


def score(name: str, pairs: Pairs) -> float | None:
    chosen = {name: STRICT[name]}
    counts = metrics.count_all(chosen, [make_prediction(*pair) for pair in pairs])
    return metrics.score_all(chosen, counts, range(len(pairs)))[name]


def test_exact_match_ignores_form_and_nothing_else() -> None:
    same = [("右肾。", "右肾"), ("１２ｍｍ", "12 mm"), ("Cyst", "cyst")]
    assert score("strict/em", same) == 1
    assert score("strict/em", [*same, ("右肾", "左肾")]) == 0.75


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
    assert score("strict/f1-char", [(answer, truth)]) == pytest.approx(expected)


def test_f1_is_the_mean_over_answers() -> None:
    assert score("strict/f1-char", [("肾", "肾"), ("肝", "肾")]) == 0.5


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
def test_bleu(pairs: Pairs, expected: float) -> None:
    assert score("strict/bleu4-char", pairs) == pytest.approx(expected)


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
    assert score("strict/closed_accuracy", pairs) == 2 / 4
    assert score("strict/closed_accuracy", pairs[-2:]) is None


def test_the_set_says_what_is_closed() -> None:
    given = [
        make_prediction("左侧。", "左侧", closed=True),  # no yes, no no: as a whole
        make_prediction("左侧", "右侧", closed=True),
        make_prediction("有", "左侧", closed=True),
        make_prediction("是", "是", closed=False),  # an open one, whatever its truth
        make_prediction("囊肿", "结节"),
    ]
    counts = metrics.count_all(STRICT, given)
    scores = metrics.score_all(STRICT, counts, range(5))
    assert scores["strict/closed_accuracy"] == pytest.approx(1 / 3)
    assert scores["strict/open-em"] == 1 / 2
    assert scores["strict/open-bleu4-char"] == 0  # one of three tokens, and no pair
    assert metrics.score_all(STRICT, counts, [0, 1])["strict/open-bleu4-char"] is None


def test_clipped_precision_and_recall() -> None:
    pairs = [("肾肾肾", "肾囊")]  # one of three is right, one of two is found
    assert score("strict/open-precision-char", pairs) == pytest.approx(1 / 3)
    assert score("strict/open-recall-char", pairs) == pytest.approx(1 / 2)
    for name in ("strict/open-precision-char", "strict/open-recall-char"):
        assert score(name, [("", "肾")]) == score(name, [("。", "肾")]) == 0
        assert score(name, [("", "。")]) == 1


def test_closed_accuracy_knows_opposites_in_both_languages() -> None:
    pairs = [("是的", "yes"), ("No.", "否"), ("不是", "是"), ("yes", "不包含"), ("abnormal", "no")]
    assert [score("strict/closed_accuracy", [pair]) for pair in pairs] == [1, 1, 0, 0, 0]


def test_names_carry_suite_and_tokenizer() -> None:
    assert [*STRICT] == [
        "strict/em", "strict/f1-char", "strict/bleu4-char", "strict/open-em",
        "strict/open-f1-char", "strict/open-precision-char",
        "strict/open-recall-char", "strict/open-bleu4-char", "strict/closed_accuracy",
    ]  # fmt: skip
    assert "strict/f1-jieba" in metrics.strict_metrics("jieba", tokenize_char)


def test_any_choice_of_answers_is_scored_from_the_same_counts() -> None:
    given = [make_prediction("肾", "肾"), make_prediction("肝", "肾"), make_prediction("是", "否")]
    counts = metrics.count_all(STRICT, given)
    assert metrics.score_all(STRICT, counts, [0, 1])["strict/em"] == 1 / 2
    assert metrics.score_all(STRICT, counts, [0, 1])["strict/closed_accuracy"] is None
    assert metrics.score_all(STRICT, counts, [1, 2])["strict/closed_accuracy"] == 0
