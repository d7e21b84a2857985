"""Confidence intervals and paired differences by the bootstrap over exams.

Questions about one exam share its frames, so exams are drawn, not answers (Efron and Tibshirani,
1993: percentile intervals). A metric's sums are added once for each exam; a sample of the bootstrap
then weighs exams, whatever the metric is.

Shapes: N predictions, E exams, S samples of the bootstrap, D sums of a metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultra.config import InputError
from ultra.evaluate.metrics import Metric, count_all, score_all
from ultra.evaluate.predictions import Prediction

Array = NDArray[np.float64]

LEVEL = 0.95
NUM_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """A score, and the interval that holds the middle 95 % of the bootstrap's.

    Attributes:
        num_exams: exams drawn from.
    """

    value: float
    low: float
    high: float
    num_exams: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better the second of two sets of predictions scores than the first.

    Attributes:
        first: score of the first set.
        second: score of the second.
        value: second - first.
        low: lower end of the 95 % interval of the difference.
        high: its upper end.
        p_value: two-sided, of no difference: twice the smaller share of samples on either side of
            zero, those on it counted with both, and never below 2 / (samples + 1).
        num_exams: exams drawn from.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p_value: float
    num_exams: int


def bootstrap_intervals(
    metrics: Mapping[str, Metric],
    predictions: Sequence[Prediction],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return metric -> interval, for the metrics that apply.

    Args:
        metrics: of answers, for predictions with a truth, or of selection, for gradable exams.
        predictions: what is scored, one at least.
        num_samples: samples drawn.
        seed: of the draw; the same seed draws the same exams.
    """
    drawn = _draw(metrics, predictions, num_samples, seed)
    return {
        name: Interval(value, *_middle(drawn.scores[name]), drawn.num_exams)
        for name, value in drawn.values.items()
        if value is not None and not np.isnan(drawn.scores[name]).all()
    }


def bootstrap_differences(
    metrics: Mapping[str, Metric],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return metric -> difference between two sets of predictions, for the metrics that apply.

    Every sample draws the same exams for both (paired), so what is hard for both cancels.

    Args:
        metrics: of answers, for predictions with a truth, or of selection, for gradable exams.
        first: the predictions compared with.
        second: those whose gain is asked for.
        num_samples: samples drawn.
        seed: of the draw.

    Raises:
        InputError: when the two do not answer the same questions about the same exams.
    """
    _check_paired(first, second)
    before, after = (_draw(metrics, given, num_samples, seed) for given in (first, second))
    differences = {}
    for name in metrics:
        a, b = before.values[name], after.values[name]
        gains_S = after.scores[name] - before.scores[name]
        if a is not None and b is not None and not np.isnan(gains_S).all():
            ends = _middle(gains_S)
            differences[name] = Difference(a, b, b - a, *ends, _p_value(gains_S), before.num_exams)
    return differences


def _check_paired(first: Sequence[Prediction], second: Sequence[Prediction]) -> None:
    asked, again = Counter(map(_question, first)), Counter(map(_question, second))
    if not asked and not again:
        raise InputError("a paired comparison wants predictions, got none")
    odd = sorted((asked - again) + (again - asked))
    if odd:
        raise InputError(
            "a paired comparison wants the same questions in both sets of predictions; "
            f"{len(odd)} are in one alone, e.g. {' / '.join(odd[0])}"
        )


def _question(p: Prediction) -> tuple[str, str, str]:
    return p.exam_id, p.task, p.question


@dataclass(frozen=True, slots=True)
class _Drawn:
    """The scores of predictions as they are, and scores_S of the samples: NaN for no score."""

    values: Mapping[str, float | None]
    scores: Mapping[str, Array]
    num_exams: int


def _draw(
    metrics: Mapping[str, Metric], predictions: Sequence[Prediction], num_samples: int, seed: int
) -> _Drawn:
    counts = count_all(metrics, predictions)
    # Sorted by id, so that two sets of predictions agree on which exam is which.
    names, index_N = np.unique([p.exam_id for p in predictions], return_inverse=True)
    num_exams = len(names)
    sums = {name: _add_groups(counts_ND, index_N, num_exams) for name, counts_ND in counts.items()}
    rng = np.random.default_rng(seed)
    scores = {name: np.full(num_samples, np.nan) for name in metrics}
    for sample in range(num_samples):
        chosen = rng.integers(num_exams, size=num_exams)
        weights_E = np.bincount(chosen, minlength=num_exams).astype(np.float64)
        for name, metric in metrics.items():
            value = metric.score((weights_E @ sums[name]).tolist())
            if value is not None:
                scores[name][sample] = value
    return _Drawn(score_all(metrics, counts, range(len(predictions))), scores, num_exams)


def _add_groups(counts_ND: Array, index_N: NDArray[np.intp], num_groups: int) -> Array:
    sums_ED = np.zeros((num_groups, counts_ND.shape[1]))
    np.add.at(sums_ED, index_N, counts_ND)
    return sums_ED


def _middle(values_S: Array) -> tuple[float, float]:
    """Return the ends of the middle LEVEL of the values."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(values_S, [tail, 1 - tail])
    return float(low), float(high)


def _p_value(gains_S: Array) -> float:
    gains_S = gains_S[~np.isnan(gains_S)]
    side = min((gains_S <= 0).sum(), (gains_S >= 0).sum())
    return min(1.0, 2 * (int(side) + 1) / (len(gains_S) + 1))
