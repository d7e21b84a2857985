"""Intervals and differences against what drawing exams must give."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluate.conftest import make_prediction
from ultra.config import InputError
from ultra.evaluate.bootstrap import bootstrap_differences, bootstrap_intervals
from ultra.evaluate.metrics import strict_metrics
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.tokenizers import tokenize_char

EM = {"em": strict_metrics("char", tokenize_char)["strict/em"]}
STRICT = strict_metrics("char", tokenize_char)


def answer(exam: int, right: bool, task: str = "kind") -> Prediction:
    return make_prediction("囊肿" if right else "结石", exam_id=f"exam {exam}", task=task)


def test_an_interval_is_that_of_the_binomial() -> None:
    """36 exams, half of them right: the number right in a draw is binomial.

    P(X <= 11) = .014, P(X <= 12) = .033, P(X <= 23) = .967 and P(X <= 24) = .986, so the middle
    95 % reaches from 12 to 24.
    """
    given = [answer(i, i < 18) for i in range(36)]
    interval = bootstrap_intervals(EM, given, num_samples=5000, seed=3)["em"]
    assert interval.value == 0.5
    assert interval.low == pytest.approx(12 / 36)
    assert interval.high == pytest.approx(24 / 36)
    assert interval.num_exams == 36


def test_answers_about_one_exam_are_drawn_together() -> None:
    alone = [answer(i, i % 2 == 0) for i in range(64)]
    together = [answer(i // 16, i // 16 % 2 == 0, task=str(i % 16)) for i in range(64)]
    narrow = bootstrap_intervals(EM, alone)["em"]
    wide = bootstrap_intervals(EM, together)["em"]
    assert narrow.value == wide.value == 0.5
    assert narrow.high - narrow.low < 0.3
    assert (wide.low, wide.high) == (0, 1)  # 4 exams: 1 in 16 draws has none, or all, right
    assert wide.num_exams == 4


def test_the_seed_decides() -> None:
    given = [answer(i, i % 3 == 0) for i in range(50)]
    first = bootstrap_intervals(STRICT, given, 200, seed=1)
    assert bootstrap_intervals(STRICT, given[::-1], 200, seed=1) == first
    assert bootstrap_intervals(STRICT, given, 200, seed=2) != first


def test_what_does_not_apply_has_no_interval() -> None:
    intervals = bootstrap_intervals(STRICT, [answer(0, True), answer(1, False)], 50)
    assert [name for name in STRICT if name not in intervals] == ["strict/closed_accuracy"]
    one_closed = [answer(0, True), answer(1, True), make_prediction("是", "是", exam_id="exam 2")]
    interval = bootstrap_intervals(STRICT, one_closed, 50)["strict/closed_accuracy"]
    assert (interval.low, interval.value, interval.high) == (1, 1, 1)


def test_a_score_that_is_no_mean_is_drawn_too() -> None:
    given = [make_prediction("扩大的心脏", "肥大的心脏", exam_id=str(i)) for i in range(9)]
    interval = bootstrap_intervals(STRICT, given, 50)["strict/bleu4-char"]
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25  # the same in every draw
    assert [interval.low, interval.value, interval.high] == pytest.approx([expected] * 3)


def test_a_paired_difference_knows_that_exams_are_the_same() -> None:
    """The second is right wherever the first is, and on five exams more: never worse."""
    rng = np.random.default_rng(0)
    order = rng.permutation(60).tolist()
    first = [answer(i, i < 30) for i in range(60)]
    second = [answer(i, i < 35) for i in order]  # the order of answers does not count
    gain = bootstrap_differences(EM, first, second)["em"]
    assert (gain.first, gain.second) == (30 / 60, 35 / 60)
    assert gain.value == pytest.approx(5 / 60)
    assert 0 < gain.low < gain.value < gain.high < 0.2
    # No exam is lost, so a sample is on the other side only where it draws none of the five:
    # (55/60) ** 60 = 0.0054, twice that is 0.011.
    assert 0.002 < gain.p_value < 0.03
    alone = [bootstrap_intervals(EM, given)["em"] for given in (first, second)]
    assert alone[1].low < alone[0].high  # unpaired, the two could not be told apart
    back = bootstrap_differences(EM, second, first)["em"]
    assert (back.value, back.low, back.high) == (-gain.value, -gain.high, -gain.low)
    assert back.p_value == gain.p_value


def test_no_difference() -> None:
    given = [answer(i, i % 2 == 0) for i in range(20)]
    same = bootstrap_differences(EM, given, given, 100)["em"]
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_sets_that_do_not_match_are_refused() -> None:
    given = [answer(0, True), answer(1, True)]
    with pytest.raises(InputError, match=r"2 are in one alone, e\.g\. exam 1 / kind"):
        bootstrap_differences(EM, given, [answer(0, True), answer(2, True)])
    with pytest.raises(InputError, match="1 are in one alone"):
        bootstrap_differences(EM, given, [*given, answer(1, False)])
    with pytest.raises(InputError, match="got none"):
        bootstrap_differences(EM, [], [])
