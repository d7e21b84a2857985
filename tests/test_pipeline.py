"""The whole demo as a newcomer runs it, on a local path and on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_jobs import demo
from tests.conftest import ROOT, free_port, wait_until_up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

JOBS = ["prepare", "instructions", "encode", "train", "evaluate", "real-prepare", "real-predict"]


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str
    summary: dict[str, Any]
    jobs: dict[str, str]


def run_demo(folder: Path, root: str, *options: str) -> Run:
    """Run the demo on a head that outlives it, so that the jobs can be listed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with demo.ray_head(folder / "ray.log") as environment:
        command = [sys.executable, "-m", "ray_jobs.demo", "--root", root]
        command += ["--report", str(folder), *options]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        jobs = list_jobs(environment)
    _, left = psutil.wait_procs(processes_with(environment["RAY_AUTH_TOKEN"]), timeout=30)
    assert left == []
    summary = json.loads((folder / "summary.json").read_text())
    return Run(folder, done.stdout, summary, jobs)


def list_jobs(environment: dict[str, str]) -> dict[str, str]:
    """What `ray job list` shows: the name a job was submitted under, and its status."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "list", "--log-style", "record"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.findall(
        r"submission_id='([^']+)-[0-9a-f]+'.*?status=<JobStatus\.(\w+)", listed.stdout, re.DOTALL
    )
    return dict(found)


def processes_with(token: str) -> list[psutil.Process]:
    """The processes of one Ray head: its token is in the environment of all it starts."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_AUTH_TOKEN") == token:
                found.append(process)
        except psutil.Error:  # it ended, or is not ours to look at
            continue
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo") / "local"
    return run_demo(folder, str(folder))


def test_it_learns_to_choose_and_to_answer(local: Run) -> None:
    s = local.summary
    assert s["selection_accuracy"] >= s["selection_chance"] + 0.25
    for blind in ("constant", "question_only"):
        assert s["em"] >= s[f"{blind}_em"] + 0.10
        assert s["f1"] >= s[f"{blind}_f1"] + 0.05
    assert s["seconds"] > 0
    assert s["real_exam"]["frames_kept"] == 16
    assert 0 <= s["real_exam"]["chosen_frame"] < 16
    assert isinstance(s["real_exam"]["answer"], str)


def test_its_jobs_succeeded_and_its_table_is_printed(local: Run) -> None:
    assert local.jobs == dict.fromkeys(JOBS, "SUCCEEDED")
    for part in (
        "question_only",
        "frame selection",
        "real cine",
        "Nothing here is a medical device",
    ):
        assert part in local.printed
    page = (local.folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    assert 'src="http' not in page


@pytest.fixture(scope="module")
def tracking(local: Run) -> Iterator[str]:
    port = free_port()
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (local.folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1",
                "--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{local.folder}/mlflow.db",
            ],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", server, timeout_s=120)
        yield f"http://127.0.0.1:{port}"
    finally:
        for process in [*psutil.Process(server.pid).children(recursive=True), server]:
            process.terminate()
        server.wait(timeout=30)


def test_the_mlflow_server_shows_runs_with_parameters_metrics_tables_and_pictures(
    tracking: str,
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name("ultra")
    assert experiment is not None
    runs = {run.data.tags["job"]: run for run in client.search_runs([experiment.experiment_id])}
    assert {"prepare", "instructions", "train", "evaluate"} <= runs.keys()
    assert all(run.info.status == "FINISHED" for run in runs.values())
    trained = runs["train"]
    assert trained.data.params["model.selection.strategy"] == "adaptive"
    for metric in ("loss", "redundancy", "alpha", "entropy", "samples_per_second"):
        assert len(client.get_metric_history(trained.info.run_id, metric)) > 10, metric
    evaluated = runs["evaluate"]
    assert evaluated.data.metrics["selection/accuracy"] > 0
    files = {item.path for item in client.list_artifacts(evaluated.info.run_id)}
    assert {"answers.json", "sites.json", "selection.json", "training_curves.png"} <= files
    strips = client.list_artifacts(evaluated.info.run_id, "frames")
    assert strips
    assert all(strip.path.endswith(".png") for strip in strips)


def test_on_s3_the_same_pipeline_gives_the_same_summary(
    local: Run, s3_bucket: str, tmp_path: Path
) -> None:
    remote = run_demo(tmp_path / "report", f"{s3_bucket}/demo")
    took = {"seconds", "steps"}
    expected = {key: value for key, value in local.summary.items() if key not in took}
    assert {key: value for key, value in remote.summary.items() if key not in took} == expected
    assert remote.jobs == local.jobs


def test_the_endpoint_answers_as_predict_did(local: Run) -> None:
    """Greedy and token for token: the shipped tokenizer has one token a character."""
    import base64

    import openai

    from ultra.evaluate.predictions import read_frames, read_predictions

    predictions = read_predictions(str(local.folder / "predictions"))[:12]
    frames = read_frames(str(local.folder / "exams"), {p.exam_id for p in predictions})
    port = free_port()
    command = [sys.executable, "-m", "ray_jobs.demo_server", "--port", str(port)]
    with (local.folder / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--root", str(local.folder)], cwd=ROOT, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        while "curl http" not in (local.folder / "serve.log").read_text():
            assert server.poll() is None, (local.folder / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for prediction in predictions:
            parts: list[Any] = [
                {
                    "type": "image_url",
                    "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(f).decode()}"},
                }
                for f in frames[prediction.exam_id]
            ]
            parts.append({"type": "text", "text": prediction.question})
            answer = client.chat.completions.create(
                model="ultra", messages=[{"role": "user", "content": parts}], max_tokens=96
            )
            assert answer.choices[0].message.content == prediction.answer
            extra = (answer.model_extra or {})["ultra"]
            assert extra["chosen_frame"] == prediction.chosen
    finally:
        server.terminate()
        server.wait(timeout=60)
