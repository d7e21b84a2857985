"""Scores of chosen frames, against the truth about which frames show what the report says.

Every metric counts over gradable exams, one prediction an exam. Ties are held against the model: of
frames with equal scores those that are not valid stand first.

Letters: k frames of an exam, v of them valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from ultra.evaluate.metrics import Metric
from ultra.evaluate.predictions import Prediction

NUM_BINS = 10
"""Bins of equal width of the calibration error."""


def gradable_exams(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Return one prediction of each exam in which some frames are valid and some are not.

    Where all frames are valid, or none is, there is nothing to choose; nor does a model choose that
    scores no frame.
    """
    exams = {p.exam_id: p for p in predictions if p.scores}
    return [p for p in exams.values() if p.valid is not None and any(p.valid) and not all(p.valid)]


def selection_metrics() -> dict[str, Metric]:
    """Return the scores of the model's choice and ranking.

    `accuracy` is the share of exams whose chosen frame is valid. `mean_rank` and
    `mean_reciprocal_rank` go by the rank of the best valid frame, 1 being the first. `ndcg` is the
    normalised discounted cumulative gain of the whole ranking (Järvelin and Kekäläinen, 2002), a
    valid frame gaining 1. `calibration_error` is the expected calibration error (Guo et al., 2017)
    of the chosen frame's share in the softmax of all scores, taken as the probability that it is
    valid; with several valid frames that share cannot reach 1, and the error is the larger for it.
    """
    return {
        "selection/accuracy": _mean(lambda p, valid: _is_valid(p.chosen, valid)),
        "selection/mean_reciprocal_rank": _ranking(lambda *given: 1 / best_rank(*given)),
        "selection/mean_rank": _ranking(best_rank),
        "selection/ndcg": _ranking(ndcg),
        "selection/calibration_error": Metric(_count_bins, _calibration_error),
    }


def baseline_metrics() -> dict[str, Metric]:
    """Return what the same exams give without a model.

    `chance` and the names that begin with it are expectations over a random order of the frames;
    `brightest` and `darkest` choose the frame with the most striking blob.
    """
    return {
        "selection/chance": _mean(lambda _, valid: sum(valid) / len(valid)),
        "selection/brightest": _mean(lambda p, valid: _is_valid(p.brightest, valid)),
        "selection/darkest": _mean(lambda p, valid: _is_valid(p.darkest, valid)),
        "selection/chance_reciprocal_rank": _mean(
            lambda _, valid: random_reciprocal_rank(len(valid), sum(valid))
        ),
        "selection/chance_rank": _mean(lambda _, valid: (len(valid) + 1) / (sum(valid) + 1)),
        "selection/chance_ndcg": _mean(lambda _, valid: random_ndcg(len(valid), sum(valid))),
    }


def best_rank(scores: Sequence[float], valid: Sequence[bool]) -> int:
    """Return the rank of the best valid frame, from 1."""
    return _ranked(scores, valid).index(True) + 1


def ndcg(scores: Sequence[float], valid: Sequence[bool]) -> float:
    """Return the normalised discounted cumulative gain; 1 where all valid frames stand first."""
    gain = sum(_discount(i) for i, hit in enumerate(_ranked(scores, valid)) if hit)
    return gain / sum(map(_discount, range(sum(valid))))


def random_reciprocal_rank(k: int, v: int) -> float:
    """Return the mean reciprocal rank of the best of v valid frames among k in random order."""
    # The best stands at rank r when the other v - 1 are among the k - r behind it.
    chances = ((r, math.comb(k - r, v - 1)) for r in range(1, k - v + 2))
    return sum(count / r for r, count in chances) / math.comb(k, v)


def random_ndcg(k: int, v: int) -> float:
    """Return the mean `ndcg` of k frames in random order, v of them valid."""
    return v / k * sum(map(_discount, range(k))) / sum(map(_discount, range(v)))


def softmax(scores: Sequence[float]) -> list[float]:
    """Return the shares of the scores' exponentials."""
    highest = max(scores)
    powers = [math.exp(score - highest) for score in scores]
    return [power / sum(powers) for power in powers]


def _mean(value: Callable[[Prediction, Sequence[bool]], float]) -> Metric:
    return Metric(lambda p: (value(p, p.valid or ()), 1))


def _ranking(value: Callable[[Sequence[float], Sequence[bool]], float]) -> Metric:
    return Metric(lambda p: (value(p.scores or (), p.valid or ()), 1))


def _is_valid(index: int | None, valid: Sequence[bool]) -> bool:
    return index is not None and valid[index]


def _ranked(scores: Sequence[float], valid: Sequence[bool]) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], valid[i]))
    return [valid[i] for i in order]


def _discount(index: int) -> float:
    return 1 / math.log2(index + 2)


def _count_bins(p: Prediction) -> Sequence[float]:
    """Return exams, confidence and hits for each bin in turn."""
    sums = [0.0] * (3 * NUM_BINS)
    if p.scores is None or p.chosen is None:
        return sums
    confidence = softmax(p.scores)[p.chosen]
    start = 3 * min(int(confidence * NUM_BINS), NUM_BINS - 1)
    sums[start : start + 3] = [1, confidence, _is_valid(p.chosen, p.valid or ())]
    return sums


def _calibration_error(sums: Sequence[float]) -> float | None:
    exams, confidences, hits = sums[0::3], sums[1::3], sums[2::3]
    gaps = (abs(c - h) for c, h in zip(confidences, hits, strict=True))
    return sum(gaps) / sum(exams) if sum(exams) else None
