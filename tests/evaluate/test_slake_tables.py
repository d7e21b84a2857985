"""The tables of a public set: twenty questions in two languages, scored by hand.

Beside each list of numbers stand the questions they belong to, by their number in `slake.py`.
"""

from __future__ import annotations

from math import exp

import pytest

from tests.evaluate.slake import make_predictions
from ultra.evaluate.suites import answer_metrics
from ultra.evaluate.tables import Row, Summary, summarise


@pytest.fixture(scope="module")
def strict() -> Summary:
    return summarise(make_predictions(), None, answer_metrics(["strict"], "char"), 0)


@pytest.fixture(scope="module")
def published() -> Summary:
    metrics = answer_metrics(["llava_med"], "whitespace")
    return summarise(make_predictions(), None, metrics, 0)


def only(rows: list[Row], **where: str) -> Row:
    (row,) = [r for r in rows if all(r[name] == value for name, value in where.items())]
    return row


def test_overall(strict: Summary) -> None:
    (row,) = strict.tables["answers"]  # nothing is known of training answers: no blind rows
    assert row["questions"] == 20
    assert row["strict/em"] == pytest.approx(7 / 20)  # 1 2 12 13 16 17 19
    assert row["strict/closed_accuracy"] == pytest.approx(6 / 10)  # not 4 6 10 20
    # 1 5 7 8 9 12 14 15 16 17
    assert row["strict/open-em"] == pytest.approx(4 / 10)
    f1 = [1, 2 / 3, 3 / 4, 2 / 3, 0, 1, 2 / 3, 1 / 2, 1, 1]
    precision = [1, 1, 3 / 4, 1 / 2, 0, 1, 2 / 3, 1 / 2, 1, 1]
    recall = [1, 1 / 2, 3 / 4, 1, 0, 1, 2 / 3, 1 / 2, 1, 1]
    assert row["strict/open-f1-char"] == pytest.approx(sum(f1) / 10)
    assert row["strict/open-precision-char"] == pytest.approx(sum(precision) / 10)
    assert row["strict/open-recall-char"] == pytest.approx(sum(recall) / 10)
    # 21 tokens said and 21 meant: no brevity penalty. 16 of them match, 5 of 11 pairs (7 16 17),
    # 2 of 5 triples (17), 1 of 2 fours (17).
    bleu = (16 / 21 * 5 / 11 * 2 / 5 * 1 / 2) ** 0.25
    assert row["strict/open-bleu4-char"] == pytest.approx(bleu)


def test_by_language(strict: Summary) -> None:
    rows = strict.tables["languages"]
    zh, en = only(rows, language="zh"), only(rows, language="en")
    assert (zh["questions"], en["questions"]) == (12, 8)
    assert zh["strict/open-em"] == pytest.approx(3 / 6)
    assert en["strict/open-em"] == pytest.approx(1 / 4)
    assert zh["strict/open-f1-char"] == pytest.approx((1 + 3 / 4 + 0 + 2 / 3 + 1 + 1) / 6)
    assert en["strict/open-f1-char"] == pytest.approx((2 / 3 + 2 / 3 + 1 + 1 / 2) / 4)
    assert zh["strict/closed_accuracy"] == pytest.approx(4 / 6)
    assert en["strict/closed_accuracy"] == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    ("table", "column", "value", "questions", "open_em", "closed"),
    [
        ("modalities", "modality", "CT", 8, 1 / 4, 2 / 4),
        ("modalities", "modality", "MR", 7, 1 / 4, 2 / 3),
        ("modalities", "modality", "DX", 5, 2 / 2, 2 / 3),
        ("tasks", "task", "Modality", 4, 1 / 2, 2 / 2),
        ("tasks", "task", "Organ", 5, 2 / 3, 0 / 2),
        ("tasks", "task", "Position", 5, 0 / 2, 2 / 3),
        ("tasks", "task", "Abnormality", 6, 1 / 3, 2 / 3),
    ],
)
def test_by_group(
    strict: Summary, table: str, column: str, value: str, questions: int, open_em: float,
    closed: float,
) -> None:  # fmt: skip
    row = only(strict.tables[table], **{column: value})
    assert row["questions"] == questions
    assert row["strict/open-em"] == pytest.approx(open_em)
    assert row["strict/closed_accuracy"] == pytest.approx(closed)


def test_published_definitions(published: Summary) -> None:
    (row,) = published.tables["answers"]
    # 1 5 7 8 9 12 14 15 16 17; `a` is an article and goes, a Chinese answer is one token
    em = [1, 1, 0, 1, 0, 1, 0, 1 / 2, 1, 1]
    f1 = [1, 2 / 3, 0, 1, 0, 1, 0, 1 / 2, 1, 1]
    recall = [1, 1 / 2, 0, 1, 0, 1, 0, 1 / 2, 1, 1]
    bleu1 = [1, exp(-1), 0, 1, 0, 1, 0, 1 / 2, 1, 1]
    assert row["llava_med/em-whitespace"] == pytest.approx(sum(em) / 10)
    assert row["llava_med/precision-whitespace"] == pytest.approx(sum(em) / 10)
    assert row["llava_med/f1-whitespace"] == pytest.approx(sum(f1) / 10)
    assert row["llava_med/recall-whitespace"] == pytest.approx(sum(recall) / 10)
    assert row["llava_med/bleu1-whitespace-none"] == pytest.approx(sum(bleu1) / 10)
    assert row["llava_med/closed_accuracy"] == pytest.approx(1 / 10)  # 11 alone
    assert row["llava_med/closed_accuracy-substring"] == pytest.approx(5 / 10)  # 2 6 11 13 19
    xray = only(published.tables["modalities"], modality="DX")
    assert xray["llava_med/em-whitespace"] == 1
    assert xray["llava_med/closed_accuracy-substring"] == pytest.approx(1 / 3)
