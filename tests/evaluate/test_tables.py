"""Tables of hand-made predictions."""

from __future__ import annotations

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.evaluate.baselines import count_answers
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.suites import answer_metrics
from ultra.evaluate.tables import TABLES, Summary, summarise


def predict(exam_id: str, task: str, answer: str, truth: str | None, **more: object) -> Prediction:
    values = {
        "question": "?", "chosen": 1, "scores": (0.0, 1.0), "valid": (False, True), "brightest": 0,
        "darkest": 1,
    }  # fmt: skip
    return make_prediction(answer, truth, exam_id=exam_id, task=task, **{**values, **more})


BLIND = count_answers(
    {("kind", "?", "囊肿"): 2, ("kind", "what", "结石"): 1, ("normal", "?", "否"): 1}
)
KIDNEY = {"site": "肾脏", "valid": (True, False), "brightest": 0, "darkest": 0}


@pytest.fixture(scope="module")
def summary() -> Summary:
    return summarise(
        [
            predict("a", "kind", "囊肿", "囊肿"),
            predict("a", "kind", "结石", "结石", question="what"),
            predict("b", "normal", "是", "否", **KIDNEY),
            predict("b", "report", "所见", None, **KIDNEY),
            predict("c", "normal", "是", "是", valid=(True, True)),
        ],
        BLIND,
    )


def test_model_and_baselines_side_by_side(summary: Summary) -> None:
    assert tuple(summary.tables) == TABLES
    answers = {row["row"]: row for row in summary.tables["answers"]}
    assert answers["model"]["questions"] == 4  # the one without a truth is not scored
    assert answers["model"]["strict/em"] == 3 / 4
    assert answers["model"]["strict/closed_accuracy"] == 1 / 2
    assert answers["constant"]["strict/em"] == 2 / 4  # 囊肿, 囊肿, 否, 否
    assert answers["question_only"]["strict/em"] == 3 / 4
    assert answers["constant"]["llava_med/em-char"] == 1 / 2  # the two open questions
    assert answers["model"]["findings/f1"] == 3 / 4
    assert summary.metrics["strict/em"] == 3 / 4
    assert summary.metrics["question_only/strict/closed_accuracy"] == 1 / 2
    assert summary.metrics["llava_med/bleu2-char-none"] == 1
    assert summary.metrics["num_exams"] == 3
    assert summary.metrics["num_questions"] == 5
    assert not [name for name in summary.metrics if set(name) & set("[](){}")]


def test_selection_beside_chance(summary: Summary) -> None:
    assert [r["site"] for r in summary.tables["selection"]] == ["all", "肝脏", "肾脏"]
    assert summary.tables["selection"][0] == {
        "site": "all", "exams": 2, "accuracy": 0.5, "mean_reciprocal_rank": (1 + 1 / 2) / 2,
        "mean_rank": 1.5, "ndcg": pytest.approx((1 + 0.63093) / 2),
        "calibration_error": pytest.approx(0.73106 - 0.5, abs=1e-5), "chance": 0.5,
        "brightest": 0.5, "darkest": 1.0, "chance_reciprocal_rank": 3 / 4, "chance_rank": 1.5,
        "chance_ndcg": pytest.approx((1 + 0.63093) / 2),
    }  # fmt: skip
    assert summary.metrics["selection/accuracy"] == 0.5
    assert summary.metrics["selection/darkest"] == 1.0


def test_tasks_and_sites(summary: Summary) -> None:
    tasks = [(r["task"], r["row"], r["strict/em"]) for r in summary.tables["tasks"]]
    assert tasks == [
        ("kind", "model", 1),
        ("kind", "constant", 0.5),
        ("kind", "question_only", 1),
        ("normal", "model", 0.5),
        ("normal", "constant", 0.5),
        ("normal", "question_only", 0.5),
    ]
    sites = {(r["site"], r["row"]): r["questions"] for r in summary.tables["sites"]}
    assert sites["肝脏", "model"] == 3
    assert sites["肾脏", "constant"] == 1


def test_facts_and_exams_with_a_lesion(summary: Summary) -> None:
    lesions = {row["row"]: row for row in summary.tables["lesions"]}
    assert lesions["model"]["questions"] == 3  # c is healthy
    assert lesions["model"]["strict/em"] == pytest.approx(2 / 3)
    assert summary.metrics["lesion/strict/em"] == pytest.approx(2 / 3)
    assert summary.metrics["question_only/lesion/strict/em"] == 1
    facts = {(r["fact"], r["exams"], r["row"]): r["f1"] for r in summary.tables["findings"]}
    assert facts["all", "all", "model"] == 3 / 4
    assert facts["kind", "all", "constant"] == 1 / 2
    assert facts["normal", "all", "model"] == 1 / 2
    assert facts["normal", "lesion", "model"] == 0
    assert facts["size", "all", "model"] is None
    assert summary.metrics["findings/kind-f1"] == 1
    assert summary.metrics["constant/lesion/findings/normal-f1"] == 1
    assert "findings/size-f1" not in summary.metrics


def test_intervals_hold_their_scores(summary: Summary) -> None:
    intervals = {row["metric"]: row for row in summary.tables["intervals"]}
    for name in ("strict/em", "strict/bleu4-char", "llava_med/f1-char", "findings/f1"):
        row = intervals[name]
        assert row["low95"] <= row["value"] <= row["high95"]
        assert row["value"] == summary.metrics[name]
        assert row["exams"] == 3
    assert intervals["selection/accuracy"]["exams"] == 2
    assert summary.metrics["low95/selection/accuracy"] == 0
    assert summary.metrics["high95/strict/em"] == 1


def test_metrics_are_chosen() -> None:
    metrics = answer_metrics(["strict"], "whitespace")
    summary = summarise([predict("a", "kind", "Cyst", "cyst")], BLIND, metrics, 0)
    (model, *_) = summary.tables["answers"]
    assert [name for name in model if "/" in name] == [
        "strict/em", "strict/f1-whitespace", "strict/bleu4-whitespace", "strict/open-em",
        "strict/open-f1-whitespace", "strict/open-precision-whitespace",
        "strict/open-recall-whitespace", "strict/open-bleu4-whitespace", "strict/closed_accuracy",
        "findings/precision", "findings/recall", "findings/f1",
    ]  # fmt: skip
    assert summary.tables["intervals"] == []


def test_nothing_to_score_gives_counts_alone() -> None:
    summary = summarise([predict("a", "report", "所见", None, valid=None)], BLIND)
    assert summary.metrics == {"num_exams": 1, "num_questions": 1}
    assert summary.tables == {name: [] for name in TABLES}
