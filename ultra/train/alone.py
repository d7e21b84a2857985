"""The stages in this process alone: one worker and no Ray, for many small runs side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from ultra.config import PipelineConfig
from ultra.model import checkpoint
from ultra.model.checkpoint import Progress
from ultra.model.encoders import FrozenEncoders
from ultra.tracking import NullTracker, Tracker
from ultra.train.batches import Row, read_inputs
from ultra.train.loop import run_stage
from ultra.train.profile import profile_stage
from ultra.train.progress import StepLog
from ultra.train.stage import begin_stage, name_checkpoint, write_stage


def fit_alone(
    config: PipelineConfig,
    rows: Iterator[Row],
    num_exams: int,
    folder: Path,
    *,
    encoders: FrozenEncoders | None = None,
    tracker: Tracker | None = None,
) -> Path:
    """Run the stages and return the folder of the final checkpoint.

    Given the same rows it takes the steps that `on_ray.fit` takes with one worker. It keeps a
    checkpoint at the end of a stage only, and does not go on from one.

    Args:
        config: the whole tree, with one worker.
        rows: exams as `stream.read_window` yields them, as many as the steps take.
        num_exams: exams of an epoch.
        folder: holds a folder for each stage's checkpoint.
        encoders: encode the frames; None where the rows have features.
        tracker: gets the numbers of every step.

    Raises:
        ValueError: for more than one worker.
        StopIteration: when the rows do not last.
    """
    train = config.train
    if train.num_workers != 1:
        raise ValueError(f"train.num_workers is {train.num_workers}; alone there is one worker")
    base = checkpoint.describe_base(config.model)
    start = train.start_from
    progress, tracker = Progress(), tracker or NullTracker()
    _join_group()
    while progress.stage < len(train.stages):
        opened = checkpoint.read(start) if start else None
        run = begin_stage(config, progress, opened, num_exams, base)
        schedule = run.schedule
        log = StepLog(
            tracker, run.stage.name, schedule.num_steps, schedule.offset,
            train.batch_size, train.log_every,
        )  # fmt: skip
        steps = iter(lambda: list(islice(rows, train.batch_size)), [])
        inputs = read_inputs(run, steps, encoders, used=lambda batch: None)
        with profile_stage(run, tracker) as mark:
            run_stage(run.engine, inputs, schedule, run.teaching, log.add, mark)
        target = folder / name_checkpoint(progress.stage, run.stage, schedule.num_steps)
        total = schedule.offset + schedule.num_steps
        progress = Progress(progress.stage + 1, 0, total)
        target.mkdir(parents=True)
        write_stage(run, target, progress, rank=0)
        run.engine.close()
        start = str(target)
    return Path(start)


def _join_group() -> None:
    """Be a group of this process alone, which DeepSpeed asks for, and keeps to the end."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed reads it there and nowhere else
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
