"""Checkpoints as versions in a real MLflow: in a database file and on a server."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.conftest import free_port
from ultra import storage
from ultra.config import ConfigError, PipelineConfig, load
from ultra.registry import (
    record_scores,
    register,
    resolve_evaluated,
    resolve_start,
    resolve_version,
)
from ultra.tracking import open_run

OURS = "d1 test all"
"""Exams that were asked about."""


@pytest.fixture(params=["database", "server"])
def tracking_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "server":
        uri: str = request.getfixturevalue("mlflow_server")
        return uri
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def config(tracking_uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> PipelineConfig:
    name = re.sub(r"\W", "-", request.node.name)  # the server is the same for every test
    return load(
        "tiny",
        [f"root={tmp_path}", f"tracking.uri={tracking_uri}", f"tracking.model_name={name}"],
    )


def write_checkpoint(uri: str, content: str = "a") -> str:
    for name in ("base.json", "connector.safetensors", "adapter/adapter_model.safetensors"):
        storage.write_bytes(storage.join(uri, name), f"{name} of {content}".encode())
    storage.write_bytes(storage.join(uri, "config.yaml"), b"format: 1\n")
    return uri


def train(config: PipelineConfig, content: str) -> tuple[str, str]:
    """Return the address of a checkpoint, and what `register` says of it."""
    uri = write_checkpoint(f"{config.root}/{content}", content)
    with open_run(config, "train") as tracker:
        tracker.dataset(f"{config.root}/exams", "feed" * 8, {"train": 3}, "training")
        tracker.metrics({"loss": 0.5}, step=7)
        return uri, register(config.tracking, tracker.run_id, uri)


def evaluate(
    config: PipelineConfig, uri: str, em: float, exams: str = OURS, *, champion: bool = True
) -> str:
    settings = {"checkpoint_uri": uri, "register_champion": champion}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=settings)})
    scores = {"strict/em": em, "constant/strict/em": 0.1, "selection/accuracy": 0.75}
    with open_run(config, "evaluate") as tracker:
        return record_scores(config, tracker.run_id, scores, exams)


def champion(config: PipelineConfig) -> str:
    return resolve_version(f"models:/{config.tracking.model_name}@champion", config.tracking.uri)


def test_what_training_wrote_is_the_challenger_and_says_where_it_comes_from(
    config: PipelineConfig,
) -> None:
    name = config.tracking.model_name
    uri, told = train(config, "one")
    assert told == f"version 1 of {name}"
    client = MlflowClient(tracking_uri=config.tracking.uri)
    version = client.get_model_version_by_alias(name, "challenger")
    assert version.tags["checkpoint"] == uri
    assert version.tags["exams"] == "feed" * 8
    assert version.tags["metric.loss"] == "0.5"
    assert len(version.tags["config_sha256"]) == len(version.tags["checkpoint_sha256"]) == 64
    run = client.get_run(version.run_id)
    assert version.source == f"{run.info.artifact_uri}/checkpoint"
    assert [a.path for a in client.list_artifacts(version.run_id, "checkpoint")] == [
        "checkpoint/config.yaml"
    ]
    again, _ = train(config, "two")
    for form, found in {"@challenger": again, "/1": uri, "/2": again, "/latest": again}.items():
        assert resolve_version(f"models:/{name}{form}", config.tracking.uri) == found
    asked = load("tiny", [
        f"tracking.uri={config.tracking.uri}", f"train.start_from=models:/{name}/1",
        f"evaluate.checkpoint_uri=models:/{name}/2",
    ])  # fmt: skip
    assert resolve_start(asked).train.start_from == uri
    assert resolve_evaluated(asked).evaluate.checkpoint_uri == again


def test_the_source_of_a_checkpoint_on_s3_is_its_address(
    config: PipelineConfig, s3_bucket: str
) -> None:
    name = config.tracking.model_name
    uri = write_checkpoint(f"{s3_bucket}/registry/{name}")
    with open_run(config, "train") as tracker:
        register(config.tracking, tracker.run_id, uri)
    version = MlflowClient(tracking_uri=config.tracking.uri).get_model_version(name, "1")
    assert version.source == version.tags["checkpoint"] == uri
    assert resolve_version(f"models:/{name}/1", config.tracking.uri) == uri


def test_a_checkpoint_that_is_registered_again_is_the_same_version(config: PipelineConfig) -> None:
    name = config.tracking.model_name
    assert train(config, "one")[1] == train(config, "one")[1] == f"version 1 of {name}"


def test_what_was_overwritten_is_not_passed_off_as_the_version(config: PipelineConfig) -> None:
    name, (uri, _) = config.tracking.model_name, train(config, "one")
    write_checkpoint(uri, "another")
    with pytest.raises(ConfigError, match=rf"models:/{name}/1: another checkpoint stands at {uri}"):
        resolve_version(f"models:/{name}/1", config.tracking.uri)
    shutil.rmtree(uri)
    with pytest.raises(ConfigError, match=rf"models:/{name}/1: its checkpoint is gone"):
        resolve_version(f"models:/{name}/1", config.tracking.uri)


def test_the_champion_goes_only_to_a_better_one(config: PipelineConfig) -> None:
    name = config.tracking.model_name
    one, two, three = (train(config, content)[0] for content in ("one", "two", "three"))
    first = evaluate(config, one, 2 / 3)
    assert first == f"champion is now version 1 of {name}: strict/em 0.6667, and there was none"
    assert champion(config) == one
    kept = f"kept champion version 1 of {name}: 0.6667 >= {{}} of version 2 of {name} (strict/em)"
    assert evaluate(config, two, 0.5) == kept.format("0.5")
    assert evaluate(config, two, 2 / 3) == kept.format("0.6667")  # no better, to the last digit
    assert champion(config) == one
    moved = f"champion is now version 3 of {name}: strict/em 0.7 > 0.6667 of version 1 of {name}"
    assert evaluate(config, three, 0.7) == moved
    assert champion(config) == three
    same = f"version 3 of {name} is the champion already: strict/em 0.7"
    assert evaluate(config, three, 0.7) == same
    client = MlflowClient(tracking_uri=config.tracking.uri)
    tags = client.get_model_version(name, "2").tags
    assert tags["metric.strict/em"] == str(2 / 3)
    assert tags["metric.selection/accuracy"] == "0.75"
    assert "metric.constant/strict/em" not in tags
    assert tags["evaluated_on"] == OURS
    assert client.get_run(tags["evaluate_run"]).data.tags["job"] == "evaluate"


def test_scores_on_other_exams_do_not_count(config: PipelineConfig) -> None:
    name = config.tracking.model_name
    one, two = (train(config, content)[0] for content in ("one", "two"))
    evaluate(config, one, 0.5)
    kept = (
        f"kept champion version 1 of {name}: it has no strict/em on these exams; evaluate "
        f"models:/{name}@champion on them first"
    )
    assert evaluate(config, two, 0.9, "d2 test all") == kept
    assert champion(config) == one
    evaluate(config, one, 0.5, "d2 test all")
    assert evaluate(config, two, 0.9, "d2 test all").startswith(
        f"champion is now version 2 of {name}"
    )


def test_a_checkpoint_of_another_origin_is_registered_when_it_is_asked_for(
    config: PipelineConfig,
) -> None:
    name, uri = config.tracking.model_name, write_checkpoint(f"{config.root}/found")
    assert evaluate(config, uri, 0.5, champion=False) == ""
    assert evaluate(config, uri, 0.5).startswith(f"champion is now version 1 of {name}")
    assert evaluate(config, uri, 0.6, champion=False) == f"version 1 of {name} has these scores"
    assert champion(config) == uri


def test_a_metric_that_is_none_moves_nothing(config: PipelineConfig) -> None:
    uri, _ = train(config, "one")
    with pytest.raises(ConfigError, match=r"register_metric: no strict/em was measured, but const"):
        evaluate(config, uri, float("nan"))
    with pytest.raises(ConfigError, match="no such version"):
        champion(config)


@pytest.mark.parametrize("form", ["@nobody", "/7", "", "/3/4", "@", "-absent@champion"])
def test_a_version_that_is_not_there_is_told(config: PipelineConfig, form: str) -> None:
    train(config, "one")
    uri = f"models:/{config.tracking.model_name}{form}"
    with pytest.raises(ConfigError) as refused:
        resolve_version(uri, config.tracking.uri)
    assert str(refused.value).startswith(f"{uri}: no such version at {config.tracking.uri}")


@pytest.mark.parametrize("uri", ["", "sqlite:////nowhere/mlflow.db", "{server}"])
def test_an_mlflow_that_is_not_there_is_told(uri: str) -> None:
    uri = uri.format(server=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"models:/a@champion: no MLflow at '"):
        resolve_version("models:/a@champion", uri)
    assert resolve_version("s3://bucket/checkpoint", uri) == "s3://bucket/checkpoint"


def test_without_tracking_or_a_name_nothing_is_registered(tmp_path: Path) -> None:
    config = load("tiny", [f"root={tmp_path}", "tracking.uri="])
    assert train(config, "one")[1] == ""
    assert evaluate(config, f"{tmp_path}/one", 0.5) == ""
    config = load("tiny", [f"root={tmp_path}", "tracking.model_name="])
    assert train(config, "one")[1] == ""
