"""Predictions as numbers and tables."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ultra.evaluate.baselines import BlindAnswers
from ultra.evaluate.bootstrap import NUM_SAMPLES, bootstrap_intervals
from ultra.evaluate.comparison import difference_rows, line_up
from ultra.evaluate.findings import ALL, FACTS, fact_metrics, lesion_exams
from ultra.evaluate.metrics import Counts, Metric, count_all, score_all
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.selection import baseline_metrics, gradable_exams, selection_metrics
from ultra.evaluate.suites import SUITES, answer_metrics

Row = dict[str, Any]
Answers = Mapping[str, Sequence[Prediction]]
"""Row (`model`, `constant`, `question_only`, another model's name) -> its scored predictions."""

TABLES = (
    "answers", "lesions", "findings", "selection", "intervals", "differences", "tasks", "sites",
    "modalities", "languages",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """What an evaluation found.

    Attributes:
        metrics: name -> number; the model's by bare name (`strict/em`, `selection/accuracy`), those
            over exams with a lesion behind `lesion/`, others behind their row's name
            (`constant/strict/em`, `constant/lesion/strict/em`), the ends of 95 % intervals behind
            `low95/` and `high95/`.
        tables: name -> rows, for each of TABLES; every row of a table has the same columns.
    """

    metrics: dict[str, float]
    tables: dict[str, list[Row]]


def summarise(
    predictions: Sequence[Prediction],
    blind: BlindAnswers | None,
    metrics: Mapping[str, Metric] | None = None,
    bootstrap_samples: int = NUM_SAMPLES,
    others: Answers | None = None,
) -> Summary:
    """Return scores of the model beside those of other models and of answers without looking.

    Args:
        predictions: the model's; those without a truth are not scored.
        blind: the training split's most frequent answers; None where there is none.
        metrics: of answers; None for every suite by characters.
        bootstrap_samples: behind the intervals; 0 for none.
        others: name -> predictions of another model.
    """
    metrics = answer_metrics(SUITES, "char") if metrics is None else metrics
    scored = [p for p in predictions if p.truth is not None]
    exams = gradable_exams(predictions)
    lined_up = {name: line_up(scored, given) for name, given in (others or {}).items()}
    answers = {"model": scored, **_blind_rows(scored, blind), **lined_up}
    scores = _Scores(metrics, answers)
    lesions = lesion_exams(scored)
    everywhere = range(len(scored))
    with_lesion = [i for i in everywhere if scored[i].exam_id in lesions]
    tables = {
        "answers": scores.rows(everywhere),
        "lesions": scores.rows(with_lesion),
        "findings": _fact_rows(answers, {"all": everywhere, "lesion": with_lesion}),
        "selection": _selection_rows(exams),
        "intervals": [
            *_interval_rows(metrics, scored, bootstrap_samples),
            *_interval_rows(selection_metrics(), exams, bootstrap_samples),
        ],
        "differences": difference_rows(metrics, scored, lined_up, bootstrap_samples),
        "tasks": scores.rows_by("task"),
        "sites": scores.rows_by("site"),
        "modalities": scores.rows_by("modality"),
        "languages": scores.rows_by("language"),
    }
    return Summary(_flatten(predictions, tables), tables)


def _blind_rows(scored: Sequence[Prediction], blind: BlindAnswers | None) -> Answers:
    """Return the model's predictions with answers given without looking."""
    if blind is None:
        return {}
    return {
        "constant": [replace(p, answer=blind.constant(p.task), unanswered="") for p in scored],
        "question_only": [
            replace(p, answer=blind.question_only(p.task, p.question), unanswered="")
            for p in scored
        ],
    }


class _Scores:
    """What every answer of every row adds to every metric, and the rows of tables from it."""

    def __init__(self, metrics: Mapping[str, Metric], answers: Answers) -> None:
        self.metrics = metrics
        self.answers = answers
        self.counts: dict[str, Counts] = {
            row: count_all(metrics, given) for row, given in answers.items()
        }

    def rows(self, where: Sequence[int]) -> list[Row]:
        """Return one row for each model, over the questions at the indices `where`."""
        if not where:
            return []
        return [
            {
                "row": row,
                "questions": len(where),
                "unanswered": sum(bool(given[i].unanswered) for i in where),
                **score_all(self.metrics, self.counts[row], where),
            }
            for row, given in self.answers.items()
        ]

    def rows_by(self, column: str) -> list[Row]:
        """Return the rows of each value of a field, the values in order."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, prediction in enumerate(self.answers["model"]):
            groups[getattr(prediction, column)].append(index)
        return [
            {column: value, **row}
            for value, where in sorted(groups.items())
            for row in self.rows(where)
        ]


def _fact_rows(answers: Answers, subsets: Mapping[str, Sequence[int]]) -> list[Row]:
    """Return one row for each fact, subset of the exams and row of answers.

    `exams` is `all`, or `lesion` for those in which a true answer states one.
    """
    rows = []
    for fact in (ALL, *FACTS):
        metrics = fact_metrics(fact)
        scores = _Scores(metrics, answers)
        for subset, where in subsets.items():
            for row in scores.rows(where):
                values = {re.split("[/-]", name)[-1]: row[name] for name in metrics}
                rows.append({"fact": fact, "exams": subset, "row": row["row"], **values})
    return rows


def _selection_rows(exams: Sequence[Prediction]) -> list[Row]:
    """Return one row for all gradable exams, then one for each site."""
    if not exams:
        return []
    metrics = {**selection_metrics(), **baseline_metrics()}
    counts = count_all(metrics, exams)
    groups: dict[str, Sequence[int]] = {"all": range(len(exams))}
    for site in sorted({p.site for p in exams}):
        groups[site] = [i for i, p in enumerate(exams) if p.site == site]
    rows = []
    for site, where in groups.items():
        scores = score_all(metrics, counts, where)
        named = {name.removeprefix("selection/"): value for name, value in scores.items()}
        rows.append({"site": site, "exams": len(where), **named})
    return rows


def _interval_rows(
    metrics: Mapping[str, Metric], predictions: Sequence[Prediction], num_samples: int
) -> list[Row]:
    if not predictions or not num_samples:
        return []
    intervals = bootstrap_intervals(metrics, predictions, num_samples)
    return [
        {"metric": name, "value": i.value, "low95": i.low, "high95": i.high, "exams": i.num_exams}
        for name, i in intervals.items()
    ]


def _flatten(
    predictions: Sequence[Prediction], tables: Mapping[str, list[Row]]
) -> dict[str, float]:
    """Return the metrics of a summary; None values are left out."""
    metrics: dict[str, float | None] = {
        "num_exams": len({p.exam_id for p in predictions}),
        "num_questions": len(predictions),
    }
    for row in tables["answers"]:
        if row["unanswered"]:
            metrics[f"{_prefix(row['row'])}unanswered"] = row["unanswered"]
    for table, subset in (("answers", ""), ("lesions", "lesion/")):
        for row in tables[table]:
            prefix = _prefix(row["row"]) + subset
            metrics |= {f"{prefix}{name}": value for name, value in row.items() if "/" in name}
    for row in tables["findings"]:
        if row["fact"] != ALL:
            prefix = _prefix(row["row"]) + ("lesion/" if row["exams"] == "lesion" else "")
            metrics[f"{prefix}findings/{row['fact']}-f1"] = row["f1"]
    for name, value in (tables["selection"][0] if tables["selection"] else {}).items():
        if name != "site":
            metrics[f"selection/{name}"] = value
    for row in tables["intervals"]:
        metrics |= {f"{end}/{row['metric']}": row[end] for end in ("low95", "high95")}
    return {name: value for name, value in metrics.items() if value is not None}


def _prefix(row: str) -> str:
    return "" if row == "model" else f"{row}/"
