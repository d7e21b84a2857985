"""Predictions and scores through Ray Data, MLflow included, on a local path and on S3."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ultra import storage
from ultra.config import ConfigError, PipelineConfig
from ultra.data import parquet
from ultra.data.encoding.on_ray import encode
from ultra.evaluate.on_ray import evaluate, predict
from ultra.evaluate.predictions import (
    Prediction,
    count_training_answers,
    read_frames,
    read_predictions,
)
from ultra.evaluate.predictor import Predictor
from ultra.model.checkpoint import CheckpointError
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.types import FrameGroup

Exams = list[FrameGroup]


def configure(
    config: PipelineConfig, checkpoint_uri: str, root: str, **evaluate: object
) -> PipelineConfig:
    data = {"exams_uri": f"{root}/exams", "features_uri": f"{root}/features"}
    settings = {
        "checkpoint_uri": checkpoint_uri,
        "predictions_uri": f"{root}/predictions",
        "results_uri": f"{root}/evaluate",
        "max_new_tokens": 5,
        "batch_size": 2,
        **evaluate,
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "evaluate": config.evaluate.model_copy(update=settings),
        }
    )


@pytest.fixture(scope="module")
def expected(random_checkpoint: str, exams: Exams) -> list[Prediction]:
    predictions = Predictor(random_checkpoint, max_new_tokens=5).predict(exams[:3])
    return sorted(predictions, key=lambda p: (p.exam_id, p.task, p.question))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("kind", "num_replicas", "max_exams", "exam_ids"),
    [("local", 2, None, {"a", "b", "c"}), ("s3", 1, 2, {"a", "b"})],
)
def test_predict_answers_a_split(
    random_config, random_checkpoint, write_exams, expected, s3_bucket, tmp_path,
    kind, num_replicas, max_exams, exam_ids,
) -> None:  # fmt: skip
    root = str(tmp_path) if kind == "local" else f"{s3_bucket}/predict"
    replicas = {"num_replicas": num_replicas, "cpus_per_replica": 0.5}
    config = configure(random_config, random_checkpoint, root, max_exams=max_exams, **replicas)
    write_exams(config.data.exams_uri)
    found = read_predictions(predict(config))
    wanted = [p for p in expected if p.exam_id in exam_ids]
    # Scores came as float32; everything else is the same to the letter.
    plain = [replace(p, scores=(), picture=None) for p in found]
    assert plain == [replace(p, scores=()) for p in wanted]
    assert {p.exam_id for p in found if p.picture} == exam_ids  # three at most
    assert len([p for p in found if p.picture]) == len(exam_ids)
    for p, q in zip(found, wanted, strict=True):
        assert p.scores == pytest.approx(q.scores)


@pytest.mark.usefixtures("ray_cluster")
def test_with_a_whole_cache_no_encoder_is_loaded_and_the_answers_are_the_same(
    random_config, random_checkpoint, write_exams, expected, tmp_path
) -> None:
    config = configure(random_config, random_checkpoint, str(tmp_path), features="require")
    write_exams(config.data.exams_uri)
    model = random_config.model
    cache = storage.join(config.data.features_uri, cache_key(model))
    with pytest.raises(ConfigError, match=r"evaluate\.features: require, but 5 of 5 row groups"):
        predict(config)
    encode(config.data, config.encode, partial(FrozenEncoders, model), cache)
    # What the answers come from stands on the same encoders, which nobody finds any more.
    blind = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, blind)
    text = (blind / "config.yaml").read_text()
    for encoder in model.vision.encoders:
        text = text.replace(encoder.weights, "/missing")
    (blind / "config.yaml").write_text(text)
    config = configure(random_config, str(blind), str(tmp_path), features="auto")
    found = read_predictions(predict(config))
    assert [replace(p, scores=(), picture=None) for p in found] == [
        replace(p, scores=()) for p in expected
    ]
    for p, q in zip(found, expected, strict=True):
        assert p.scores == pytest.approx(q.scores, abs=1e-3)
    assert {p.exam_id for p in found if p.picture} == {"a", "b", "c"}


@pytest.mark.usefixtures("ray_cluster")
def test_evaluate_scores_and_tracks(
    random_config, random_checkpoint, write_exams, expected, tmp_path
) -> None:
    config = configure(random_config, random_checkpoint, str(tmp_path))
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    config = config.model_copy(update={"tracking": tracking})
    write_exams(config.data.exams_uri)
    summary = evaluate(config)
    assert summary.metrics["num_questions"] == 4
    assert summary.metrics["constant/strict/em"] == pytest.approx(1 / 3)  # 囊肿 for a's kind alone
    right = sum(p.answer == p.truth for p in expected)
    assert summary.metrics["strict/em"] == pytest.approx(right / 3)
    chosen = [p for p in expected if p.exam_id in {"a", "b"} and p.task == "kind"]
    hits = sum(p.chosen == 0 for p in chosen)
    assert summary.metrics["selection/accuracy"] == hits / 2
    assert summary.metrics["selection/chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    kept = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert kept == pytest.approx(summary.metrics)
    table = json.loads((tmp_path / "evaluate" / "tasks.json").read_text())
    assert [row["task"] for row in table] == ["kind"] * 3 + ["normal"] * 3

    client = MlflowClient(config.tracking.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'ultra'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics == pytest.approx(summary.metrics)
    assert run.data.params["evaluate.split"] == "test"
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {
        "answers.json",
        "selection.json",
        "sites.json",
        "tasks.json",
        "report.html",
    } <= artifacts
    strips = {a.path for a in client.list_artifacts(run.info.run_id, "frames")}
    assert strips == {"frames/a.png", "frames/b.png", "frames/c.png"}
    pictures = {a.path for a in client.list_artifacts(run.info.run_id, "understanding")}
    assert pictures == {f"understanding/{name}.png" for name in "abc"}

    def count_pictures(run_id: str) -> int:
        report = client.download_artifacts(run_id, "report.html", str(tmp_path))
        return Path(report).read_text().count("<p>What the answer to")

    assert count_pictures(run.info.run_id) == 3

    # The answers that are there are scored again without the checkpoint.
    reuse = {"checkpoint_uri": "nowhere", "reuse_predictions": True, "suites": ("strict",)}
    again = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=reuse)})
    rescored = evaluate(again)
    assert rescored.metrics["strict/em"] == summary.metrics["strict/em"]
    assert rescored.tables["selection"] == summary.tables["selection"]
    assert not [name for name in rescored.metrics if "llava_med" in name]
    (latest, _) = client.search_runs([experiment.experiment_id])
    assert count_pictures(latest.info.run_id) == 3  # they are kept with the answers


def test_what_is_missing_is_named(random_config, random_checkpoint, write_exams, tmp_path) -> None:
    config = configure(random_config, random_checkpoint, str(tmp_path))
    with pytest.raises(storage.StorageError, match="no complete table"):
        predict(config)
    with pytest.raises(storage.StorageError, match="no complete table"):
        read_predictions(config.evaluate.predictions_uri)
    parquet.publish_parts(config.data.exams_uri, [])
    with pytest.raises(ConfigError, match="no exam of 'test' in"):
        predict(config)
    write_exams(config.data.exams_uri)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        predict(configure(random_config, f"{tmp_path}/nowhere", str(tmp_path)))


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_training_answers_and_frames(write_exams, exams, s3_bucket, tmp_path, kind) -> None:
    uri = str(tmp_path) if kind == "local" else f"{s3_bucket}/training_answers"
    write_exams(uri)
    assert count_training_answers(uri) == {("kind", "是什么？", "囊肿"): 1}
    assert read_frames(uri, {"b", "d"}) == {"b": exams[1].frames, "d": exams[3].frames}
