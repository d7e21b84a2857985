"""Every frame once through the frozen encoders: a pool of actors, one row group of exams a task."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import ray.data

from ultra.config import DataConfig, EncodeConfig
from ultra.data.features import Encode, EncodeCounts, write_features
from ultra.data.on_ray import Report, show_progress
from ultra.data.stream import Piece, list_pieces, without_features


def encode(
    config: DataConfig, resources: EncodeConfig, build: Callable[[], Encode], cache_uri: str
) -> EncodeCounts:
    """Fill the feature cache for every row group of the exams table that is not in it.

    What is in the cache is kept, so a job that was cut off goes on when it is submitted again. When
    the process of an encoder dies, Ray Data starts another, which encodes its row group anew; a row
    group that no process survives ends the job when nothing has come out for half an hour.

    Args:
        config: where the exams are.
        resources: how many encoders run, and on what.
        build: makes the encoders, once in every actor.
        cache_uri: folder of the features of exactly these encoders.

    Raises:
        StorageError: when there is no complete table of exams.
    """
    pieces = list_pieces(config.exams_uri, cache_uri)
    missing = without_features(pieces, cache_uri)
    cached = len({piece.features_uri for piece in pieces}) - len(missing)
    if not missing:
        return EncodeCounts(cached)
    items = ray.data.from_items(list(map(asdict, missing)), override_num_blocks=len(missing))
    with show_progress("encode", len(missing)) as report:
        written = items.map(
            _EncodePiece,  # type: ignore[arg-type]
            fn_constructor_args=(build, report),
            compute=_pool(resources, len(missing)),
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica,
        ).take_all()
    frames, size = (sum(file[name] for file in written) for name in ("frames", "bytes"))
    seconds = max(file["ended_s"] for file in written) - min(file["begun_s"] for file in written)
    return EncodeCounts(cached, len(written), frames, size, seconds)


class _EncodePiece:
    def __init__(self, build: Callable[[], Encode], report: Report) -> None:
        self.encode = build()
        self.report = report
        report("ready", {"row groups": 0})

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        begun_s = time.time()
        piece = Piece(**row)
        written = asdict(
            write_features(piece.part_uri, piece.row_group, piece.features_uri, self.encode)
        )
        self.report(piece.features_uri, {"row groups": 1, **written})
        return {**written, "begun_s": begun_s, "ended_s": time.time()}


def _pool(resources: EncodeConfig, num_tasks: int) -> ray.data.ActorPoolStrategy:
    smallest = min(resources.num_replicas, num_tasks)
    largest = min(resources.max_replicas or smallest, num_tasks)
    # One task runs and one waits: more would wait while an encoder that starts later idles.
    return ray.data.ActorPoolStrategy(
        min_size=smallest, max_size=max(smallest, largest), max_tasks_in_flight_per_actor=2
    )
