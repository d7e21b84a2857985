"""Predictions as numbers, tables and pictures."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ultra.evaluate.baselines import BlindAnswers
from ultra.evaluate.metrics import (
    SUITES,
    Pairs,
    gradable_exams,
    selection_accuracy,
    selection_chance,
)
from ultra.evaluate.predictions import Prediction

Row = dict[str, Any]

CHOSEN_COLOUR, VALID_COLOUR = "#d95f02", "#1b9e77"


@dataclass(frozen=True, slots=True)
class Summary:
    """What an evaluation found.

    Attributes:
        metrics: name -> number; the model's by bare name (`strict/em`), others behind their row's
            name (`constant/strict/em`, `selection/accuracy`).
        tables: name -> rows; every row of a table has the same columns.
    """

    metrics: dict[str, float]
    tables: dict[str, list[Row]]


def summarise(
    predictions: Sequence[Prediction],
    blind: BlindAnswers,
    tokenizer: str = "char",
    suite: str = "strict",
) -> Summary:
    """Return scores of the model beside those of answers given without looking.

    Args:
        predictions: the model's; those without a truth are not scored.
        blind: the training split's most frequent answers.
        tokenizer: a name in `metrics.TOKENIZERS`.
        suite: a name in `metrics.SUITES`.
    """
    scored = [p for p in predictions if p.truth is not None]

    def score(pairs: Pairs) -> dict[str, float | None]:
        return SUITES[suite](pairs, tokenizer)

    tables = {
        "answers": _score_rows(scored, blind, score),
        "tasks": _score_by("task", scored, blind, score),
        "sites": _score_by("site", scored, blind, score),
        "selection": _selection_rows(predictions),
    }
    metrics: dict[str, float] = {
        "num_exams": len({p.exam_id for p in predictions}),
        "num_questions": len(predictions),
    }
    for row in tables["answers"]:
        prefix = "" if row["row"] == "model" else f"{row['row']}/"
        metrics |= {f"{prefix}{k}": v for k, v in row.items() if "/" in k and v is not None}
    for name, value in (tables["selection"][0] if tables["selection"] else {}).items():
        if name != "site":
            metrics[f"selection/{name}"] = value
    return Summary(metrics, tables)


def _score_rows(
    scored: Sequence[Prediction],
    blind: BlindAnswers,
    score: Callable[[Pairs], dict[str, float | None]],
) -> list[Row]:
    if not scored:
        return []
    answers = {
        "model": [p.answer for p in scored],
        "constant": [blind.constant(p.task) for p in scored],
        "question_only": [blind.question_only(p.task, p.question) for p in scored],
    }
    truths = [p.truth or "" for p in scored]
    return [
        {"row": name, "questions": len(scored), **score(list(zip(said, truths, strict=True)))}
        for name, said in answers.items()
    ]


def _score_by(
    column: str,
    scored: Sequence[Prediction],
    blind: BlindAnswers,
    score: Callable[[Pairs], dict[str, float | None]],
) -> list[Row]:
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in scored:
        groups[getattr(prediction, column)].append(prediction)
    return [
        {column: value, **row}
        for value, group in sorted(groups.items())
        for row in _score_rows(group, blind, score)
    ]


def _selection_rows(predictions: Sequence[Prediction]) -> list[Row]:
    """Return one row for all gradable exams, then one for each site."""
    exams = gradable_exams(predictions)
    groups = {"all": exams} if exams else {}
    for site in sorted({p.site for p in exams}):
        groups[site] = [p for p in exams if p.site == site]
    return [
        {
            "site": site,
            "exams": len(group),
            "accuracy": selection_accuracy(group),
            "chance": selection_chance(group),
            "brightest": _hit_rate([(p, p.brightest) for p in group]),
            "darkest": _hit_rate([(p, p.darkest) for p in group]),
        }
        for site, group in groups.items()
    ]


def _hit_rate(choices: Sequence[tuple[Prediction, int | None]]) -> float:
    hits = [p.valid is not None and i is not None and p.valid[i] for p, i in choices]
    return sum(hits) / len(hits)


def draw_strip(
    frames: Sequence[bytes],
    scores: Sequence[float],
    chosen: int,
    valid: Sequence[bool] | None,
    title: str = "",
) -> Figure:
    """Return the frames of an exam side by side, the score under each.

    The chosen frame has a thick orange border, a frame that truly shows what the report says a
    green one inside it.

    Args:
        frames: encoded frames, one at least.
        scores: feature score of each.
        chosen: index of the chosen one.
        valid: which are valid; None where nobody knows.
        title: in Latin script, the only one every matplotlib has glyphs for.
    """
    columns = min(len(frames), 8)
    rows = -(-len(frames) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for index, (axis, frame) in enumerate(zip(figure.axes, frames, strict=False)):
        with Image.open(io.BytesIO(frame)) as image:
            pixels = np.asarray(image.convert("RGB"))
        axis.imshow(pixels)
        axis.set_title(f"{scores[index]:.2f}", y=-0.16, fontsize=9)
        height, width = pixels.shape[:2]
        if index == chosen:
            _outline(axis, width, height, 0.0, CHOSEN_COLOUR)
        if valid is not None and valid[index]:
            _outline(axis, width, height, 0.045, VALID_COLOUR)
    figure.suptitle(title or "orange: chosen, green: valid", fontsize=9)
    return figure


def _outline(axis: Any, width: int, height: int, inset: float, colour: str) -> None:
    left, top = inset * width, inset * height
    x = [left, width - left, width - left, left, left]
    y = [top, top, height - top, height - top, top]
    axis.plot(x, y, color=colour, linewidth=3, clip_on=False)


def draw_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return one panel for each metric over the training steps.

    Args:
        history: metric -> (step, value) in any order.
    """
    figure = Figure(figsize=(4.2 * max(1, len(history)), 3), layout="constrained")
    panels = figure.subplots(1, max(1, len(history)), squeeze=False)[0]
    for axis, (name, points) in zip(panels, history.items(), strict=False):
        steps, values = zip(*sorted(points), strict=True)
        axis.plot(steps, values, color=VALID_COLOUR)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return figure
