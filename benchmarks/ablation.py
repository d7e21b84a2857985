"""The method against its parts, other ways to show a group, and other models' recipes.

    python -m benchmarks.ablation
    ray job submit --working-dir . -- python -m benchmarks.ablation --root /shared/ablation

Every row and seed of ablation.yaml is one task of the Ray cluster: it trains from the feature
cache, answers the test split and keeps the answers. What is kept is not done again, so the same
command goes on where it was stopped. Tables and a picture follow from the answers alone
(`--tables-only`); they go to the root, to `benchmarks/results` and to MLflow.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
import yaml

from benchmarks.ablation_tables import FULL, Run, blind_runs, draw, flat, summarise, to_markdown
from ultra import storage
from ultra.cli import refuse_lost_output
from ultra.config import InputError, PipelineConfig, load
from ultra.data import parquet, schema, stream
from ultra.data.encoding.on_ray import encode
from ultra.data.features import unpack
from ultra.data.on_ray import prepare
from ultra.data.writer.on_ray import write_instructions
from ultra.evaluate.baselines import count_answers
from ultra.evaluate.predictions import (
    PREDICTIONS,
    Prediction,
    count_training_answers,
    read_frames,
    read_predictions,
    to_table,
)
from ultra.evaluate.predictor import Predictor
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.model.strategies import num_visual_tokens
from ultra.tracking import open_run
from ultra.train.alone import fit_alone

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OBJECT_STORE_BYTES = 512 * 2**20
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray")
CHOOSING = ("adaptive", "first", "random", "each")
"""Strategies whose answers rest on one frame."""

Exam = dict[str, Any]
"""A row of the exams table with its features."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the tables.

    Attributes:
        config: its whole tree, seed 0.
        frames: `all`, or `valid` for an oracle that lays only frames before the model that show
            what the report says.
        named: whether it is run only when its name is given.
    """

    name: str
    table: str
    title: str
    config: PipelineConfig
    frames: str = "all"
    named: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write the tables."""
    args = _parse(argv)
    try:
        refuse_lost_output(args.root)
        root = args.root if "://" in args.root else str(Path(args.root).absolute())
        root = storage.join(root, "quick" if args.quick else "full")
        rows, seeds = read_rows(root, args.quick, args.overrides)
        if not args.tables_only:
            run_all(_pick(rows, args.rows), args.seeds or seeds)
        # Every run that is there counts, also where this command was for some seeds alone.
        runs = gather(rows, sorted({*seeds, *(args.seeds or ())}))
    except InputError as error:
        sys.exit(str(error))
    write_results(runs, rows[0].config, "ablation-quick" if args.quick else "ablation")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="runs/ablation", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, fewer exams and steps")
    parser.add_argument("--rows", nargs="+", help="default: the `tables` of ablation.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of ablation.yaml")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a.b=c")
    parser.add_argument(
        "--tables-only", action="store_true", help="only the tables, from the answers kept"
    )
    return parser.parse_args(argv)


def read_rows(root: str, quick: bool, overrides: Sequence[str]) -> tuple[list[Row], list[int]]:
    """Return the rows of ablation.yaml and its seeds.

    Raises:
        ConfigError: for a value that no configuration has.
    """
    raw = yaml.safe_load((HERE / "ablation.yaml").read_text(encoding="utf-8"))
    common = [f"root={root}", *raw["common"], *(raw["quick"]["common"] if quick else ())]
    rows = [
        Row(
            name,
            table,
            row["title"],
            load(raw["preset"], [*common, *overrides, *row.get("set", ()), f"name={name}"]),
            row.get("frames", "all"),
            named=table in raw["more"],
        )
        for table, members in {**raw["tables"], **raw["more"]}.items()
        for name, row in members.items()
    ]
    return rows, raw["quick"]["seeds"] if quick else raw["seeds"]


def _pick(rows: Sequence[Row], names: Sequence[str] | None) -> list[Row]:
    known = {row.name: row for row in rows}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise InputError(f"--rows: unknown {unknown[0]!r}; allowed: {', '.join(known)}")
    return [row for row in rows if (row.name in names if names else not row.named)]


def run_all(rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Prepare the exams and their features, and run every row with every seed, what is there not.

    Tasks run beside each other, one on a CPU.

    Raises:
        InputError: when the root holds runs of another configuration, or runs fail, when all have
            ended.
    """
    for row in rows:
        _claim(row)
    if not ray.is_initialized():
        if "RAY_ADDRESS" in os.environ:
            ray.init()  # a job's cluster: its CPUs and memory are not ours to choose
        else:
            ray.init(object_store_memory=OBJECT_STORE_BYTES)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for row in rows:
        _prepare(row.config)
    run = ray.remote(num_cpus=1, max_retries=1)(run_row)
    tasks = {
        run.remote(row, seed): (row, seed)
        for seed in seeds
        for row in rows
        if not storage.exists(_run_uri(row, seed, "run.json"))
    }
    started, total = time.monotonic(), len(tasks)
    failed = []
    while tasks:
        (done,), _ = ray.wait(list(tasks), num_returns=1)
        row, seed = tasks.pop(done)
        try:
            ray.get(done)
        except ray.exceptions.RayError as error:
            failed.append(f"{row.name} seed {seed}: {error}")
        minutes = (time.monotonic() - started) / 60
        print(
            f"{total - len(tasks)}/{total}  {row.name} seed {seed}  {minutes:.1f} min", flush=True
        )
    if failed:
        raise InputError("\n".join([f"{len(failed)} of {total} runs failed", *failed]))


def _claim(row: Row) -> None:
    uri = storage.join(row.config.root, "runs", row.name, "config.yaml")
    mine = row.config.to_yaml().encode()
    if storage.exists(uri) and storage.read_bytes(uri) != mine:
        raise InputError(f"{uri} is of another configuration; give another --root")
    storage.write_bytes(uri, mine)


def _prepare(config: PipelineConfig) -> None:
    data = config.data
    if not storage.exists(storage.join(data.exams_uri, "conversations.json")):
        counts = prepare(data)
        write_instructions(data, config.instructions)
        storage.write_bytes(storage.join(data.exams_uri, "conversations.json"), b"{}")
        print(f"{data.exams_uri}: {counts.summary()}", flush=True)
    build = partial(FrozenEncoders, config.model, "cpu")
    encoded = encode(data, config.encode, build, _cache_uri(config))
    if encoded.frames:
        print(f"{_cache_uri(config)}: {encoded.frames} frames encoded", flush=True)


def _cache_uri(config: PipelineConfig) -> str:
    return storage.join(config.data.features_uri, cache_key(config.model))


def _run_uri(row: Row, seed: int, name: str) -> str:
    return storage.join(row.config.root, "runs", row.name, str(seed), name)


def run_row(row: Row, seed: int) -> None:
    """Train a row with a seed, answer the test split, and keep the answers and what it took."""
    train = row.config.train.model_copy(update={"seed": seed})
    config = row.config.model_copy(update={"train": train})
    only_valid = row.frames == "valid"
    exams = list(read_exams(config, "train", only_valid))
    with tempfile.TemporaryDirectory() as folder:
        begun_s = time.process_time()
        uri = fit_alone(config, _epochs(exams, seed), len(exams), Path(folder))
        train_s = time.process_time() - begun_s
        asked = list(read_exams(config, "test", only_valid))
        begun_s = time.process_time()
        answers = answer(str(uri), config, asked)
        answer_s = time.process_time() - begun_s
    used = sum(stage.steps or 0 for stage in train.stages) * train.batch_size
    figures = {
        "train_cpu_s": train_s / used,
        "answer_cpu_s": answer_s / len(asked),
        "visual_tokens": sum(num_visual_tokens(config.model, len(e["valid"])) for e in asked)
        / len(asked),
    }
    target = _run_uri(row, seed, "predictions")
    parts = [
        parquet.write_part(
            to_table(answers).to_pylist(), target, PREDICTIONS, position=0, row_group_bytes=2**24
        )
    ]
    parquet.publish_parts(target, [part for part in parts if part])
    # Written last: it says that the run is whole.
    storage.write_bytes(_run_uri(row, seed, "run.json"), json.dumps(figures).encode())


def answer(checkpoint_uri: str, config: PipelineConfig, exams: Sequence[Exam]) -> list[Prediction]:
    """Return the answers to every question about the exams, from their features."""
    model, settings = config.model, config.evaluate
    predictor = Predictor(checkpoint_uri, settings.max_new_tokens, with_encoders=False)
    answers = []
    for start in range(0, len(exams), settings.batch_size):
        batch = exams[start : start + settings.batch_size]
        # The truth about frames is put back below: with it, baselines would look at every frame.
        groups = [replace(schema.from_row(exam), valid=None) for exam in batch]
        features = [
            unpack(exam["features"], model.tokens_per_frame, model.vision.dtype) for exam in batch
        ]
        answers += predictor.predict(groups, features)
    valid = {exam["exam_id"]: tuple(exam["valid"]) for exam in exams}
    return [replace(p, valid=valid[p.exam_id]) for p in answers]


def read_exams(config: PipelineConfig, split: str, only_valid: bool = False) -> Iterator[Exam]:
    """Yield the exams of a split with their features; frames come with those to be answered.

    Args:
        config: where the exams are, and which features go with them.
        split: train, validation or test.
        only_valid: leave out every frame that does not show what the report says.
    """
    columns = schema.TEXT_COLUMNS if split == "train" else None
    for piece in stream.list_pieces(config.data.exams_uri, _cache_uri(config)):
        for exam in stream.read_exams(piece, "split", {split}, columns):
            yield _keep_valid(exam) if only_valid else exam


def _keep_valid(exam: Exam) -> Exam:
    def keep(values: Sequence[Any]) -> list[Any]:
        return [value for value, valid in zip(values, exam["valid"], strict=True) if valid]

    by_frame = ("frames", "frame_width", "frame_height", "frame_source", "valid")
    kept = {name: keep(exam[name]) for name in by_frame if name in exam}
    features = {name: keep(stored) for name, stored in exam["features"].items()}
    return {**exam, **kept, "features": features}


def _epochs(exams: Sequence[Exam], seed: int) -> Iterator[Exam]:
    """Yield the exams for ever, in another order each epoch."""
    for epoch in count():
        order = list(exams)
        random.Random(f"{seed} {epoch}").shuffle(order)
        yield from ({**exam, "epoch": epoch} for exam in order)


def gather(rows: Sequence[Row], seeds: Sequence[int]) -> list[Run]:
    """Return the runs that are there, in the order of the rows, then those without a model.

    Raises:
        StorageError: when the full model was not run.
    """
    runs = [
        Run(
            row.name,
            row.table,
            row.title,
            seed,
            tuple(read_predictions(_run_uri(row, seed, "predictions"))),
            json.loads(storage.read_bytes(_run_uri(row, seed, "run.json"))),
            chooses=row.frames == "all" and row.config.model.selection.strategy in CHOOSING,
        )
        for row in rows
        for seed in seeds
        if storage.exists(_run_uri(row, seed, "run.json"))
    ]
    full = [run for run in runs if run.name == FULL]
    if not full:
        raise storage.StorageError(f"no run of the row {FULL!r} under {rows[0].config.root}")
    uri = rows[0].config.data.exams_uri
    blind = count_answers(count_training_answers(uri))
    frames = read_frames(uri, {p.exam_id for p in full[0].predictions})
    return [*runs, *blind_runs(full, blind, frames)]


def write_results(runs: Sequence[Run], config: PipelineConfig, name: str) -> None:
    """Write JSON, Markdown and the picture, under the root, here and to MLflow; print one line."""
    results = {
        "command": " ".join(["python -m benchmarks.ablation", *sys.argv[1:]]),
        "versions": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "steps": [stage.steps for stage in config.train.stages],
        **summarise(runs),
    }
    table, picture = to_markdown(results), draw(results)
    png = io.BytesIO()
    picture.savefig(png, format="png", dpi=110)
    files = {
        f"{name}.json": json.dumps(results, indent=1, ensure_ascii=False).encode() + b"\n",
        f"{name}.md": table.encode(),
        f"{name}.png": png.getvalue(),
    }
    for file, content in files.items():
        storage.write_bytes(storage.join(config.root, "results", file), content)
        storage.write_bytes(str(RESULTS / file), content)
    with open_run(config, "ablation") as tracker:
        tracker.table("rows", [flat(row) for row in results["rows"]])
        tracker.table("differences", results["differences"])
        tracker.text("ablation.md", table)
        tracker.figure("ablation", picture)
    print(table)
    means = {row["row"]: row["em"]["mean"] for row in results["rows"] if row["em"]}
    print(json.dumps({"benchmark": name, "em": means}))


if __name__ == "__main__":
    main()
