"""Training from cached features and from pixels: the same losses, and samples per second of both.

    python -m benchmarks.features
    python -m benchmarks.features --quick   # small; prints its result and keeps nothing

The tiny preset on simulated exams, one worker without Ray. The exams are encoded once, which counts
by itself. Then both stages, from features and from pixels in turn, each round from the start with
the same exams in the same order: one loss a step of each, and the state of the random numbers after
it, which must be the same. A stage's first step, in which things are built, does not count for the
samples per second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.stand import spread, write_result
from ultra import storage
from ultra.config import PipelineConfig, load
from ultra.data import parquet, stream
from ultra.data.features import write_features
from ultra.data.prepare import list_entries, publish, write_tables
from ultra.data.writer.fill import fill_part
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.tracking import NullTracker
from ultra.train.alone import fit_alone

WAYS = ("features", "pixels")
MANY_EPOCHS = 1000
TOLERANCE = 5e-3
"""Between the losses of a step. Features are float16, and a frame among others may round another
way; the difference moves every later step."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    patients, steps, rounds = (20, 3, 1) if args.quick else (200, 30, 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = configure(folder, patients, steps)
        write_exams(config)
        encoding = encode(config)
        result = {"encoding": encoding, **compare(config, rounds, Path(folder))}
    headline = {
        **{f"{way}_samples_per_s": result["samples_per_s"][way]["median"] for way in WAYS},
        "ratio": result["ratio"]["median"],
        **{name: result[name] for name in ("largest_difference", "mean_difference")},
        **{name: result[name] for name in ("within_tolerance", "same_random_numbers")},
        "encode_frames_per_s": encoding["frames_per_s"]["median"],
        "cache_bytes_per_frame": encoding["bytes_per_frame"],
    }
    if args.quick:
        print(json.dumps({"benchmark": "features", **headline}))
    else:
        write_result("features", result, headline)


def configure(folder: str, patients: int, steps: int) -> PipelineConfig:
    """Return the tiny preset with both stages as long as asked for, and one worker."""
    return load(
        "tiny",
        [
            f"root={folder}",
            f"data.simulator.num_patients={patients}",
            "data.test_fraction=0",
            "data.validation_fraction=0",
            "data.row_group_mib=1",
            f"train.stages.0.steps={steps}",
            f"train.stages.1.steps={steps}",
            f"model.selection.teacher_warmup_steps={steps}",
            "train.num_workers=1",
            "train.log_every=1",
            "tracking.uri=''",
        ],
    )


def write_exams(config: PipelineConfig) -> None:
    """Write the exams and their conversations as one part."""
    data = config.data.model_copy(update={"patient_key_secret": "benchmark"})
    publish([write_tables(list(list_entries(data)), 0, data)], data)
    parts = [
        fill_part(part, data, config.instructions, {}).exams
        for part in parquet.read_parts(data.exams_uri)
    ]
    parquet.publish_parts(data.exams_uri, parts)


def cache_uri(config: PipelineConfig) -> str:
    """Return the folder of the features."""
    return storage.join(config.data.features_uri, cache_key(config.model))


def encode(config: PipelineConfig) -> dict[str, Any]:
    """Fill the cache, one row group after the other, and return how fast and how large."""
    encoders = FrozenEncoders(config.model)
    rates, frames, size = [], 0, 0
    for piece in stream.list_pieces(config.data.exams_uri, cache_uri(config)):
        begun_s = time.perf_counter()
        written = write_features(piece.part_uri, piece.row_group, piece.features_uri, encoders)
        rates.append(written.frames / (time.perf_counter() - begun_s))
        frames, size = frames + written.frames, size + written.bytes
    return {
        "frames": frames,
        "row_groups": len(rates),
        "frames_per_s": spread(rates, 1),
        "bytes_per_frame": round(size / frames),
    }


def compare(config: PipelineConfig, rounds: int, folder: Path) -> dict[str, Any]:
    """Return losses side by side, and samples per second of every round."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds):
        taken = {way: train(config, way, folder / f"{way}-{number}") for way in WAYS}
        for way, steps in taken.items():
            rates[way].append(steps.samples_per_second(config))
    pairs = list(zip(*(taken[way].losses for way in WAYS), strict=True))
    differences = [abs(a - b) for a, b in pairs]
    ratios = [a / b for a, b in zip(*(rates[way] for way in WAYS), strict=True)]
    return {
        "steps": len(pairs),
        "samples_per_s": {way: spread(found, 1) for way, found in rates.items()},
        "ratio": spread(ratios, 2),
        "losses": {way: [round(loss, 5) for loss in taken[way].losses] for way in WAYS},
        "largest_difference": max(differences),
        "mean_difference": sum(differences) / len(differences),
        "tolerance": TOLERANCE,
        "within_tolerance": max(differences) <= TOLERANCE,
        "same_random_numbers": taken["features"].draws == taken["pixels"].draws,
    }


class Steps(NullTracker):
    """Keeps the loss of every step, its rate, and what the random numbers have come to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.draws: list[str] = []

    def series(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Take the numbers of a step."""
        for _, values in rows:
            self.losses.append(values["loss"])
            self.rates.append(values["samples_per_second"])
        state = bytes(torch.get_rng_state().tolist())
        self.draws.append(hashlib.sha256(state).hexdigest())

    def samples_per_second(self, config: PipelineConfig) -> float:
        """Return the samples per second of the steps after the first of each stage."""
        num_steps = config.train.stages[0].steps or 0
        counted = [rate for step, rate in enumerate(self.rates) if step % num_steps]
        return len(counted) / sum(1 / rate for rate in counted)


def train(config: PipelineConfig, way: str, folder: Path) -> Steps:
    """Take both stages from the start and return their steps."""
    use = "require" if way == "features" else way
    source = stream.open_source(config.data, cache_uri(config), use)
    encoders = None if source.features else FrozenEncoders(config.model)
    steps = Steps()
    windows = stream.plan_windows(source.pieces, config.train.seed, 0, MANY_EPOCHS)
    rows = (row for window in windows for row in stream.read_window(window, ()))
    fit_alone(config, rows, source.num_exams, folder, encoders=encoders, tracker=steps)
    return steps


if __name__ == "__main__":
    main()
