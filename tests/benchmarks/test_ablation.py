"""The ablation small, on the shared cluster, and its tables by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ablation, ablation_tables
from benchmarks.ablation_tables import Run
from tests.evaluate.conftest import make_frame, make_prediction
from ultra.config import ConfigError, InputError
from ultra.evaluate.baselines import BlindAnswers, find_blobs

SMALL = [
    "data.simulator.num_patients=12",
    "data.test_fraction=0.4",
    "train.stages.0.steps=2",
    "train.stages.1.steps=2",
    "train.batch_size=4",
    "train.micro_batch_size=4",
    "model.selection.teacher_warmup_steps=2",
    "evaluate.max_new_tokens=4",
]


def test_every_row_is_a_configuration_with_the_same_exams_and_steps() -> None:
    for quick in (False, True):
        rows, seeds = ablation.read_rows("/anywhere", quick, [])
        assert len(seeds) >= (1 if quick else 3)
        assert len({row.name for row in rows}) == len(rows)
        assert rows[0].name == ablation_tables.FULL
        full = rows[0].config
        for row in rows:
            train, data = row.config.train, row.config.data
            assert sum(s.steps or 0 for s in train.stages) == sum(
                s.steps or 0 for s in full.train.stages
            ), row.name
            assert train.batch_size == full.train.batch_size
            assert (data.simulator, data.seed) == (full.data.simulator, full.data.seed)
    with pytest.raises(ConfigError, match=r"data\.simulated: unknown key"):
        ablation.read_rows("/anywhere", False, ["data.simulated=1"])
    with pytest.raises(InputError, match="--rows: unknown 'fuller'; allowed: full, without"):
        ablation._pick(rows, ["full", "fuller"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_goes_on_and_draws_tables_without_a_model(
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results")
    names = ["full", "oracle", "qilin-med-vl", "without-site-prompt"]
    sets = [part for item in SMALL for part in ("--set", item)]
    command = ["--root", str(tmp_path), "--seeds", "0", "1", *sets]
    ablation.main([*command, "--rows", *names])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(line["em"]) == {*names, "question-only", "constant"}
    kept = {path: path.read_bytes() for path in tmp_path.rglob("runs/**/run.json")}
    assert len(kept) == 8

    # One run is lost: it alone is done again.
    lost = tmp_path / "full" / "runs" / "oracle" / "1" / "run.json"
    lost.unlink()
    ablation.main([*command, "--rows", *names])
    assert "1/1  oracle seed 1" in capsys.readouterr().out
    same = {path: path.read_bytes() for path in kept}
    assert {path for path in kept if same[path] != kept[path]} <= {lost}

    with pytest.raises(SystemExit, match=r"full/config.yaml is of another configuration; give ano"):
        ablation.main([*command, "--rows", "full", "--set", "train.batch_size=8"])

    before = json.loads((tmp_path / "results" / "ablation.json").read_text())
    table = (tmp_path / "results" / "ablation.md").read_text()
    (tmp_path / "results" / "ablation.md").unlink()
    monkeypatch.setattr(ablation, "fit_alone", None)
    monkeypatch.setattr(ablation, "Predictor", None)
    ablation.main([*command, "--tables-only"])
    assert (tmp_path / "results" / "ablation.md").read_text() == table
    after = json.loads((tmp_path / "results" / "ablation.json").read_text())
    assert {**after, "command": ""} == {**before, "command": ""}
    assert (tmp_path / "results" / "ablation.png").stat().st_size > 10_000

    rows = {row["row"]: row for row in after["rows"]}
    assert rows["oracle"]["selection"] == []
    assert rows["full"]["visual_tokens"] == rows["qilin-med-vl"]["visual_tokens"] == 16
    assert rows["full"]["train_cpu_s"]["values"] == [1.0, 1.0]
    assert rows["chance"]["selection"]["mean"] == after["selection_chance"]


def run(name: str, seed: int, answers: Mapping[str, str], chosen: int) -> Run:
    """Answer `kind` and `size` of two exams; in both the second of two frames is valid."""
    truths = {"kind": "囊肿", "size": "12mm"}
    predictions = tuple(
        make_prediction(
            answers[task], truth, exam_id=exam, task=task, chosen=chosen, scores=(0.0, 1.0),
            valid=(False, True), question=question,
        )
        for exam, question in (("a", "检查部位：肝脏。问？"), ("b", "问？"))
        for task, truth in truths.items()
    )  # fmt: skip
    return Run(name, "parts", name, seed, predictions, {"train_cpu_s": 2.0, "answer_cpu_s": 3.0})


def test_scores_and_differences_by_hand() -> None:
    right, half = {"kind": "囊肿", "size": "12mm"}, {"kind": "囊肿", "size": "5mm"}
    full = [run("full", 0, right, 1), run("full", 1, half, 1)]
    other = [run("other", 0, half, 0), run("other", 1, half, 0)]
    other = [replace(r, figures={"train_cpu_s": 1.0, "answer_cpu_s": 6.0}) for r in other]
    # The row's questions do not tell the site; it is compared all the same.
    plain = [
        replace(r, predictions=tuple(replace(p, question="问？") for p in r.predictions))
        for r in other
    ]
    results = ablation_tables.summarise([*full, *plain])
    rows = {row["row"]: row for row in results["rows"]}
    assert rows["full"]["em"]["values"] == [1.0, 0.5]
    assert rows["full"]["em"]["mean"] == 0.75
    assert rows["full"]["em"]["sd"] == pytest.approx(0.125**0.5)
    assert rows["full"]["size"]["values"] == [1.0, 0.0]
    assert rows["full"]["margin"] == []
    assert rows["other"]["selection"]["mean"] == 0.0
    assert rows["other"]["train_cpu_s"]["mean"] == 0.5
    assert rows["other"]["answer_cpu_s"]["mean"] == 2.0
    assert (results["exams"], results["gradable_exams"], results["questions"]) == (2, 2, 4)
    assert results["selection_chance"] == 0.5
    gains = {d["metric"]: d for d in results["differences"]}
    # Both exams have the same answers, so every draw of exams gives the same difference.
    assert (gains["em"]["value"], gains["em"]["low"], gains["em"]["high"]) == (0.25, 0.25, 0.25)
    assert gains["em"]["by_seed"] == [0.5, 0.0]
    assert gains["size"]["value"] == 0.5
    assert gains["kind"]["value"] == 0.0
    assert gains["selection"]["value"] == 1.0
    table = ablation_tables.to_markdown(results)
    assert "| full | 2 | 0.750 ± 0.354 |" in table
    assert "+0.250 [+0.250, +0.250] 1/2" in table


def test_rows_without_a_model_by_hand() -> None:
    full = [run("full", 0, {"kind": "结石", "size": "5mm"}, 0)]
    blind = BlindAnswers({"kind": "囊肿", "size": "20mm"}, {("size", "问？"): "12mm"})
    frames = {exam: (make_frame(250), make_frame(10)) for exam in "ab"}
    assert find_blobs(frames["a"]) == (0, 0)
    runs = {r.name: r for r in ablation_tables.blind_runs(full, blind, frames)}
    assert [p.answer for p in runs["constant"].predictions] == ["囊肿", "20mm"] * 2
    assert [p.answer for p in runs["question-only"].predictions] == ["囊肿", "20mm", "囊肿", "12mm"]
    assert {p.chosen for p in runs["brightest"].predictions} == {0}
    assert {p.chosen for p in runs["darkest"].predictions} == {0}
    results = ablation_tables.summarise([*full, *runs.values()])
    rows = {row["row"]: row for row in results["rows"]}
    assert rows["constant"]["selection"] == rows["darkest"]["em"] == []
    assert rows["darkest"]["selection"]["mean"] == 0.0
    assert rows["question-only"]["em"]["mean"] == 0.75
