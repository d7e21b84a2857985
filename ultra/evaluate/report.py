"""What a report for a browser shows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from ultra.config import PipelineConfig
from ultra.evaluate.figures import draw_curves, draw_strip
from ultra.evaluate.predictions import Prediction, read_frames
from ultra.evaluate.published import DIFFERENCES, caption, columns_of
from ultra.evaluate.tables import Summary
from ultra.model.drawing import to_png
from ultra.page import build_page, data_uri, show_table
from ultra.tracking import Tracker, read_history

_ROWS = (
    "<code>constant</code> gives each task its most frequent training answer, "
    "<code>question_only</code> the most frequent training answer to the very same question: what "
    "a model that never looks at the frames could reach. Neither is there where nothing is known "
    "of the training answers."
)
_SELECTION = (
    "Over the exams in which some frames show what the report says and some do not. "
    "<code>chance</code> is a random choice, <code>brightest</code> and <code>darkest</code> the "
    "frame with the most striking blob, chosen without a model; the other columns are about the "
    "ranking by scores, and <code>chance_</code> is what a random ranking reaches."
)
_FACTS = (
    "What the answers state, read by rule: lesion, side, size, echo, margin, and whether all is "
    "normal. <code>precision</code> is the share of stated facts that are true, "
    "<code>recall</code> the share of true facts that are stated. <code>lesion</code> leaves out "
    "exams without one."
)
_INTERVALS = (
    "95 % intervals of the model's scores, by the bootstrap over exams: where the score may lie on "
    "other exams like these, with this same model."
)
_PARTS = {
    "about exams with a lesion": "lesions",
    "by task": "tasks",
    "by site": "sites",
    "by modality": "modalities",
    "by language": "languages",
}
_STRIPS = "Orange outside: the frame the model chose. Green inside: shows what the report says."
_PICTURES = (
    "Under some exams, above: how each token of each frame scored (Eq. 3), the best one bordered "
    "white. Below, on the left: the scores of the frames by each encoder alone and fused by alpha, "
    "a star over the best; on the right: where the answer looked, the mean over layers, heads and "
    "tokens of the answer. What is missing to 100 % went to the text."
)


NUM_SHOWN, NUM_EXPLAINED = 12, 3
"""Exams shown as pictures, and those of them that also show what an answer rests on."""


def track_report(
    config: PipelineConfig, tracker: Tracker, predictions: Sequence[Prediction], summary: Summary
) -> None:
    """Record the report of an evaluation and the pictures in it."""
    shown = spread_exams(predictions, NUM_SHOWN)
    exams = pick_exams(predictions, read_frames(config.data.exams_uri, shown))
    for exam in exams:
        p = exam.predictions[0]
        figure = draw_strip(exam.frames, p.scores, p.chosen, p.valid)
        tracker.figure(f"frames/{p.exam_id}", figure)
        for png in (p.picture for p in exam.predictions if p.picture is not None):
            tracker.file(f"understanding/{p.exam_id}.png", png)
    curves = read_history(config, "train")
    if curves:
        tracker.figure("training_curves", draw_curves(curves))
    sections = show_results(summary, exams, curves, config.evaluate.tokenizer)
    tracker.text("report.html", build_page(f"Evaluation of {config.name}", sections))


@dataclass(frozen=True, slots=True)
class Exam:
    """An exam as the report shows it: its frames and every answer about it."""

    frames: tuple[bytes, ...]
    predictions: tuple[Prediction, ...]


def spread_exams(predictions: Iterable[Prediction], count: int) -> set[str]:
    """Return the ids of at most `count` exams, evenly spread over all in their order."""
    return spread({p.exam_id for p in predictions}, count)


def spread(names: Iterable[str], count: int) -> set[str]:
    """Return at most `count` names, evenly spread over all in their order."""
    ordered = sorted(names)
    return {ordered[i * len(ordered) // count] for i in range(count)} if ordered else set()


def pick_exams(
    predictions: Iterable[Prediction], frames: Mapping[str, Sequence[bytes]]
) -> list[Exam]:
    """Return the exams whose frames are given, in the order of the predictions."""
    grouped = groupby(predictions, key=lambda p: p.exam_id)
    return [
        Exam(tuple(frames[exam_id]), tuple(group))
        for exam_id, group in grouped
        if exam_id in frames
    ]


def show_results(
    summary: Summary,
    exams: Iterable[Exam],
    curves: Mapping[str, Sequence[tuple[int, float]]],
    tokenizer: str = "char",
) -> list[tuple[str, str]]:
    """Return the sections of an evaluation: scores, tables, training curves and exams.

    Args:
        summary: what `tables.summarise` returned.
        exams: those shown as pictures.
        curves: metric -> (step, value) of the training run; empty where it is not known.
        tokenizer: of the scores.
    """
    tables = summary.tables
    sections = [
        (
            "Answers",
            f"<p>{escape(caption(tokenizer))}</p>\n{show_by_suite(tables['answers'])}<p>{_ROWS}</p>",
        ),
        ("Facts", show_table(tables["findings"]) + f"<p>{_FACTS}</p>"),
        ("Frame selection", show_table(tables["selection"]) + f"<p>{_SELECTION}</p>"),
        ("Intervals", show_table(tables["intervals"]) + f"<p>{_INTERVALS}</p>"),
        *(
            (f"Answers {which}", f"<p>Tokens: {tokenizer}.</p>\n{show_by_suite(tables[table])}")
            for which, table in _PARTS.items()
        ),
    ]
    if tables["differences"]:
        differences = f"<p>{DIFFERENCES}</p>\n{show_table(tables['differences'])}"
        sections.insert(1, ("Differences", differences))
    if curves:
        sections.append(("Training", show_figure(draw_curves(curves), "training curves")))
    shown = "\n".join(show_exam(exam) for exam in exams)
    return [*sections, ("Exams", f"<p>{_STRIPS} {_PICTURES}</p>\n{shown}")]


def show_by_suite(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as one HTML table for each suite, with the columns of no suite in all of them."""
    suites = dict.fromkeys(
        name.partition("/")[0] for name in (rows[0] if rows else {}) if "/" in name
    )
    if not suites:
        return show_table(rows)
    return "\n".join(show_table(columns_of(suite, rows)) for suite in suites)


def show_exam(exam: Exam) -> str:
    """Return an exam's frames, its questions with their answers, and what an answer rests on.

    The chosen frame is outlined; what the answer rests on is shown where a picture of it was kept.
    """
    first = exam.predictions[0]
    strip = "\n".join(_show_frame(index, frame, first) for index, frame in enumerate(exam.frames))
    rows = []
    for p in exam.predictions:
        truth = "(unknown)" if p.truth is None else p.truth
        rows.append({"question": p.question, "answer": p.answer, "truth": truth})
    return (
        f"<h3>{escape(first.exam_id)} · {escape(first.site)}</h3>\n"
        f'<div class="strip">\n{strip}\n</div>\n{show_table(rows)}'
        + "".join(_show_picture(p) for p in exam.predictions)
    )


def _show_picture(prediction: Prediction) -> str:
    if prediction.picture is None:
        return ""
    about = f"What the answer to “{prediction.question}” rests on"
    return f"\n<p>{escape(about)}</p>\n{_show_png(prediction.picture, about)}"


def _show_frame(index: int, frame: bytes, prediction: Prediction) -> str:
    classes, words = [], [f"frame {index}"]
    if prediction.scores is not None:
        words.append(f"score {prediction.scores[index]:.2f}")
    if index == prediction.chosen:
        classes.append("chosen")
        words.append("chosen")
    if prediction.valid is not None and prediction.valid[index]:
        classes.append("valid")
        words.append("valid")
    caption = " · ".join(words)
    return (
        f'<figure class="{" ".join(classes)}"><img alt="{caption}" src="{data_uri(frame)}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def show_figure(figure: Figure, alt: str) -> str:
    """Return a matplotlib figure as an HTML picture."""
    return _show_png(to_png(figure), alt)


def _show_png(png: bytes, alt: str) -> str:
    return f'<img class="wide" alt="{escape(alt)}" src="{data_uri(png)}">'
