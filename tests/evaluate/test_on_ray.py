"""Predictions and scores through Ray Data, MLflow included, on a local path and on S3."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.evaluate.image_text_weights import write_image_text_model
from tests.evaluate.slake import QUESTIONS, make_predictions, write_set
from tests.evaluate.vision_server import Reply, completion, serve
from ultra import storage
from ultra.config import ConfigError, InputError, OtherModel, PipelineConfig
from ultra.data import parquet, schema
from ultra.data.encoding.on_ray import encode
from ultra.evaluate.on_ray import evaluate, find_exams, predict
from ultra.evaluate.predictions import (
    Prediction,
    count_training_answers,
    read_frames,
    read_predictions,
)
from ultra.evaluate.predictor import Predictor
from ultra.evaluate.tables import summarise
from ultra.model.checkpoint import CheckpointError
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.registry import register, resolve_version
from ultra.tracking import open_run
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
    # Scores came as float32, from batches cut elsewhere; all else is the same to the letter.
    plain = [replace(p, scores=(), picture=None) for p in found]
    assert plain == [replace(p, scores=()) for p in wanted]
    assert {p.exam_id for p in found if p.picture} == exam_ids  # three at most
    assert len([p for p in found if p.picture]) == len(exam_ids)
    for p, q in zip(found, wanted, strict=True):
        assert p.scores == pytest.approx(q.scores, abs=1e-5)


@pytest.mark.slow
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
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.digest == parquet.digest_table(config.data.exams_uri)
    assert json.loads(used.dataset.profile) == {"test": 3, "train": 1, "validation": 1}
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {
        "answers.json",
        "selection.json",
        "sites.json",
        "tasks.json",
        "modalities.json",
        "languages.json",
        "differences.json",
        "tables.md",
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


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_evaluated_by_its_registered_name_becomes_the_champion(
    random_config, random_checkpoint, write_exams, tmp_path, capsys
) -> None:
    more = {"register_champion": True, "register_metric": "selection/accuracy", "max_exams": 2}
    named = "models:/llava-ultra@challenger"
    config = configure(random_config, named, str(tmp_path), bootstrap_samples=20, **more)
    tracking = config.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/mlflow.db"})
    config = config.model_copy(update={"tracking": tracking})
    with open_run(config, "train") as tracker:
        register(tracking, tracker.run_id, random_checkpoint)
    write_exams(config.data.exams_uri)
    accuracy = evaluate(config).metrics["selection/accuracy"]
    told = f"version 1 of llava-ultra: selection/accuracy {accuracy:.4g}, and there was none"
    assert f"champion is now {told}" in capsys.readouterr().out
    assert resolve_version("models:/llava-ultra@champion", tracking.uri) == random_checkpoint


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_other_models_are_rows_beside_ours(
    random_config, random_checkpoint, random_backbones, exams, tmp_path, capsys
) -> None:
    def with_ids(exam: FrameGroup) -> FrameGroup:
        asked = (replace(c, question_id=f"{exam.exam_id}-{c.task}") for c in exam.conversations)
        return replace(exam, conversations=tuple(asked))

    root = str(tmp_path)
    rows = [schema.to_row(with_ids(exam)) for exam in exams]
    part = parquet.write_part(
        rows, f"{root}/exams", schema.EXAMS, position=0, row_group_bytes=2**20
    )
    parquet.publish_parts(f"{root}/exams", [part] if part else [])
    answers = tmp_path / "answers.jsonl"
    lines = [("b-kind", "结节"), ("a-kind", "囊肿"), ("z", "?")]
    answers.write_text("\n".join(json.dumps({"question_id": q, "text": t}) for q, t in lines))
    weights = write_image_text_model(tmp_path / "llava", random_backbones / "language")

    def reply(question: str, _: int) -> Reply:
        return (400, {"error": {"message": "no"}}) if question == "是什么？" else completion("否")

    with serve(reply) as server:
        others = (
            OtherModel(name="file", answers_uri=str(answers)),
            OtherModel(name="llava", weights=weights, frames="first"),
            OtherModel(name="gpt", base_url=server.url, model="m"),
        )
        more = {"others": others, "suites": ("strict",), "bootstrap_samples": 20}
        config = configure(random_config, random_checkpoint, root, **more)
        summary = evaluate(config)
        num_requests = len(server.requests)
    assert num_requests == 4  # the exam without conversations is asked for its report
    printed = capsys.readouterr().out
    assert "file: 2 of 4 questions answered" in printed
    assert "  1 answers to questions that were not asked: z" in printed
    assert "gpt: 3 of 4 questions answered" in printed
    table = {row["row"]: row for row in summary.tables["answers"]}
    assert [*table] == ["model", "constant", "question_only", "file", "llava", "gpt"]
    assert [row["unanswered"] for row in table.values()] == [0, 0, 0, 1, 0, 1]
    assert table["file"]["strict/em"] == pytest.approx(2 / 3)  # a-normal has no answer
    assert table["gpt"]["strict/em"] == pytest.approx(1 / 3)  # a-normal alone
    assert summary.metrics["gpt/strict/closed_accuracy"] == 1
    assert summary.metrics["gpt/unanswered"] == 1
    differences = {row["compared_with"]: row for row in summary.tables["differences"]}
    assert {name: row["questions"] for name, row in differences.items()} == {
        "file": 2, "llava": 3, "gpt": 2,
    }  # fmt: skip
    (unanswered,) = [p for p in read_predictions(f"{root}/predictions-gpt") if p.unanswered]
    assert unanswered.question_id == "a-kind"
    assert unanswered.unanswered.startswith("BadRequestError: ")
    assert "| gpt |" in (tmp_path / "evaluate" / "tables.md").read_text()

    # The endpoint is gone and so is the checkpoint; another run's answers come in as they are.
    mine = OtherModel(name="before", answers_uri=config.evaluate.predictions_uri)
    reuse = {"reuse_predictions": True, "others": (*others, mine)}
    again = evaluate(configure(random_config, "nowhere", root, **{**more, **reuse}))
    assert again.tables["answers"][:-1] == summary.tables["answers"]
    assert again.tables["answers"][-1] == {**summary.tables["answers"][0], "row": "before"}
    silent = OtherModel(name="silent", answers_uri=str(tmp_path / "silent.jsonl"))
    (tmp_path / "silent.jsonl").write_text('{"question_id": "y", "text": "?"}')
    with pytest.raises(InputError, match="silent answered none of 4 questions; of 3 of them: no"):
        evaluate(configure(random_config, "", root, **{**more, **reuse, "others": (silent,)}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_public_set_is_scored_without_a_prepare(
    random_config, random_checkpoint, write_exams, tmp_path, capsys
) -> None:
    root = str(tmp_path)
    answers = tmp_path / "answers.jsonl"
    lines = [{"question_id": row[0], "text": row[-1]} for row in reversed(QUESTIONS)]
    answers.write_text("\n".join(map(json.dumps, lines)))
    others = (OtherModel(name="hand", answers_uri=str(answers)),)
    more = {"others": others, "bootstrap_samples": 20}
    config = configure(random_config, random_checkpoint, root, **more)
    source = {"format": "slake", "source_uri": write_set(tmp_path), "assume_deidentified": "me"}
    config = config.model_copy(update={"data": config.data.model_copy(update=source)})
    summary = evaluate(config)
    assert "5 exams (5 test), 5 frames" in capsys.readouterr().out
    assert parquet.is_table(f"{root}/evaluate/exams")
    assert parquet.is_table(f"{root}/evaluate/audit")
    assert not parquet.is_table(f"{root}/exams")
    assert summary.metrics["num_questions"] == 20
    # The rows of the answers worked out by hand; no training answers, so no blind rows.
    by_hand = summarise(make_predictions(), None, bootstrap_samples=0).tables
    for table in ("answers", "languages", "modalities", "tasks"):
        found = [row for row in summary.tables[table] if row["row"] == "hand"]
        for row, expected in zip(found, by_hand[table], strict=True):
            assert row == pytest.approx({**expected, "row": "hand"})  # sums in another order
        assert {row["row"] for row in summary.tables[table]} == {"model", "hand"}

    # A table that is there is what counts, unless the source is asked for. Its training answers
    # are to other tasks, so there are no blind rows still.
    write_exams(config.data.exams_uri)
    assert find_exams(config) is config
    again = config.evaluate.model_copy(update={"exams": "source", "reuse_predictions": True})
    public = evaluate(config.model_copy(update={"evaluate": again}))
    assert public.tables == summary.tables


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
