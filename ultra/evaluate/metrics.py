"""Scores as sums over predictions, and the suite `strict`.

A suite is a set of definitions. Its name is part of a metric's name, and so are the tokenizer's,
where tokens count, and the smoothing's: `strict/f1-char`, `llava_med/bleu4-char-none`. Names hold
no brackets because MLflow allows none. Scores lie between 0 and 1.

Shapes: N predictions, D sums of a metric.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ultra.evaluate.predictions import Prediction
from ultra.evaluate.tokenizers import Tokenize, tokenize_char

YES = frozenset(
    {"是", "是的", "有", "存在", "包含", "包括", "可以", "可见", "能", "对", "正确", "yes", "true"}
)
NO = frozenset(
    {"否", "不", "不是", "没", "没有", "无", "未", "未见", "不存在", "不包含", "不包括", "不可以"}
    | {"不可见", "不能", "不对", "错", "错误", "no", "not", "false"}
)

Counts = Mapping[str, NDArray[np.float64]]
"""Metric -> what each prediction adds to its sums, (N, D)."""


def ratio(sums: Sequence[float]) -> float | None:
    """Return the first sum over the second; None where there was nothing to count."""
    return float(sums[0] / sums[1]) if sums[1] else None


@dataclass(frozen=True, slots=True)
class Metric:
    """A score that follows from sums over predictions, a mean being the simplest.

    Any choice of predictions is scored by adding what was counted once: a task's, a site's, a
    bootstrap sample's.

    Attributes:
        count: prediction -> what it adds to the sums; its truth is known.
        score: the sums -> the score, None where it does not apply.
    """

    count: Callable[[Prediction], Sequence[float]]
    score: Callable[[Sequence[float]], float | None] = ratio


def count_all(metrics: Mapping[str, Metric], predictions: Sequence[Prediction]) -> Counts:
    """Return what each prediction adds to each metric."""
    return {
        name: np.array([metric.count(p) for p in predictions], dtype=np.float64)
        for name, metric in metrics.items()
    }


def score_all(
    metrics: Mapping[str, Metric], counts: Counts, where: Sequence[int]
) -> dict[str, float | None]:
    """Return the scores over the predictions at the indices `where`, one at least."""
    return {
        name: metric.score(counts[name][list(where)].sum(axis=0).tolist())
        for name, metric in metrics.items()
    }


def strict_metrics(tokenizer: str, tokenize: Tokenize) -> dict[str, Metric]:
    """Return the suite `strict`.

    `em` is the share of answers that equal the truth after normalisation by `tokenize_char`,
    whatever tokenizer the others use: case, width, spaces and punctuation do not count, everything
    else does. `f1` is the mean over answers of the F1 between bags of tokens; counts are clipped,
    so a token said three times matches at most as often as the truth has it. `bleu4` is corpus
    BLEU (Papineni et al., 2002), see `score_bleu`. Those behind `open-` count over the questions
    that are not closed, as published tables do; `open-precision` and `open-recall` are means over
    answers, of the same clipped counts as `f1`.

    `closed_accuracy` is the share of right answers to closed questions, see `is_closed`. Where
    truth and answer both say yes or no, words of one meaning count as equal and opposite ones never
    do (不包含 for 包含 is wrong although most of its characters match); where one of them says
    neither (左侧), the answer is right when it equals the truth as for `em`.

    Args:
        tokenizer: its name.
        tokenize: the tokenizer.
    """

    def em(p: Prediction) -> Sequence[float]:
        return tokenize_char(p.answer) == tokenize_char(p.truth or ""), 1

    def f1(p: Prediction) -> Sequence[float]:
        return clipped_f1(tokenize(p.answer), tokenize(p.truth or "")), 1

    def precision(p: Prediction) -> Sequence[float]:
        return clipped_precision(tokenize(p.answer), tokenize(p.truth or "")), 1

    def recall(p: Prediction) -> Sequence[float]:
        return clipped_precision(tokenize(p.truth or ""), tokenize(p.answer)), 1

    def bleu(p: Prediction) -> Sequence[float]:
        return count_bleu(tokenize(p.answer), tokenize(p.truth or ""))

    return {
        "strict/em": Metric(em),
        f"strict/f1-{tokenizer}": Metric(f1),
        f"strict/bleu4-{tokenizer}": Metric(bleu, score_bleu),
        "strict/open-em": Metric(_over_open(em)),
        f"strict/open-f1-{tokenizer}": Metric(_over_open(f1)),
        f"strict/open-precision-{tokenizer}": Metric(_over_open(precision)),
        f"strict/open-recall-{tokenizer}": Metric(_over_open(recall)),
        f"strict/open-bleu4-{tokenizer}": Metric(_over_open(bleu), score_bleu),
        "strict/closed_accuracy": Metric(_closed),
    }


def clipped_f1(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Return the F1 between two bags of tokens; 1 where both are empty."""
    if not answer or not truth:
        return float(len(answer) == len(truth))
    shared = (Counter(answer) & Counter(truth)).total()
    return 2 * shared / (len(answer) + len(truth))


def clipped_precision(answer: Sequence[str], truth: Sequence[str]) -> float:
    """Return the share of an answer's tokens that the truth has; 1 where both are empty."""
    if not answer or not truth:
        return float(len(answer) == len(truth))
    return (Counter(answer) & Counter(truth)).total() / len(answer)


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Return the runs of `order` tokens, counted."""
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def count_bleu(answer: Sequence[str], truth: Sequence[str]) -> list[float]:
    """Return clipped matches and n-grams of orders 1 to 4, then both lengths in tokens."""
    pairs = [(ngrams(answer, order), ngrams(truth, order)) for order in range(1, 5)]
    matches = [(said & meant).total() for said, meant in pairs]
    return [*matches, *(said.total() for said, _ in pairs), len(answer), len(truth)]


def score_bleu(sums: Sequence[float]) -> float | None:
    """Return corpus BLEU-4 without smoothing from sums of `count_bleu`.

    The geometric mean of the corpus's n-gram precisions times the brevity penalty. Orders the
    answers are too short for are left out (effective order), so a perfect answer of two characters
    scores 1; an order that has n-grams and no match gives 0. None where nothing was counted.
    """
    if not any(sums):
        return None
    used = [(m, t) for m, t in zip(sums[:4], sums[4:8], strict=True) if t]
    if not used or not all(m for m, _ in used):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in used) / len(used))
    return precision * math.exp(min(0.0, 1 - sums[9] / sums[8]))


def polarity(text: str, *, whole: bool = False) -> bool | None:
    """Return True for an answer that says yes, False for one that says no, None for neither.

    A word of two characters or more counts where the answer begins with it, the longest such word
    deciding; a single character only as the whole first clause, because `无回声` denies nothing.

    Args:
        text: the answer.
        whole: count a word only when it is all there is, as for a truth.
    """
    clauses = [part for part in re.split(r"[\s,.;:!?、，。；：！？]+", text) if part]
    if not clauses or (whole and len(clauses) > 1):
        return None
    clause = "".join(tokenize_char(clauses[0]))
    if clause in YES or clause in NO:
        return clause in YES
    if whole:
        return None
    words = [word for word in YES | NO if len(word) > 1 and _begins(clause, word)]
    return max(words, key=len) in YES if words else None


def _begins(clause: str, word: str) -> bool:
    # A Latin word must end where the clause's does: `normal` does not begin with `no`.
    rest = clause.removeprefix(word)
    return rest != clause and not (word.isascii() and rest[:1].isascii())


def is_closed(p: Prediction) -> bool:
    """Return whether a question has few possible answers.

    As its set says; where that says nothing, when the truth is a plain yes or no.
    """
    return polarity(p.truth or "", whole=True) is not None if p.closed is None else p.closed


def _over_open(count: Callable[[Prediction], Sequence[float]]) -> Callable[..., Sequence[float]]:
    """Return `count` with nothing to add for closed questions."""

    def count_open(p: Prediction) -> Sequence[float]:
        counts = count(p)
        return [0.0] * len(counts) if is_closed(p) else counts

    return count_open


def _closed(p: Prediction) -> Sequence[float]:
    if not is_closed(p):
        return 0, 0
    said, meant = polarity(p.answer), polarity(p.truth or "", whole=True)
    if said is None or meant is None:
        return tokenize_char(p.answer) == tokenize_char(p.truth or ""), 1
    return said is meant, 1
