"""The data jobs on Ray Data: tasks read and write storage, the driver only counts and publishes."""

from __future__ import annotations

import itertools
import math
import pickle
import secrets
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from ultra import storage
from ultra.config import ConfigError, DataConfig
from ultra.data import parquet
from ultra.data.export import ExportCounts, export_part, join_pieces
from ultra.data.importers.entry import ExamEntry
from ultra.data.prepare import (
    PrepareCounts,
    Written,
    list_entries,
    publish,
    write_tables,
)
from ultra.data.progress import EVERY_S, describe_progress
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
        ConfigError: for an unknown format, a source that holds no exam, or a missing file where
            the configuration is strict.
    """
    for uri in (config.exams_uri, config.quarantine_uri, config.audit_uri):
        storage.resolve(uri)
    if not config.patient_key_secret:
        config = config.model_copy(update={"patient_key_secret": secrets.token_hex(32)})
    # The source is read twice: once to learn how many exams a task gets, then task by task.
    total = sum(1 for _ in list_entries(config))
    if not total:
        raise ConfigError(f"data.source_uri: {config.source_uri} holds no exam")
    size = math.ceil(total / (TASKS_PER_CPU * _num_cpus()))
    size = min(max(size, MIN_EXAMS_PER_TASK), config.exams_per_file)
    with show_progress("prepare", total) as report:

        def write(task: tuple[int, list[ExamEntry]]) -> Written:
            position, entries = task
            return write_tables(entries, position, config, partial(report, position))

        written = map_tasks(_tasks(list_entries(config), size), write)
    return publish(written, config)


def _tasks(entries: Iterable[ExamEntry], size: int) -> Iterator[tuple[int, list[ExamEntry]]]:
    left = iter(entries)
    for position in itertools.count(step=size):
        chunk = list(itertools.islice(left, size))
        if not chunk:
            return
        yield position, chunk


Report = Callable[[Hashable, Mapping[str, int]], None]
"""Takes the key of a task and what of it is done so far, by name."""


@contextmanager
def show_progress(name: str, total: int) -> Iterator[Report]:
    """Print a line now and then; yield what tasks on any node report with.

    A task that runs again reports under its key again, so nothing counts twice. Time counts from
    the first report, which may be of nothing done yet: what workers take to start is no rate.
    """
    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    stopped = threading.Event()

    def show() -> None:
        while not stopped.wait(EVERY_S):
            done, elapsed_s = ray.get(board.total.remote())
            if done:
                print(describe_progress(name, total, done, elapsed_s))

    def report(key: Hashable, done: Mapping[str, int]) -> None:
        board.set.remote(key, dict(done))

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield report
    finally:
        stopped.set()
        thread.join()


class _Board:
    def __init__(self) -> None:
        self.done: dict[Hashable, dict[str, int]] = {}
        self.since_s = 0.0

    def set(self, key: Hashable, done: dict[str, int]) -> None:
        self.since_s = self.since_s or time.monotonic()
        self.done[key] = done

    def total(self) -> tuple[dict[str, int], float]:
        totals: dict[str, int] = {}
        for done in self.done.values():
            for name, count in done.items():
                totals[name] = totals.get(name, 0) + count
        return totals, time.monotonic() - self.since_s


def export(config: DataConfig) -> tuple[ExportCounts, list[str]]:
    """Write every exam for other trainers; return what was written, and the files of rows.

    Raises:
        StorageError: when there is no complete table of exams, or the target cannot be reached.
    """
    storage.resolve(config.export_uri)
    parts = parquet.read_parts(config.exams_uri)
    written = map_tasks(parts, lambda part: export_part(part, config))
    return sum(written, ExportCounts()), join_pieces(parts, config)


def stream_rows(
    windows: Sequence[Window],
    seen: Collection[tuple[int, str]],
    num_workers: int,
    rows_per_step: int,
) -> list[ray.data.DataIterator]:
    """Return an iterator of training rows for each worker, all of the same length.

    Step n of all workers together has the n-th `rows_per_step` rows of the windows, so what a step
    learns from does not depend on how many workers share it, nor on where a run was cut off.
    """
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False  # training has a progress line of its own
    context.custom_execution_callback_classes = [Rest]
    left = frozenset(seen)
    rows = ray.data.range(len(windows), override_num_blocks=len(windows)).flat_map(
        lambda item: read_window(windows[item["id"]], left)
    )
    if num_workers == 1:
        return [rows.iterator()]
    # Blocks of equal length are dealt out in turn.
    shares = rows.repartition(target_num_rows_per_block=rows_per_step // num_workers, strict=True)
    return shares.streaming_split(num_workers, equal=True)


class Rest(ExecutionCallback):
    """Lets Ray Data's control loop rest between its steps.

    While it waits for training to take rows it spins otherwise, for a third of a core.
    """

    def on_execution_step(self, executor: Any) -> None:
        """Rest; no step of training is near as short."""
        time.sleep(0.01)


def map_tasks(items: Iterable[T], function: Callable[[T], R]) -> list[R]:
    """Return what `function` gives for each item, in order, one task each."""

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"index": row["index"], "result": pickle.dumps(function(pickle.loads(row["item"])))}

    # Arrow has no type for items and results, so they travel as bytes. Those of the items lie in
    # the object store, which spills to disk, and not in the driver.
    blocks: list[Any] = [
        ray.put(pa.table({"index": [index], "item": [pickle.dumps(item)]}))
        for index, item in enumerate(items)
    ]
    if not blocks:
        return []
    found = ray.data.from_arrow_refs(blocks).map(run).take_all()
    return [pickle.loads(row["result"]) for row in sorted(found, key=lambda row: row["index"])]


def _num_cpus() -> int:
    if not ray.is_initialized():
        ray.init()
    resources: dict[str, float] = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1)))
