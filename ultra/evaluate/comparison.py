"""Answers of other models to the questions that ours was asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ultra.evaluate.bootstrap import bootstrap_differences
from ultra.evaluate.metrics import Metric
from ultra.evaluate.predictions import Prediction

NOT_ASKED = "not among its answers"


def line_up(asked: Sequence[Prediction], given: Sequence[Prediction]) -> list[Prediction]:
    """Return the answers that another model gave to the questions `asked`, in their order.

    A question that it was not asked has an empty answer, which counts as wrong, and says so.
    """
    answers = {_key(p): p for p in given}
    return [_answer(p, answers.get(_key(p))) for p in asked]


def _key(p: Prediction) -> tuple[str, str, str, str]:
    return p.exam_id, p.task, p.question, p.question_id


def _answer(p: Prediction, given: Prediction | None) -> Prediction:
    if given is None:
        return replace(p, answer="", unanswered=NOT_ASKED)
    return replace(p, answer=given.answer, unanswered=given.unanswered)


def difference_rows(
    metrics: Mapping[str, Metric],
    ours: Sequence[Prediction],
    others: Mapping[str, Sequence[Prediction]],
    num_samples: int,
) -> list[dict[str, Any]]:
    """Return one row for each other model and metric: how much better ours is, and how surely.

    Only questions that both answered count, so `model` and `other` may differ from the scores over
    all questions.

    Args:
        metrics: of answers.
        ours: predictions with a truth.
        others: name -> predictions, lined up with ours.
        num_samples: of the bootstrap; 0 gives no rows.
    """
    rows = []
    for name, given in others.items() if num_samples else ():
        pairs = [
            pair for pair in zip(given, ours, strict=True) if not any(p.unanswered for p in pair)
        ]
        if not pairs:
            continue
        first, second = zip(*pairs, strict=True)
        for metric, d in bootstrap_differences(metrics, first, second, num_samples).items():
            rows.append(
                {
                    "compared_with": name,
                    "metric": metric,
                    "model": d.second,
                    "other": d.first,
                    "difference": d.value,
                    "low95": d.low,
                    "high95": d.high,
                    "p_value": d.p_value,
                    "questions": len(pairs),
                    "exams": d.num_exams,
                }
            )
    return rows
