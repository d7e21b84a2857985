"""The tables that papers print, in Markdown."""

from __future__ import annotations

import pytest

from tests.evaluate.slake import make_predictions
from ultra.evaluate.comparison import line_up
from ultra.evaluate.published import to_markdown
from ultra.evaluate.suites import answer_metrics
from ultra.evaluate.tables import summarise


def read_tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Heading -> name in the first column -> column -> cell."""
    tables = {}
    for section in text.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in body.splitlines()
            if line.startswith("|")
        ]
        head, marks, *rows = lines
        assert all(len(line) == len(head) for line in lines)
        assert set("".join(marks)) <= {"-", ":"}
        tables[title] = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    return tables


@pytest.mark.parametrize("tokenizer", ["char", "whitespace"])
def test_models_are_rows_and_metrics_columns(tokenizer: str) -> None:
    suites = ("strict", "llava_med")
    ours = make_predictions()
    metrics = answer_metrics(suites, tokenizer)
    summary = summarise(ours, None, metrics, 20, {"half|way": line_up(ours, ours[:10])})
    text = to_markdown(summary.tables, suites, tokenizer)
    assert f"`{tokenizer}`: a token is" in text.split("##")[0]
    tables = read_tables(text.replace("half\\|way", "half-way"))
    places = [
        "All questions", "Language en", "Language zh", "Modality CT", "Modality DX",
        "Modality MR", "Task Abnormality", "Task Modality", "Task Organ", "Task Position",
    ]  # fmt: skip
    tail = f", {tokenizer} tokens"
    assert [*tables] == [f"{p}: {s}{tail}" for p in places for s in suites] + ["Differences"]
    for title, rows in list(tables.items())[:-1]:
        assert [*rows] == ["model", "half-way"], title
    overall = tables[f"All questions: strict{tail}"]
    assert overall["model"]["questions"] == overall["half-way"]["questions"] == "20"
    assert overall["model"]["unanswered"] == "0"
    assert overall["half-way"]["unanswered"] == "10"
    assert overall["model"]["open-em"] == "0.400"
    assert overall["half-way"]["open-em"] == "0.100"  # question 1 of ten open ones
    assert f"f1-{tokenizer}" in overall["model"]
    xray = tables[f"Modality DX: llava_med{tail}"]
    assert xray["model"][f"em-{tokenizer}"] == "1.000"
    assert xray["half-way"]["closed_accuracy"] == "0.000"


def test_nothing_scored_gives_no_table() -> None:
    tables = summarise([], None, None, 0).tables
    assert "##" not in to_markdown(tables, ("strict",), "char")
