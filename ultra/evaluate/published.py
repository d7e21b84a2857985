"""Tables as papers print them: models as rows, the metrics of a suite as columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ultra.evaluate.tokenizers import describe_tokenizer

Rows = Sequence[Mapping[str, Any]]

GROUPS = {"languages": "language", "modalities": "modality", "tasks": "task"}
"""Table -> its column; one table is printed for each value."""

DIFFERENCES = (
    "The model minus another one, over the questions that both answered, with the 95 % interval of "
    "the paired bootstrap over exams."
)


def caption(tokenizer: str) -> str:
    """Return what stands over the scores: their range, and what a token is."""
    return (
        "Scores lie between 0 and 1; empty means that there was nothing to count. Open and closed "
        "questions are told apart as the set does, else by whether the true answer is a plain yes "
        "or no. A question without an answer counts as wrong. "
        f"The tokenizer is part of a metric's name; {describe_tokenizer(tokenizer)}"
    )


def to_markdown(tables: Mapping[str, Rows], suites: Sequence[str], tokenizer: str) -> str:
    """Return the scores of all models in Markdown: overall, by language, modality and task.

    Args:
        tables: those of a summary.
        suites: whose metrics are columns, a table for each.
        tokenizer: of the scores.
    """
    lines = ["# Scores", "", caption(tokenizer)]
    for title, rows in _sections(tables):
        for suite in suites:
            heading = f"## {title}: {suite}, {tokenizer} tokens"
            lines += ["", heading, "", *_table(columns_of(suite, rows))]
    if tables["differences"]:
        lines += ["", "## Differences", "", DIFFERENCES, "", *_table(tables["differences"])]
    return "\n".join(lines) + "\n"


def columns_of(suite: str, rows: Rows) -> list[dict[str, Any]]:
    """Return rows with the metrics of one suite, and with the columns of no suite."""
    return [
        {name: v for name, v in row.items() if "/" not in name or name.startswith(f"{suite}/")}
        for row in rows
    ]


def _sections(tables: Mapping[str, Rows]) -> Iterator[tuple[str, Rows]]:
    if tables["answers"]:
        yield "All questions", tables["answers"]
    for table, column in GROUPS.items():
        for value, rows in groupby(tables[table], key=itemgetter(column)):
            yield (
                f"{column.capitalize()} {value}",
                [{name: v for name, v in row.items() if name != column} for row in rows],
            )


def _table(rows: Rows) -> list[str]:
    head = [name.partition("/")[2] or name for name in rows[0]]
    marks = ["---" if isinstance(value, str) else "---:" for value in rows[0].values()]
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, marks, *cells)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
