"""Scores of what an answer states: facts instead of tokens.

A fact of the truth is found where the answer states the same value. Precision is found over stated,
recall found over true, F1 between both; over several facts or answers the counts are added first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ultra.data.instructions import Report, parse_answer
from ultra.evaluate.metrics import Metric, polarity
from ultra.evaluate.predictions import Prediction

SIZE_TOLERANCE_MM = 2.0
SIZE_TOLERANCE = 0.2
"""A size is found when it is off by no more than this share of the truth, or 2 mm. Ours."""

_ECHO = re.compile(r"^(?:[低等高强]|混合)回声(?=.)")
_HEALTHY = re.compile(r"(?:是的?[，,])?(?:(?:未见|无)(?:明显)?异常|正常)")
_ILL = re.compile(r"(?:不正常|异常)")


def same_kind(answer: str, truth: str) -> bool:
    """Return whether two lesions are of one kind; the echo in a name is a fact of its own."""
    return _ECHO.sub("", answer) == _ECHO.sub("", truth)


def same_side(answer: str, truth: str) -> bool:
    """Return whether two places are on one side: 右叶 and 右侧 are."""
    return answer[0] == truth[0]


def same_size(answer_mm: float, truth_mm: float) -> bool:
    """Return whether two sizes in mm agree within the tolerance."""
    return abs(answer_mm - truth_mm) <= max(SIZE_TOLERANCE_MM, SIZE_TOLERANCE * truth_mm)


def _same(answer: object, truth: object) -> bool:
    return answer == truth


FACTS: Mapping[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "kind": ("kind", same_kind),
    "side": ("side", same_side),
    "size": ("size_mm", same_size),
    "echogenicity": ("echogenicity", _same),
    "margin": ("margin", _same),
    "normal": ("normal", _same),
}
"""Fact -> its field of `Report`, and when two values are the same."""

ALL = "all"
"""The name of all facts together."""


@lru_cache(2**16)
def read_facts(task: str, text: str) -> Report:
    """Return what an answer to a question of `task` states; for `normal`, also by a plain yes."""
    if task != "normal":
        return parse_answer(task, text)
    if _HEALTHY.match(text):
        return Report(normal=True)
    return Report(normal=False if _ILL.match(text) else polarity(text))


def lesion_exams(predictions: Iterable[Prediction]) -> set[str]:
    """Return the ids of the exams in which a true answer states a lesion."""
    return {p.exam_id for p in predictions if p.truth is not None and _shows_lesion(p)}


def _shows_lesion(p: Prediction) -> bool:
    report = read_facts(p.task, p.truth or "")
    lesion = (report.kind, report.size_mm, report.echogenicity, report.margin)
    return report.normal is False or any(value is not None for value in lesion)


def fact_metrics(fact: str = ALL) -> dict[str, Metric]:
    """Return precision, recall and F1 of a fact, or of all facts counted together.

    Each is None where it has nothing to count: no answer states the fact, no truth does, neither
    does.
    """
    names = list(FACTS) if fact == ALL else [fact]
    prefix = "findings/" if fact == ALL else f"findings/{fact}-"

    def count(p: Prediction) -> Sequence[float]:
        """Return the facts found, stated and true."""
        counts = [_count_fact(name, p) for name in names]
        return [sum(column) for column in zip(*counts, strict=True)]

    return {
        f"{prefix}precision": Metric(count, lambda sums: _share(sums[0], sums[1])),
        f"{prefix}recall": Metric(count, lambda sums: _share(sums[0], sums[2])),
        f"{prefix}f1": Metric(count, lambda sums: _share(2 * sums[0], sums[1] + sums[2])),
    }


def _count_fact(fact: str, p: Prediction) -> tuple[int, int, int]:
    field, same = FACTS[fact]
    said = getattr(read_facts(p.task, p.answer), field)
    meant = getattr(read_facts(p.task, p.truth or ""), field)
    found = said is not None and meant is not None and same(said, meant)
    return found, said is not None, meant is not None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
