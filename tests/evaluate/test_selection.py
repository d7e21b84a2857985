"""Scores of chosen frames against values worked by hand."""

from __future__ import annotations

from itertools import permutations
from math import exp, log2

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.evaluate.metrics import count_all, score_all
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.selection import (
    baseline_metrics,
    best_rank,
    gradable_exams,
    ndcg,
    random_ndcg,
    random_reciprocal_rank,
    selection_metrics,
    softmax,
)


def predict(
    exam_id: str, valid: tuple[bool, ...] | None, scores: tuple[float, ...] = (), **more: object
) -> Prediction:
    scores = scores or (0.0,) * len(valid or (1,))
    chosen = scores.index(max(scores))
    values = {"exam_id": exam_id, "valid": valid, "scores": scores, "chosen": chosen}
    return make_prediction(**{**values, **more})


def score(*exams: Prediction) -> dict[str, float | None]:
    metrics = {**selection_metrics(), **baseline_metrics()}
    scores = score_all(metrics, count_all(metrics, exams), range(len(exams)))
    return {name.removeprefix("selection/"): value for name, value in scores.items()}


def test_each_exam_counts_once_and_only_where_there_is_a_choice() -> None:
    mixed, other = (False, True, False, False), (True, False)
    exams = gradable_exams(
        [
            predict("a", mixed, chosen=1),
            predict("a", mixed, chosen=1, task="side"),
            predict("b", other, chosen=1),
            predict("all", (True, True)),
            predict("none", (False, False)),
            predict("unknown", None),
            make_prediction(exam_id="no choice", valid=mixed, scores=None, chosen=None),
        ]
    )
    assert [p.exam_id for p in exams] == ["a", "b"]
    scores = score(*exams)
    assert scores["accuracy"] == 0.5
    assert scores["chance"] == (1 / 4 + 1 / 2) / 2


def test_blobs_are_graded_like_choices() -> None:
    valid = (True, False, False)
    scores = score(
        predict("a", valid, brightest=0, darkest=1), predict("b", valid, brightest=2, darkest=None)
    )
    assert scores["brightest"] == 0.5
    assert scores["darkest"] == 0


def test_ranks_go_by_the_best_valid_frame() -> None:
    # Order of frames: 2, 0, 3, 1; the first valid one is frame 0, at rank 2.
    late = predict("a", (True, True, False, False), (0.5, -1.0, 0.9, 0.1))
    first = predict("b", (False, True), (0.1, 0.3))
    assert best_rank(late.scores, (True, True, False, False)) == 2
    scores = score(late, first)
    assert scores["mean_rank"] == (2 + 1) / 2
    assert scores["mean_reciprocal_rank"] == (1 / 2 + 1) / 2
    # Valid at ranks 2 and 4, at best at 1 and 2.
    gain = (1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3))
    assert ndcg(late.scores, (True, True, False, False)) == pytest.approx(gain)
    assert scores["ndcg"] == pytest.approx((gain + 1) / 2)


def test_equal_scores_are_held_against_the_model() -> None:
    assert best_rank((1.0, 1.0, 1.0), (True, False, False)) == 3
    assert best_rank((1.0, 2.0, 1.0), (True, False, True)) == 2


@pytest.mark.parametrize(("k", "v"), [(2, 1), (4, 2), (5, 3), (5, 1), (6, 5)])
def test_chance_is_the_mean_over_all_orders(k: int, v: int) -> None:
    valid = [i < v for i in range(k)]
    orders = [tuple(float(rank) for rank in order) for order in permutations(range(k))]
    ranks = [best_rank(order, valid) for order in orders]
    inverse = sum(1 / rank for rank in ranks) / len(ranks)
    assert random_reciprocal_rank(k, v) == pytest.approx(inverse)
    gains = [ndcg(order, valid) for order in orders]
    assert random_ndcg(k, v) == pytest.approx(sum(gains) / len(gains))
    chance = score(predict("a", tuple(valid)))
    assert chance["chance_rank"] == pytest.approx(sum(ranks) / len(ranks))
    assert chance["chance_reciprocal_rank"] == pytest.approx(random_reciprocal_rank(k, v))


def test_softmax() -> None:
    assert softmax((0.0, 0.0)) == [0.5, 0.5]
    shares = softmax((1000.0, 999.0))
    assert shares[0] == pytest.approx(1 / (1 + exp(-1)))
    assert sum(shares) == pytest.approx(1)


def test_calibration_error() -> None:
    """Three exams, two bins: 0.52 twice, once right; 0.88 once, right."""
    unsure, sure = log2(13 / 12) / log2(exp(1)), log2(22 / 3) / log2(exp(1))
    exams = [
        predict("a", (True, False), (unsure, 0.0)),
        predict("b", (False, True), (unsure, 0.0)),
        predict("c", (True, False), (sure, 0.0)),
    ]
    assert softmax(exams[0].scores)[0] == pytest.approx(0.52)
    assert softmax(exams[2].scores)[0] == pytest.approx(0.88)
    # (2 * |0.52 - 0.5| + 1 * |0.88 - 1|) / 3
    assert score(*exams)["calibration_error"] == pytest.approx((0.04 + 0.12) / 3)
    assert score(predict("a", (False, True), (0.0, 800.0)))["calibration_error"] == 0
