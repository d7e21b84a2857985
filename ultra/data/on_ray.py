"""The data jobs on Ray Data: tasks read and write storage, the driver only counts and publishes."""

from __future__ import annotations

import math
import pickle
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data

from ultra import storage
from ultra.config import DataConfig, EncodeConfig
from ultra.data import parquet
from ultra.data.features import Encode, features_uri, write_features
from ultra.data.prepare import (
    PrepareCounts,
    fill_conversations,
    list_entries,
    publish,
    write_tables,
)
from ultra.data.stream import Window, read_window

T = TypeVar("T")
R = TypeVar("R")

TASKS_PER_CPU = 4
"""Enough that a slow exam does not leave the other CPUs waiting."""

MIN_EXAMS_PER_TASK = 8


def prepare(config: DataConfig) -> PrepareCounts:
    """Bring the exams of the source into Parquet and return what came of them.

    An exam that cannot be let in goes to the quarantine table and stops nothing. Tables that stood
    at the addresses before are replaced when every task has ended.

    Raises:
        StorageError: when the source or a target cannot be reached.
        ValueError: when the source holds no exam.
    """
    for uri in (config.exams_uri, config.quarantine_uri, config.audit_uri):
        storage.resolve(uri)
    if not config.patient_key_secret:
        config = config.model_copy(update={"patient_key_secret": secrets.token_hex(32)})
    entries = list(list_entries(config))
    size = math.ceil(len(entries) / (TASKS_PER_CPU * _num_cpus()))
    size = min(max(size, MIN_EXAMS_PER_TASK), config.exams_per_file)

    tasks = [(start, entries[start : start + size]) for start in range(0, len(entries), size)]
    return publish(_map(tasks, lambda task: write_tables(task[1], task[0], config)), config)


def write_instructions(config: DataConfig) -> int:
    """Give every exam of the table its conversations and return how many exams there are.

    Raises:
        StorageError: when there is no complete table of exams.
    """
    parts = _map(
        parquet.read_parts(config.exams_uri), lambda part: fill_conversations(part, config)
    )
    parquet.publish_parts(config.exams_uri, parts)
    return sum(part.num_rows for part in parts)


@dataclass(frozen=True, slots=True)
class EncodeCounts:
    """What the encode job did: parts of the table found in the cache, and frames encoded."""

    parts: int
    parts_cached: int
    frames: int


def encode(
    config: DataConfig, resources: EncodeConfig, build: Callable[[], Encode], cache_uri: str
) -> EncodeCounts:
    """Fill the feature cache for every part of the exams table that is not in it.

    Args:
        config: where the exams are.
        resources: how many encoders run, and on what.
        build: makes the encoders, once in every actor.
        cache_uri: folder of the features of exactly these encoders.

    Raises:
        StorageError: when there is no complete table of exams.
    """
    present = set(storage.list_files(cache_uri, ".parquet"))
    targets = {part: features_uri(part, cache_uri) for part in parquet.part_uris(config.exams_uri)}
    missing = [{"part": p, "target": t} for p, t in targets.items() if t not in present]
    frames = 0
    if missing:
        encoded = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
            _EncodePart,  # type: ignore[arg-type]
            fn_constructor_args=(build,),
            compute=ray.data.ActorPoolStrategy(size=min(resources.num_replicas, len(missing))),
            num_cpus=resources.cpus_per_replica,
            num_gpus=resources.gpus_per_replica,
        )
        frames = sum(row["frames"] for row in encoded.take_all())
    return EncodeCounts(len(targets), len(targets) - len(missing), frames)


class _EncodePart:
    def __init__(self, build: Callable[[], Encode]) -> None:
        self.encode = build()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"frames": write_features(row["part"], row["target"], self.encode)}


def stream_rows(
    windows: Sequence[Window], seen: Collection[tuple[int, str]], num_workers: int
) -> list[ray.data.DataIterator]:
    """Return an iterator of training rows for each worker, all of the same length.

    The order follows from the windows alone, however many workers share them.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # training has a progress line of its own
    left = frozenset(seen)
    rows = ray.data.range(len(windows), override_num_blocks=len(windows)).flat_map(
        lambda item: read_window(windows[item["id"]], left)
    )
    return [rows.iterator()] if num_workers == 1 else rows.streaming_split(num_workers, equal=True)


def _map(items: Sequence[T], function: Callable[[T], R]) -> list[R]:
    """Return what `function` gives for each item, in order, one task each."""
    if not items:
        return []

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "result": pickle.dumps(function(pickle.loads(row["item"])))}

    # Arrow has no type for items and results, so they travel as bytes; both are small.
    rows = [{"index": index, "item": pickle.dumps(item)} for index, item in enumerate(items)]
    found = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run).take_all()
    return [pickle.loads(row["result"]) for row in sorted(found, key=lambda row: row["index"])]


def _num_cpus() -> int:
    if not ray.is_initialized():
        ray.init()
    resources: dict[str, float] = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1)))
