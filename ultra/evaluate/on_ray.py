"""Batch inference and scoring on Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import ray.data
from pydantic import SecretStr
from ray.data import ActorPoolStrategy

from ultra import registry, storage
from ultra.config import ConfigError, OtherModel, PipelineConfig
from ultra.data import parquet, stream
from ultra.data.on_ray import prepare
from ultra.evaluate.others import OtherPredictor, check, left_to_ask, others_uri, report
from ultra.evaluate.predictions import PREDICTIONS, read_predictions
from ultra.evaluate.predictor import Predictor
from ultra.evaluate.report import NUM_EXPLAINED, spread, track_report
from ultra.evaluate.results import MARKDOWN, read_markdown, write_tables
from ultra.evaluate.tables import Summary
from ultra.model import checkpoint
from ultra.model.encoders import cache_key
from ultra.tracking import open_run


def predict(config: PipelineConfig) -> str:
    """Answer every question about the exams of a split and return the predictions' address.

    Raises:
        CheckpointError: when there is no checkpoint to answer with.
        StorageError: when there is no complete table of exams.
        ConfigError: when the split holds no exam, features that are required are missing, or
            `evaluate.checkpoint_uri` is no version.
    """
    config = find_exams(registry.resolve_evaluated(config))
    settings = config.evaluate
    opened = checkpoint.read(settings.checkpoint_uri)
    exam_ids = _exam_ids(config)
    source = _open_source(config, opened)
    exams = _read_exams(source.pieces, exam_ids, settings.batch_size)
    arguments = {
        "checkpoint_uri": settings.checkpoint_uri,
        "max_new_tokens": settings.max_new_tokens,
        "device": "cuda" if settings.gpus_per_replica else "cpu",
        "with_encoders": not source.features,
        "explained": spread(exam_ids, NUM_EXPLAINED),
    }
    _answer(config, exams, Predictor, arguments, settings.predictions_uri)
    return settings.predictions_uri


def predict_other(config: PipelineConfig, other: OtherModel, api_key: SecretStr) -> None:
    """Answer the same questions with another model and say how many it answered.

    Raises:
        StorageError: when there is no complete table of exams.
        ConfigError: when the split holds no exam, or two questions of a file of answers one id.
    """
    settings = config.evaluate
    arguments = {"other": other, "settings": settings, "api_key": api_key}
    if not other.weights:  # nothing that computes: one replica reads a file or asks an endpoint
        alone = {"num_replicas": 1, "cpus_per_replica": 1, "gpus_per_replica": 0}
        config = config.model_copy(update={"evaluate": settings.model_copy(update=alone)})
    pieces = stream.open_source(config.data, "", "pixels").pieces
    exams = _read_exams(pieces, _exam_ids(config), settings.batch_size)
    uri = others_uri(settings, other)
    _answer(config, exams, OtherPredictor, arguments, uri)
    print(report(other, read_predictions(uri)))


def _answer(
    config: PipelineConfig,
    exams: ray.data.Dataset,
    predictor: type[Predictor] | type[OtherPredictor],
    arguments: Mapping[str, Any],
    uri: str,
) -> None:
    """Write the predictions about exams as the table at an address."""
    settings = config.evaluate
    answered = exams.map_batches(
        predictor,
        fn_constructor_kwargs=dict(arguments),
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=settings.num_replicas),
        num_cpus=settings.cpus_per_replica,
        num_gpus=settings.gpus_per_replica or None,
    )
    tables: Iterable[pa.Table] = answered.iter_batches(batch_size=None, batch_format="pyarrow")
    part = parquet.write_part(
        (row for table in tables for row in table.to_pylist()),
        uri,
        PREDICTIONS,
        position=0,
        row_group_bytes=config.data.row_group_mib * 2**20,
    )
    parquet.publish_parts(uri, [part] if part else [])


def evaluate(config: PipelineConfig) -> Summary:
    """Answer a split, score the answers and return the scores, also kept beside the tables.

    With `evaluate.reuse_predictions` the answers are those that are there already; other models
    that have none are asked.

    Raises:
        CheckpointError: when there is no checkpoint to answer with.
        StorageError: when there is no complete table of exams, or of predictions to reuse.
        ConfigError: when the split holds no exam, what another model needs is missing, or
            `evaluate.checkpoint_uri` is no version.
        InputError: when another model answered nothing.
    """
    config = registry.resolve_evaluated(config)
    with open_run(config, "evaluate") as tracker:
        trained_on = config.data.exams_uri
        asked = [(other, check(other)) for other in left_to_ask(config.evaluate)]
        config = find_exams(config)
        settings = config.evaluate
        uri = settings.predictions_uri if settings.reuse_predictions else predict(config)
        for other, api_key in asked:
            predict_other(config, other, api_key)
        places = dict.fromkeys([config.data.exams_uri, trained_on])
        summary = write_tables(settings, *filter(parquet.is_table, places))
        tracker.metrics(summary.metrics)
        stream.track_exams(tracker, config.data.exams_uri, "evaluation")
        for name, rows in summary.tables.items():
            tracker.table(name, rows)
        tracker.text(MARKDOWN, read_markdown(settings.results_uri))
        track_report(config, tracker, read_predictions(uri), summary)
        if said := registry.record_scores(config, tracker.run_id, summary.metrics, _asked(config)):
            print(said)
    return summary


def _asked(config: PipelineConfig) -> str:
    """Return what names the exams that were asked about; other names, other exams."""
    settings = config.evaluate
    digest = parquet.digest_table(config.data.exams_uri)
    return f"{digest} {settings.split} {settings.max_exams or 'all'}"


def find_exams(config: PipelineConfig) -> PipelineConfig:
    """Return the configuration with `data.exams_uri` where the exams to be answered are.

    Those of the source are prepared beside the results first, unless answers about them are reused.

    Raises:
        StorageError: when the source or a target cannot be reached.
        ConfigError: for an unknown format or a source that holds no exam.
    """
    data, settings = config.data, config.evaluate
    missing = bool(data.source_uri) and not parquet.is_table(data.exams_uri)
    if settings.exams == "table" or (settings.exams == "auto" and not missing):
        return config
    names = ("exams", "quarantine", "audit")
    places = {f"{name}_uri": storage.join(settings.results_uri, name) for name in names}
    beside = data.model_copy(update=places)
    if not (settings.reuse_predictions and parquet.is_table(beside.exams_uri)):
        print(prepare(beside).summary())
    print(f"exams: {beside.exams_uri}, quarantine: {beside.quarantine_uri}")
    found = settings.model_copy(update={"exams": "table"})
    return config.model_copy(update={"data": beside, "evaluate": found})


def _exam_ids(config: PipelineConfig) -> list[str]:
    uri, split = config.data.exams_uri, config.evaluate.split
    rows = (
        row
        for part in parquet.part_uris(uri)
        for row in parquet.read_rows(part, ["exam_id", "split"])
    )
    wanted = (row["exam_id"] for row in rows if row["split"] == split)
    exam_ids = list(islice(wanted, config.evaluate.max_exams))
    if not exam_ids:
        raise ConfigError(f"evaluate.split: no exam of {split!r} in {uri}")
    return exam_ids


def _open_source(config: PipelineConfig, opened: checkpoint.Checkpoint) -> stream.Source:
    """Return the exams, and where the features of the checkpoint's encoders are, if anywhere."""
    # Of the weights that it stands on, whatever may be at their address by now.
    digests = {name: weights["sha256"] for name, weights in opened.base.items()}
    key = cache_key(opened.config.model, digests)
    return stream.open_source(
        config.data,
        storage.join(config.data.features_uri, key),
        config.evaluate.features,
        "evaluate.features",
    )


def _read_exams(
    pieces: Sequence[stream.Piece], exam_ids: Sequence[str], batch_size: int
) -> ray.data.Dataset:
    wanted = frozenset(exam_ids)
    exams = ray.data.range(len(pieces), override_num_blocks=len(pieces)).flat_map(
        lambda item: stream.read_exams(pieces[item["id"]], "exam_id", wanted)
    )
    # Row groups hold many batches; without this a small split would keep one replica busy.
    return exams.repartition(target_num_rows_per_block=batch_size)
