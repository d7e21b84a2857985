"""Batch inference and scoring on Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from ultra import storage
from ultra.config import ConfigError, PipelineConfig
from ultra.data import parquet, stream
from ultra.evaluate.figures import draw_curves, draw_strip
from ultra.evaluate.predictions import (
    PREDICTIONS,
    Prediction,
    read_frames,
    read_predictions,
)
from ultra.evaluate.predictor import Predictor
from ultra.evaluate.report import (
    pick_exams,
    show_results,
    spread,
    spread_exams,
)
from ultra.evaluate.results import write_tables
from ultra.evaluate.tables import Summary
from ultra.model import checkpoint
from ultra.model.encoders import cache_key
from ultra.page import build_page
from ultra.tracking import Tracker, open_run, read_history

NUM_SHOWN, NUM_EXPLAINED = 12, 3
"""Exams shown as pictures, and those of them that also show what an answer rests on."""


def predict(config: PipelineConfig) -> str:
    """Answer every question about the exams of a split and return the predictions' address.

    Raises:
        CheckpointError: when there is no checkpoint to answer with.
        StorageError: when there is no complete table of exams.
        ConfigError: when the split holds no exam, or features that are required are missing.
    """
    settings = config.evaluate
    opened = checkpoint.read(settings.checkpoint_uri)
    exam_ids = _exam_ids(config)
    source = _open_source(config, opened)
    exams = _read_exams(source.pieces, exam_ids, settings.batch_size)
    answered = exams.map_batches(
        Predictor,
        fn_constructor_kwargs={
            "checkpoint_uri": settings.checkpoint_uri,
            "max_new_tokens": settings.max_new_tokens,
            "device": "cuda" if settings.gpus_per_replica else "cpu",
            "with_encoders": not source.features,
            "explained": spread(exam_ids, NUM_EXPLAINED),
        },
        batch_size=settings.batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=settings.num_replicas),
        num_cpus=settings.cpus_per_replica,
        num_gpus=settings.gpus_per_replica or None,
    )
    tables: Iterable[pa.Table] = answered.iter_batches(batch_size=None, batch_format="pyarrow")
    part = parquet.write_part(
        (row for table in tables for row in table.to_pylist()),
        settings.predictions_uri,
        PREDICTIONS,
        position=0,
        row_group_bytes=config.data.row_group_mib * 2**20,
    )
    parquet.publish_parts(settings.predictions_uri, [part] if part else [])
    return settings.predictions_uri


def evaluate(config: PipelineConfig) -> Summary:
    """Answer a split, score the answers and return the scores, also kept beside the tables.

    With `evaluate.reuse_predictions` the answers are those that are there already.

    Raises:
        CheckpointError: when there is no checkpoint to answer with.
        StorageError: when there is no complete table of exams, or of predictions to reuse.
        ConfigError: when the split holds no exam.
    """
    with open_run(config, "evaluate") as tracker:
        settings = config.evaluate
        uri = settings.predictions_uri if settings.reuse_predictions else predict(config)
        summary = write_tables(settings, config.data.exams_uri)
        tracker.metrics(summary.metrics)
        for name, rows in summary.tables.items():
            tracker.table(name, rows)
        _show(config, tracker, read_predictions(uri), summary)
    return summary


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


def _show(
    config: PipelineConfig, tracker: Tracker, predictions: Sequence[Prediction], summary: Summary
) -> None:
    shown = spread_exams(predictions, NUM_SHOWN)
    exams = pick_exams(predictions, read_frames(config.data.exams_uri, shown))
    for exam in exams:
        p = exam.predictions[0]
        figure = draw_strip(exam.frames, p.scores, p.chosen, p.valid)
        tracker.figure(f"frames/{p.exam_id}", figure)
        for png in (p.picture for p in exam.predictions if p.picture is not None):
            tracker.picture(f"understanding/{p.exam_id}", png)
    curves = read_history(config, "train")
    if curves:
        tracker.figure("training_curves", draw_curves(curves))
    sections = show_results(summary, exams, curves)
    tracker.text("report.html", build_page(f"Evaluation of {config.name}", sections))
