"""Ten thousand simulated exams through `prepare` onto a real S3 server, and what reading costs.

    python -m benchmarks.prepare
    python -m benchmarks.prepare --quick   # small; prints its result and keeps nothing

First the exams per second, with the memory of every worker beside them. Then frames per second
over the Parquet that came of it, by the rows that training streams (Ray Data) and by a torch
DataLoader over the same row groups, both with two workers: as bytes, and decoded to tensors in the
workers. The two take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import ray
import ray.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.stand import spread, write_result
from ray_jobs.demo import free_port
from tests.seaweedfs import SeaweedFS
from ultra import storage
from ultra.config import DataConfig
from ultra.data import stream
from ultra.data.on_ray import prepare, stream_rows

NUM_WORKERS = 2
BATCH = 64
MIB = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--patients", type=int, default=4040, help="default %(default)s")
    args = parser.parse_args(argv)
    patients, rounds = (40, 1) if args.quick else (args.patients, 5)
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as bucket, local_ray():
        config = DataConfig.model_validate(
            {
                "simulator": {"num_patients": patients, "min_frames": 3, "max_frames": 5},
                "test_fraction": 0,
                "validation_fraction": 0,
                **{f"{n}_uri": f"{bucket}/{n}" for n in ("exams", "quarantine", "audit")},
            }
        )
        result = {"prepare": run_prepare(config), **compare_reading(config, rounds)}
    headline = {
        **{n: result["prepare"][n] for n in ("exams", "exams_per_s", "frames_per_s")},
        "memory_late_over_early": result["prepare"]["memory_late_over_early"],
        **{f"{n}_ratio": ratio["median"] for n, ratio in result["ratio"].items()},
    }
    if args.quick:
        print(json.dumps({"benchmark": "prepare", **headline}))
    else:
        write_result("prepare", result, headline)


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run an S3 server and yield the address of an empty bucket on it."""
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}",
        "AWS_ACCESS_KEY_ID": "ultra",
        "AWS_SECRET_ACCESS_KEY": "ultra-secret",
        "AWS_REGION": "us-east-1",
    }
    os.environ.update(environment)
    server = SeaweedFS(folder, environment)
    server.start()
    try:
        yield server.make_bucket("benchmark")
    finally:
        server.kill()


@contextlib.contextmanager
def local_ray() -> Iterator[None]:
    """Run a Ray of two CPUs for this process alone."""
    ray.init(
        address="local",
        num_cpus=NUM_WORKERS,
        object_store_memory=512 * MIB,
        include_dashboard=False,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def run_prepare(config: DataConfig) -> dict[str, Any]:
    """Return what `prepare` did, how fast, and the memory of its workers."""
    lines = Lines()
    with contextlib.redirect_stdout(lines), watch_workers() as samples:
        start = time.perf_counter()
        counts = prepare(config)
        seconds = time.perf_counter() - start
    memory = flatness(samples, start, seconds)
    return {
        **counts.as_dict(),
        "seconds": round(seconds, 1),
        "exams_per_s": round(counts.exams / seconds, 2),
        "frames_per_s": round(counts.frames / seconds, 1),
        "progress_lines": len(lines.found),
        "last_progress_lines": lines.found[-2:],
        "worker_memory_mib": memory,
        "memory_late_over_early": {
            pid: round(m["late"] / m["early"], 3) for pid, m in memory.items()
        },
    }


class Lines(io.TextIOBase):
    """Passes what is printed on to stderr and keeps the lines of progress."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def write(self, text: str) -> int:
        """Take a text."""
        self.found += [line for line in text.splitlines() if line.startswith("prepare: ")]
        return sys.stderr.write(text)


Samples = dict[str, list[tuple[float, float]]]
"""Worker -> when, and how many MiB of its own it held."""


@contextlib.contextmanager
def watch_workers() -> Iterator[Samples]:
    """Sample every Ray worker's own memory twice a second."""
    samples: Samples = {}
    stopped = threading.Event()

    def watch() -> None:
        while not stopped.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    # Ray names a process after the task that it runs.
                    if " ".join(process.cmdline()).startswith("ray::Map("):
                        memory = process.memory_info()
                        own = (memory.rss - memory.shared) / MIB
                        samples.setdefault(str(process.pid), []).append((time.perf_counter(), own))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stopped.set()
        thread.join()


def flatness(samples: Samples, start: float, seconds: float) -> dict[str, dict[str, float]]:
    """Return median MiB in the second and in the last quarter, and the most, of each worker.

    The first quarter is left out, in which workers import and their allocators grow; workers that
    were not there in both quarters, too.
    """
    found = {}
    for pid, values in samples.items():
        quarters = [
            [own for when, own in values if lower <= (when - start) / seconds < lower + 0.25]
            for lower in (0.25, 0.75)
        ]
        if all(quarters):
            early, late = map(statistics.median, quarters)
            most = max(own for _, own in values)
            found[pid] = {"early": round(early, 1), "late": round(late, 1), "most": round(most, 1)}
    return found


def decode(frames: Sequence[bytes]) -> NDArray[np.uint8]:
    """Return the pixels of an exam's frames, (K, H, W)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(frame))) for frame in frames])


def compare_reading(config: DataConfig, rounds: int) -> dict[str, Any]:
    """Return frames per second of both ways of reading, and ours over the DataLoader's."""
    source = stream.open_source(config, "", "pixels")
    ways: dict[str, dict[str, Callable[[], int]]] = {
        goal: {"ours": RayDataReader(source, tensors), "data_loader": LoaderReader(source, tensors)}
        for goal, tensors in (("bytes", False), ("tensors", True))
    }
    rates: dict[str, dict[str, list[float]]] = {
        goal: {way: [] for way in readers} for goal, readers in ways.items()
    }
    totals = set()
    for number in range(-1, rounds):  # the first one only warms them
        for goal, readers in ways.items():
            for way, read in readers.items():
                start = time.perf_counter()
                frames = read()
                totals.add(frames)
                if number >= 0:
                    rates[goal][way].append(frames / (time.perf_counter() - start))
    (total,) = totals  # every way gave every frame, every time
    ratios = {
        goal: [a / b for a, b in zip(found["ours"], found["data_loader"], strict=True)]
        for goal, found in rates.items()
    }
    return {
        "frames": total,
        "read_frames_per_s": {
            goal: {way: spread(values, 0) for way, values in found.items()}
            for goal, found in rates.items()
        },
        "ratio": {goal: spread(values, 2) for goal, values in ratios.items()},
    }


class RayDataReader:
    """Reads the rows that training streams; tensors are decoded in the same tasks."""

    def __init__(self, source: stream.Source, tensors: bool) -> None:
        self.windows = list(stream.plan_windows(source.pieces, 0, 0, 1))
        self.tensors = tensors

    def __call__(self) -> int:
        """Return how many frames there were."""
        rows: Any = self._decoded() if self.tensors else stream_rows(self.windows, (), 1, BATCH)[0]
        batches = rows.iter_batches(batch_size=BATCH, batch_format="pyarrow", prefetch_batches=2)
        return sum(len(frames) for batch in batches for frames in batch["frames"].to_pylist())

    def _decoded(self) -> ray.data.Dataset:
        windows = self.windows

        def read(item: dict[str, Any]) -> Iterator[dict[str, Any]]:
            for row in stream.read_window(windows[item["id"]], ()):
                yield {**row, "frames": decode(row["frames"])}

        return ray.data.range(len(windows), override_num_blocks=len(windows)).flat_map(read)


class RowGroups(IterableDataset[Any]):
    """The exams of row groups, a share for each worker, as one would write it by hand."""

    def __init__(self, pieces: Sequence[stream.Piece], tensors: bool) -> None:
        self.pieces, self.tensors = pieces, tensors

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of this worker's share."""
        worker = get_worker_info()
        assert worker is not None
        for piece in self.pieces[worker.id :: worker.num_workers]:
            with storage.open_read(piece.part_uri) as file, pq.ParquetFile(file) as table:
                for row in table.read_row_group(piece.row_group).to_pylist():
                    if self.tensors:
                        row["frames"] = torch.from_numpy(decode(row["frames"]))
                    yield row


class LoaderReader:
    """Reads with a torch DataLoader, whose workers stay."""

    def __init__(self, source: stream.Source, tensors: bool) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            RowGroups(source.pieces, tensors),
            batch_size=BATCH,
            num_workers=NUM_WORKERS,
            collate_fn=list,
            persistent_workers=True,
            multiprocessing_context="spawn",  # the S3 client does not survive a fork
        )

    def __call__(self) -> int:
        """Return how many frames there were."""
        return sum(len(row["frames"]) for batch in self.loader for row in list(batch))


if __name__ == "__main__":
    main()
