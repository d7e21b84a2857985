"""The parts of the demo that need no cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ray_jobs import demo
from ultra.config import DataConfig
from ultra.data.importers.folder import list_exams
from ultra.data.importers.reader import read_exam
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.report import Exam
from ultra.evaluate.tables import Summary

ANSWER = Prediction(
    "real-cine", "p", "心脏", "report", "请写出超声报告。", "胡言", None, 1, (0.1, 0.2), None, None,
    None, (5,), "stop", "0",
)  # fmt: skip


def summary() -> Summary:
    rows = {"": 0.9, "constant/": 0.3, "question_only/": 0.4}
    scores = ("strict/em", "strict/f1-char", "strict/bleu4-char")
    metrics = {f"{row}{score}": value for row, value in rows.items() for score in scores}
    metrics |= {"selection/accuracy": 0.8, "selection/chance": 0.5}
    metrics |= {"num_exams": 7, "num_questions": 50}
    answers = [{"row": "model", "questions": 50, "strict/em": 0.9, "strict/closed_accuracy": None}]
    selection = [
        {
            "site": "all", "exams": 6, "accuracy": 0.8, "chance": 0.5, "brightest": 0.4,
            "darkest": 0.6,
        }
    ]  # fmt: skip
    return Summary(metrics, {"answers": answers, "selection": selection, "tasks": [], "sites": []})


def test_the_real_cine_is_let_in(tmp_path: Path) -> None:
    name = demo.write_real_exam(str(tmp_path))
    config = DataConfig(source_uri=str(tmp_path), max_frames=5, patient_key_secret="x")
    (entry,) = list_exams(config)
    assert entry.frames == (name,)
    exam = read_exam(entry, config)
    assert len(exam.group.frames) == 5
    assert exam.num_duplicates > 0


def test_summary_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    results = demo.describe(summary(), Exam((b"", b""), (ANSWER,)), "cine.dcm")
    assert json.loads(json.dumps(results)) == results
    assert {k: results[k] for k in ("em", "constant_em", "question_only_f1")} == {
        "em": 0.9, "constant_em": 0.3, "question_only_f1": 0.4,
    }  # fmt: skip
    assert (results["selection_accuracy"], results["selection_chance"]) == (0.8, 0.5)
    assert results["real_exam"] == {
        "file": "cine.dcm", "frames_kept": 2, "chosen_frame": 1, "question": "请写出超声报告。",
        "answer": "胡言",
    }  # fmt: skip
    demo.print_results(summary(), results)
    printed = capsys.readouterr().out
    assert "frame selection  0.800 over 6 exams (chance 0.500" in printed
    assert "2 frames kept, frame 1 chosen; answer: 胡言" in printed
    assert "Nothing here is a medical device" in printed


def test_a_refused_cine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    results = demo.describe(summary(), None, "cine.dcm")
    assert results["real_exam"]["frames_kept"] == 0
    assert results["real_exam"]["answer"] is None
    demo.print_results(summary(), results)
    assert "refused" in capsys.readouterr().out


def test_a_failing_job_shows_its_log(tmp_path: Path) -> None:
    nowhere = {**os.environ, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    with pytest.raises(SystemExit) as ended:
        demo.Jobs(tmp_path, nowhere).run("prepare", ["root=/tmp"])
    message = str(ended.value)
    assert "Failed to connect to Ray" in message
    assert message.endswith(f"its whole log: {tmp_path}/prepare.log")
