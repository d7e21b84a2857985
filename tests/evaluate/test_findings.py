"""Facts in answers, counted by hand."""

from __future__ import annotations

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.data.instructions import Report
from ultra.evaluate.findings import (
    FACTS,
    fact_metrics,
    lesion_exams,
    read_facts,
    same_kind,
    same_side,
    same_size,
)
from ultra.evaluate.metrics import count_all, score_all
from ultra.evaluate.predictions import Prediction


def score(fact: str, *given: Prediction) -> list[float | None]:
    """Return precision, recall and F1."""
    metrics = fact_metrics(fact)
    return list(score_all(metrics, count_all(metrics, given), range(len(given))).values())


def ask(task: str, answer: str, truth: str, exam_id: str = "e") -> Prediction:
    return make_prediction(answer, truth, task=task, exam_id=exam_id)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("是", True), ("是的，未见异常", True), ("未见明显异常。", True), ("正常", True),
        ("无异常", True),
        ("否", False), ("不正常", False), ("异常", False), ("不是", False),
        ("囊肿", None), ("", None),
    ],
)  # fmt: skip
def test_normal_or_not(text: str, expected: bool | None) -> None:
    assert read_facts("normal", text) == Report(normal=expected)


def test_values_agree() -> None:
    assert same_kind("低回声结节", "结节")
    assert not same_kind("囊肿", "结节")
    assert not same_kind("囊性结节", "结节")
    assert same_side("右叶", "右侧")
    assert not same_side("左侧", "双侧")
    assert same_size(4, 6)  # 2 mm
    assert not same_size(3.9, 6)
    assert same_size(40, 50)  # a fifth of 50
    assert not same_size(61, 50)


def test_precision_recall_and_f1_of_a_fact() -> None:
    given = [
        ask("kind", "囊肿", "囊肿"),  # found
        ask("kind", "这是血管瘤。", "囊肿"),  # stated and wrong
        ask("kind", "未见结石", "囊肿"),  # denies, so states nothing
        ask("kind", "说不清", "结石"),
        ask("side", "左侧", "左叶"),  # another fact
    ]
    # 1 found, 2 stated, 4 true
    assert score("kind", *given) == pytest.approx([1 / 2, 1 / 4, 2 / 6])
    assert score("side", *given) == [1, 1, 1]
    assert score("margin", *given) == [None, None, None]
    assert score("kind", given[3]) == [None, 0, 0]


def test_all_facts_are_added_up() -> None:
    given = [
        ask("size", "约1.2cm", "12mm"),
        ask("size", "30mm", "12mm"),
        ask("echogenicity", "低回声", "低回声"),
        ask("margin", "清晰", "边界清晰"),
        ask("normal", "是", "否"),
        ask("site", "肝脏", "肝脏"),  # states no fact
        # kind and side found, and that all is not normal
        ask("diagnosis", "肝右叶囊肿可能", "肝右叶囊肿。"),
    ]
    assert score("size", *given)[0] == 1 / 2
    assert score("normal", *given) == [1 / 2, 1 / 2, 1 / 2]
    # found: one size, echo, margin, and three of the diagnosis; stated and true: 5 + 3 each
    assert score("all", *given) == pytest.approx([6 / 8, 6 / 8, 6 / 8])


def test_a_whole_report_states_many_facts() -> None:
    truth = "所见：肝右叶见无回声区，大小约12mm，边界清晰。提示：肝右叶囊肿。"
    answer = "所见：肝左叶见无回声区，大小约13mm，边界欠清。提示：肝左叶囊肿。"
    given = ask("report", answer, truth)
    found = {fact: score(fact, given)[2] for fact in FACTS}
    assert found == {
        "kind": 1, "side": 0, "size": 1, "echogenicity": 1, "margin": 0, "normal": 1,
    }  # fmt: skip


def test_a_blind_answer_is_no_better_than_its_luck() -> None:
    given = [ask("normal", "否", truth) for truth in ("否", "否", "是")]
    assert score("normal", *given) == pytest.approx([2 / 3, 2 / 3, 2 / 3])


def test_exams_with_a_lesion_by_their_truth() -> None:
    given = [
        ask("normal", "否", "是", "healthy"),
        ask("diagnosis", "肝囊肿", "肝脏未见异常。", "healthy"),
        ask("normal", "是", "否", "ill"),
        ask("kind", "", "囊肿", "cyst"),
        make_prediction("囊肿", None, task="report", exam_id="unknown"),
        ask("side", "", "左叶", "side alone"),
    ]
    assert lesion_exams(given) == {"ill", "cyst"}


def test_names() -> None:
    assert [*fact_metrics()] == ["findings/precision", "findings/recall", "findings/f1"]
    assert "findings/side-recall" in fact_metrics("side")
