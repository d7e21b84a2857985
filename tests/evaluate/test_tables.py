"""Tables and pictures of hand-made predictions."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ultra.evaluate.baselines import count_answers
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.tables import draw_curves, draw_strip, summarise


def predict(exam_id: str, task: str, answer: str, truth: str | None, **more: object) -> Prediction:
    values = {
        "patient_key": "p", "site": "肝脏", "question": "?", "chosen": 1, "scores": (0.0, 1.0),
        "valid": (False, True), "brightest": 0, "darkest": 1, "token_ids": (1,),
        "finish_reason": "stop", "content_sha256": exam_id,
    }  # fmt: skip
    return Prediction(exam_id=exam_id, task=task, answer=answer, truth=truth, **{**values, **more})


BLIND = count_answers(
    {("kind", "?", "囊肿"): 2, ("kind", "what", "结石"): 1, ("normal", "?", "否"): 1}
)


def test_model_and_baselines_side_by_side() -> None:
    kidney = {"site": "肾脏", "valid": (True, False), "brightest": 0, "darkest": 0}
    summary = summarise(
        [
            predict("a", "kind", "囊肿", "囊肿"),
            predict("a", "kind", "结石", "结石", question="what"),
            predict("b", "normal", "是", "否", **kidney),
            predict("b", "report", "所见", None, **kidney),
        ],
        BLIND,
    )
    answers = {row.pop("row"): row for row in summary.tables["answers"]}
    assert answers["model"]["questions"] == 3  # the one without a truth is not scored
    assert answers["model"]["strict/em"] == pytest.approx(2 / 3)
    assert answers["model"]["strict/closed_accuracy"] == 0
    assert answers["constant"]["strict/em"] == pytest.approx(2 / 3)  # 囊肿, 囊肿, 否
    assert answers["question_only"]["strict/em"] == 1
    assert summary.metrics["strict/em"] == pytest.approx(2 / 3)
    assert summary.metrics["question_only/strict/closed_accuracy"] == 1
    assert summary.metrics["num_exams"] == 2
    assert summary.metrics["num_questions"] == 4
    assert [r["site"] for r in summary.tables["selection"]] == ["all", "肝脏", "肾脏"]
    assert summary.tables["selection"][0] == {
        "site": "all", "exams": 2, "accuracy": 0.5, "chance": 0.5, "brightest": 0.5, "darkest": 1.0,
    }  # fmt: skip
    assert summary.metrics["selection/accuracy"] == 0.5
    assert summary.metrics["selection/darkest"] == 1.0
    tasks = [(r["task"], r["row"], r["strict/em"]) for r in summary.tables["tasks"]]
    assert tasks[:3] == [
        ("kind", "model", 1),
        ("kind", "constant", 0.5),
        ("kind", "question_only", 1),
    ]
    assert tasks[3:] == [
        ("normal", "model", 0),
        ("normal", "constant", 1),
        ("normal", "question_only", 1),
    ]
    sites = {(r["site"], r["row"]): r["questions"] for r in summary.tables["sites"]}
    assert sites["肝脏", "model"] == 2
    assert sites["肾脏", "constant"] == 1


def test_nothing_to_score_gives_counts_alone() -> None:
    summary = summarise([predict("a", "report", "所见", None, valid=None)], BLIND)
    assert summary.metrics == {"num_exams": 1, "num_questions": 1}
    assert summary.tables == {"answers": [], "tasks": [], "sites": [], "selection": []}


def frame(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32), grey, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def colours(figure) -> list[set[str]]:
    return [{line.get_color() for line in axis.lines} for axis in figure.axes]


def test_strip_outlines_the_chosen_and_the_valid_frames() -> None:
    frames = [frame(10 * i) for i in range(3)]
    figure = draw_strip(frames, (0.1, 0.25, 0.3), 1, (True, True, False))
    orange, green = "#d95f02", "#1b9e77"
    assert colours(figure) == [{green}, {orange, green}, set()]
    assert [axis.get_title() for axis in figure.axes] == ["0.10", "0.25", "0.30"]
    assert colours(draw_strip(frames, (0.1, 0.2, 0.3), 2, None)) == [set(), set(), {orange}]
    assert len(draw_strip(frames * 4, (0.0,) * 12, 11, None).axes) == 16  # two rows of eight


def test_curves() -> None:
    figure = draw_curves({"loss": [(20, 1.0), (10, 2.0)], "alpha": [(10, 0.5)]})
    loss, alpha = figure.axes
    assert list(loss.lines[0].get_xdata()) == [10, 20]
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0]
    assert alpha.get_title() == "alpha"
    figure.savefig(io.BytesIO(), format="png")
