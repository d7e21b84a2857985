"""Runs in a real MLflow: in a database file and on a server."""

from __future__ import annotations

import io
import json
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.data import get_source

from tests.conftest import free_port
from ultra.config import ConfigError, PipelineConfig, load
from ultra.tracking import (
    NullTracker,
    Tracker,
    find_history,
    open_client,
    open_run,
    read_history,
    resume_tracker,
)


@pytest.fixture(scope="module")
def database_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mlflow")
    return f"sqlite:///{folder}/not/there/yet/mlflow.db"


@pytest.fixture(params=["database_uri", "mlflow_server"])
def config(request: pytest.FixtureRequest) -> PipelineConfig:
    uri = request.getfixturevalue(request.param)
    return load("tiny", [f"tracking.uri={uri}", "data.patient_key_secret=very-secret"])


def record_everything(tracker: Tracker) -> None:
    tracker.metrics({"exams": 12})
    tracker.metrics({"loss": 3.0}, step=1)
    tracker.series([(step, {"loss": 1 / step, "alpha": 0.5}) for step in range(2, 900)])
    tracker.table("answers", [{"row": "model", "em": 0.25}, {"row": "constant", "em": None}])
    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([0, 1])
    tracker.figure("frames/E1", figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    for name in ("understanding/E1.png", "alone.png"):
        tracker.file(name, buffer.getvalue())
    tracker.text("report.html", "<p>超声</p>")


def latest_run(client: MlflowClient, config: PipelineConfig) -> Any:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    assert experiment is not None
    return client.search_runs([experiment.experiment_id], max_results=1)[0]


def test_a_run_keeps_everything(config: PipelineConfig, tmp_path: Path) -> None:
    with open_run(config, "train") as tracker:
        record_everything(tracker)
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "train-tiny"
    assert run.data.tags["job"] == "train"
    assert run.data.params["model.vision.encoders.0.name"] == "clip"
    assert run.data.params["train.stages.1.trainable"] == str(
        list(config.train.stages[1].trainable)
    )
    assert len(run.data.params) > 60
    assert not any("secret" in key or "secret" in v for key, v in run.data.params.items())
    assert run.data.metrics["exams"] == 12
    loss = {m.step: m.value for m in client.get_metric_history(tracker.run_id, "loss")}
    assert loss == {1: 3.0} | {step: 1 / step for step in range(2, 900)}

    def download(name: str) -> bytes:
        return Path(client.download_artifacts(tracker.run_id, name, str(tmp_path))).read_bytes()

    table = json.loads(download("answers.json"))
    assert table == {"columns": ["row", "em"], "data": [["model", 0.25], ["constant", None]]}
    assert download("frames/E1.png").startswith(b"\x89PNG")
    for name in ("understanding/E1.png", "alone.png"):
        assert download(name).startswith(b"\x89PNG")
    assert download("report.html").decode() == "<p>超声</p>"
    assert "very-secret" not in download("config.yaml").decode()


def test_a_block_that_raises_fails_its_run(config: PipelineConfig) -> None:
    client = MlflowClient(tracking_uri=config.tracking.uri)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), open_run(config, "evaluate"):
            raise error
        assert latest_run(client, config).info.status == "FAILED"


def test_a_run_goes_on_in_another_process_and_later(config: PipelineConfig) -> None:
    with open_run(config, "train") as tracker:
        resume_tracker(config.tracking, tracker.run_id).metrics({"loss": 2.0}, step=1)
    with open_run(config, "train", tracker.run_id) as again:
        again.metrics({"loss": 1.0}, step=2)
    assert again.run_id == tracker.run_id
    assert read_history(config, "train")["loss"] == [(1, 2.0), (2, 1.0)]


def test_a_run_that_mlflow_does_not_have_begins_anew(config: PipelineConfig) -> None:
    with open_run(config, "train") as tracker:
        pass
    open_client(config.tracking.uri).delete_run(tracker.run_id)
    for run_id in (tracker.run_id, "0" * 32):
        with open_run(config, "train", run_id) as another:
            assert another.run_id != run_id


def test_history_is_of_the_same_root_and_job(config: PipelineConfig) -> None:
    with open_run(config, "prepare") as tracker:
        tracker.metrics({"exams": 5})
    assert read_history(config, "prepare") == {"exams": [(0, 5.0)]}
    elsewhere = config.model_copy(update={"root": "runs/elsewhere"})
    assert read_history(elsewhere, "prepare") == {}


def test_artifacts_of_a_database_stand_beside_it(database_uri: str) -> None:
    config = load("tiny", [f"tracking.uri={database_uri}", "tracking.experiment=beside"])
    with open_run(config, "train") as tracker:
        tracker.text("a.txt", "a")
    folder = Path(database_uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [path.read_text() for path in folder.rglob("a.txt")] == ["a"]


def test_without_an_address_nothing_is_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("tiny", ["tracking.uri="])
    with open_run(config, "train") as tracker:
        assert isinstance(tracker, NullTracker)
        record_everything(tracker)
    assert isinstance(resume_tracker(config.tracking, ""), NullTracker)
    assert read_history(config, "train") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_database_file_in_an_object_store_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load("tiny", ["root=s3://bucket/ultra"])
    with pytest.raises(ConfigError) as refused, open_run(config, "train"):
        pass
    assert str(refused.value).startswith("tracking.uri: a database file cannot stand at s3://buc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "uri", ["", "sqlite:///nowhere/mlflow.db", "sqlite:///s3://bucket/mlflow.db", "{server}"]
)
def test_a_history_that_is_nowhere_is_empty_and_makes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    nobody = f"http://127.0.0.1:{free_port()}"
    config = load("tiny", [f"tracking.uri={uri.format(server=nobody)}"])
    assert find_history(config, "train") == {}
    assert list(tmp_path.iterdir()) == []


def test_a_run_says_what_it_ran_on(config: PipelineConfig, tmp_path: Path) -> None:
    with open_run(config, "train") as tracker:
        tracker.dataset(f"{tmp_path}/exams", "0123abcd" * 4, {"train": 8, "test": 2}, "training")
        tracker.dataset("s3://bucket/exams", "4567" * 8, {"test": 3}, "evaluation")
    client = MlflowClient(tracking_uri=config.tracking.uri)
    run = client.get_run(tracker.run_id)
    here, there = sorted(run.inputs.dataset_inputs, key=lambda used: used.dataset.digest)
    assert (here.dataset.name, here.dataset.digest) == ("exams", "0123abcd" * 4)
    assert json.loads(here.dataset.profile) == {"train": 8, "test": 2}
    assert get_source(here).uri == f"{tmp_path}/exams"
    assert get_source(there).uri == "s3://bucket/exams"
    assert [tag.value for tag in (*here.tags, *there.tags)] == ["training", "evaluation"]
    assert run.data.tags["python"] == platform.python_version()
    assert run.data.tags["ray"] == metadata.version("ray")
    assert run.data.tags["mlflow.source.name"]
    listed = Path(client.download_artifacts(tracker.run_id, "requirements.txt", str(tmp_path)))
    lines = listed.read_text().splitlines()
    assert f"mlflow=={metadata.version('mlflow')}" in lines
    assert lines == sorted(lines, key=str.lower)


def test_a_run_shows_the_load_of_its_machine(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    client = MlflowClient(tracking_uri=config.tracking.uri)

    def load() -> set[str]:
        found = client.get_run(tracker.run_id).data.metrics
        return {name for name in found if name.startswith("system/")}

    with open_run(config, "train") as tracker:
        resume_tracker(config.tracking, tracker.run_id).watch_machine()
        while not load():  # the test's own timeout ends it
            time.sleep(0.2)
        assert load() >= {
            "system/cpu_utilization_percentage",
            "system/system_memory_usage_megabytes",
        }


def test_values_longer_than_mlflow_takes_are_cut(config: PipelineConfig) -> None:
    long = config.model_copy(
        update={"data": config.data.model_copy(update={"images_uri": "x" * 7000})}
    )
    with open_run(long, "prepare") as tracker:
        pass
    run = MlflowClient(tracking_uri=config.tracking.uri).get_run(tracker.run_id)
    assert run.data.params["data.images_uri"] == "x" * 6000
