"""The ablation's tables and picture, from kept answers alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from ultra.data.instructions import CUE
from ultra.evaluate.baselines import BlindAnswers, find_blobs
from ultra.evaluate.bootstrap import bootstrap_differences
from ultra.evaluate.findings import lesion_exams
from ultra.evaluate.metrics import Metric, count_all, score_all, strict_metrics
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.selection import gradable_exams, selection_metrics
from ultra.evaluate.tokenizers import tokenize_char

FULL = "full"
TASKS = ("kind", "size", "echogenicity", "side", "margin")
SELECTION = "selection"
HEADINGS = {
    "em": "exact match", "lesion": "EM, lesions", "f1": "F1, characters", SELECTION: "frame",
    "kind": "kind", "size": "size", "echogenicity": "echo", "side": "side", "margin": "margin",
}  # fmt: skip
COSTS = {"train_cpu_s": "training", "answer_cpu_s": "answering"}
COLOURS = {"em": "#1b9e77", SELECTION: "#d95f02"}

Results = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A row's answers with one seed.

    Attributes:
        figures: what it took, by name; empty where no model answered.
        chooses: whether its answers rest on one frame, so that the choice can be graded.
        answers: whether there are answers to grade.
    """

    name: str
    table: str
    title: str
    seed: int
    predictions: tuple[Prediction, ...]
    figures: Mapping[str, float]
    chooses: bool = True
    answers: bool = True


def blind_runs(
    full: Sequence[Run], blind: BlindAnswers, frames: Mapping[str, Sequence[bytes]]
) -> list[Run]:
    """Return the rows that need no model, asked the questions of the full model's runs.

    Args:
        full: its runs.
        blind: the training split's most frequent answers.
        frames: exam id -> its frames, for the choices by brightness.
    """
    blobs = {
        exam.exam_id: find_blobs(frames[exam.exam_id])
        for exam in gradable_exams(full[0].predictions)
    }

    def chosen(place: int) -> Callable[[Prediction], Prediction]:
        return lambda p: replace(p, chosen=blobs[p.exam_id][place] if p.exam_id in blobs else 0)

    def said(answer: Callable[[Prediction], str]) -> Callable[[Prediction], Prediction]:
        return lambda p: replace(p, answer=answer(p))

    kinds: list[tuple[str, str, bool, Callable[[Prediction], Prediction]]] = [
        ("question-only", "most frequent answer to the question", True,
         said(lambda p: blind.question_only(p.task, p.question))),
        ("constant", "most frequent answer of the task", True,
         said(lambda p: blind.constant(p.task))),
        ("brightest", "frame with the brightest blob", False, chosen(0)),
        ("darkest", "frame with the darkest blob", False, chosen(1)),
    ]  # fmt: skip
    return [
        Run(
            name, "blind", title, run.seed, tuple(map(change, run.predictions)), {},
            chooses=not answers, answers=answers,
        )
        for name, title, answers, change in kinds
        for run in full
    ]  # fmt: skip


def summarise(runs: Sequence[Run]) -> Results:
    """Return `rows`, scores by row with their spread, and `differences` of the full model to each.

    A score has the mean over seeds, the standard deviation and every value; a difference is
    paired: the same questions about the same exams, all seeds added, exams drawn by the bootstrap.
    So its interval is about other exams; what other seeds do, `by_seed` shows.

    Args:
        runs: of all rows, those of the full model first.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    full = by_name[FULL]
    metrics = _metrics(lesion_exams(full[0].predictions))
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for name, members in by_name.items():
        first = members[0]
        scores = _spread([_score(run, metrics) for run in members])
        costs = _spread([_cost(run, full) for run in members])
        tokens = first.figures.get("visual_tokens")
        rows.append(
            {"row": name, "table": first.table, "title": first.title, "runs": len(members)}
            | {"visual_tokens": tokens} | scores | costs
        )  # fmt: skip
        if name != FULL:
            for column, difference in _compare(members, full, metrics).items():
                by_seed = _gains(rows[-1][column], rows[0][column])
                differences.append(
                    {"row": name, "metric": column, **difference, "by_seed": by_seed}
                )
    gradable = gradable_exams(full[0].predictions)
    chance = statistics.mean(sum(p.valid or ()) / len(p.valid or ()) for p in gradable)
    rows.append(
        {"row": "chance", "table": "blind", "title": "frame chosen at random", "runs": 0}
        | {"visual_tokens": None, **{name: [] for name in (*HEADINGS, *COSTS)}}
        | {SELECTION: {"mean": chance, "sd": None, "values": [chance]}}
    )
    return {
        "rows": rows,
        "differences": differences,
        "exams": len({p.exam_id for p in full[0].predictions}),
        "gradable_exams": len(gradable),
        "questions": len(full[0].predictions),
        "selection_chance": chance,
    }


def _metrics(lesions: set[str]) -> dict[str, Metric]:
    strict = strict_metrics("char", tokenize_char)
    em = strict["strict/em"]
    return {
        "em": em,
        "lesion": _among(em, lambda p: p.exam_id in lesions),
        "f1": strict["strict/f1-char"],
        **{task: _among(em, _asks(task)) for task in TASKS},
    }


def _asks(task: str) -> Callable[[Prediction], bool]:
    return lambda p: p.task == task


def _among(metric: Metric, belongs: Callable[[Prediction], bool]) -> Metric:
    return Metric(lambda p: metric.count(p) if belongs(p) else (0, 0), metric.score)


def _choices(run: Run) -> list[Prediction]:
    return gradable_exams(run.predictions) if run.chooses else []


def _score(run: Run, metrics: Mapping[str, Metric]) -> dict[str, float | None]:
    scores: dict[str, float | None] = dict.fromkeys(HEADINGS)
    if run.answers:
        counts = count_all(metrics, run.predictions)
        scores |= score_all(metrics, counts, range(len(run.predictions)))
    chosen = _choices(run)
    if chosen:
        scores[SELECTION] = statistics.mean((p.valid or ())[p.chosen or 0] for p in chosen)
    return scores


def _cost(run: Run, full: Iterable[Run]) -> dict[str, float | None]:
    """Return CPU seconds as ratios to the full model's of the same seed."""
    (same,) = (other for other in full if other.seed == run.seed)
    return {
        name: run.figures[name] / same.figures[name] if name in run.figures else None
        for name in COSTS
    }


def _spread(values: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    spread: dict[str, Any] = {}
    for name in values[0]:
        known = [v for each in values if (v := each[name]) is not None]
        spread[name] = known and {
            "mean": statistics.mean(known),
            "sd": statistics.stdev(known) if len(known) > 1 else None,
            "values": known,
        }
    return spread


def _compare(
    runs: Sequence[Run], full: Sequence[Run], metrics: Mapping[str, Metric]
) -> dict[str, dict[str, Any]]:
    """Return metric -> how much better the full model is, over the seeds that both have."""
    seeds = {run.seed for run in runs} & {run.seed for run in full}
    pairs = [[run for run in side if run.seed in seeds] for side in (runs, full)]
    compared: dict[str, Any] = {}
    if runs[0].answers:
        theirs, ours = ([_plain(p) for run in side for p in run.predictions] for side in pairs)
        compared |= bootstrap_differences(metrics, theirs, ours)
    theirs, ours = ([_plain(p) for run in side for p in _choices(run)] for side in pairs)
    if theirs:
        accuracy = {SELECTION: selection_metrics()["selection/accuracy"]}
        compared |= bootstrap_differences(accuracy, theirs, ours)
    return {name: asdict(difference) for name, difference in compared.items()}


def _gains(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[float]:
    return [b - a for a, b in zip(theirs["values"], ours["values"], strict=False)]


def _plain(p: Prediction) -> Prediction:
    """Return a prediction whose question does not tell the site, to pair rows with and without."""
    return replace(p, question=p.question.removeprefix(CUE.format(p.site)))


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of the results with a column for each mean and each standard deviation."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        if name in HEADINGS or name in COSTS:
            columns[name] = value["mean"] if value else None
            columns[f"{name}_sd"] = value["sd"] if value else None
        else:
            columns[name] = value
    return columns


def to_markdown(results: Results) -> str:
    """Return the tables as Markdown."""
    heads = ["row", "runs", *HEADINGS.values(), "full -", "visual tokens", *COSTS.values()]
    gains = {(d["row"], d["metric"]): d for d in results["differences"]}
    lines = [
        f"{results['questions']} questions about {results['exams']} exams of patients never "
        f"trained on; frames are graded in {results['gradable_exams']} of them (chance "
        f"{results['selection_chance']:.3f}). Mean over the seeds, standard deviation behind ±. "
        "`full -` is the full model's exact match less the row's: paired, with the 95 % interval "
        "of a bootstrap over exams, and in how many seeds it is above zero. CPU seconds an exam "
        "are ratios to the full model's.",
        "",
    ]
    for table in dict.fromkeys(row["table"] for row in results["rows"]):
        cells = [
            [
                row["title"],
                str(row["runs"] or ""),
                *(_cell(row[name]) for name in HEADINGS),
                _gain(gains.get((row["row"], "em"))),
                "" if row["visual_tokens"] is None else f"{row['visual_tokens']:.0f}",
                *(_cell(row[name], 2) for name in COSTS),
            ]
            for row in results["rows"]
            if row["table"] == table
        ]
        lines += [*_table(heads, cells), ""]
    blind = [row for row in results["rows"] if row["table"] == "blind" and row["runs"]]
    cells = [
        [row["title"], *(_gain(gains.get((row["row"], name))) for name in HEADINGS)]
        for row in blind
    ]
    lines += ["What the full model gains over answers and choices without a model:", ""]
    return "\n".join([*lines, *_table(["row", *HEADINGS.values()], cells), ""])


def _table(heads: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(row)} |" for row in cells]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *rows]


def _cell(score: Mapping[str, Any] | None, digits: int = 3) -> str:
    if not score:
        return ""
    spread = "" if score["sd"] is None else f" ± {score['sd']:.{digits}f}"
    return f"{score['mean']:.{digits}f}{spread}"


def _gain(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    by_seed = difference["by_seed"]
    above = f"{sum(gain > 0 for gain in by_seed)}/{len(by_seed)}"
    return "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**difference) + f" {above}"


def draw(results: Results) -> Figure:
    """Return exact match and frame accuracy of every row, a dot a seed."""
    rows = results["rows"]
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1.2), layout="constrained")
    axis = figure.subplots()
    for name, colour in COLOURS.items():
        for place, row in enumerate(rows):
            score = row[name]
            if score:
                values = score["values"]
                axis.scatter(values, [place] * len(values), s=10, color=colour, alpha=0.6)
                axis.scatter(score["mean"], place, s=60, color=colour, marker="|")
        axis.scatter(
            [], [], s=20, color=colour, label={"em": "exact match"}.get(name, "frame chosen")
        )
    axis.axvline(results["selection_chance"], color=COLOURS[SELECTION], linestyle=":", linewidth=1)
    axis.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title("a dot a seed, a bar their mean; dotted: a frame chosen at random", fontsize=9)
    return figure
