"""What a worker remembers of a stage: numbers to report and exams already used."""

from __future__ import annotations

import time
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from ultra.model.checkpoint import Progress
from ultra.tracking import Tracker
from ultra.train.loop import Metrics
from ultra.types import Batch


class StepLog:
    """Gathers the numbers of every step and passes them on, averaged over the workers.

    Args:
        name: of the stage, for the progress line.
        num_steps: of the stage.
        offset: steps of the stages before.
        batch_size: samples of a step, over all workers.
        every: steps between two reports.
    """

    def __init__(
        self, tracker: Tracker, name: str, num_steps: int, offset: int, batch_size: int, every: int
    ) -> None:
        self.tracker = tracker
        self.name, self.num_steps, self.offset = name, num_steps, offset
        self.batch_size, self.every = batch_size, every
        self.steps: list[tuple[int, Metrics]] = []
        self.since_s = time.perf_counter()

    def add(self, step: int, metrics: Metrics) -> None:
        """Take the numbers of a step; every worker must call it for every step."""
        self.steps.append((self.offset + step, metrics))
        if step % self.every == 0 or step == self.num_steps:
            self._flush(step)

    def add_validation(self, step: int, metrics: Metrics) -> None:
        """Take scores on the validation split, which all workers have alike."""
        self.tracker.metrics(metrics, self.offset + step)
        if is_first():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"{self.name} {step}/{self.num_steps}  {shown}", flush=True)

    def _flush(self, step: int) -> None:
        names = list(self.steps[0][1])
        values = add_up(torch.tensor([[m[name] for name in names] for _, m in self.steps]))
        if dist.is_initialized():
            values /= dist.get_world_size()
        now_s = time.perf_counter()
        rate = len(self.steps) * self.batch_size / (now_s - self.since_s)
        rows = [
            (total, dict(zip(names, row, strict=True)))
            for (total, _), row in zip(self.steps, values.tolist(), strict=True)
        ]
        rows[-1][1]["samples_per_second"] = rate
        self.tracker.series(rows)
        if is_first():
            last = rows[-1][1]
            shown = "  ".join(
                f"{n} {last[n]:.3f}"
                for n in ("loss", "redundancy", "alpha", "entropy")
                if n in last
            )
            print(f"{self.name} {step}/{self.num_steps}  {shown}  {rate:.0f} samples/s", flush=True)
        self.steps = []
        self.since_s = now_s


def is_first() -> bool:
    """Return whether this is the worker that prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def add_up(values: Tensor) -> Tensor:
    """Return the sum over the workers, on the CPU; every worker must call it."""
    if not dist.is_initialized():
        return values
    total = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(total)
    return total.cpu()


class UsedExams:
    """Which exams this stage has used in the passes that are not complete."""

    def __init__(self, progress: Progress, num_exams: int) -> None:
        self.epoch, self.num_exams = progress.epoch, num_exams
        self.seen = set(progress.seen)

    def add(self, batch: Batch) -> None:
        """Count a batch's exams as used."""
        self.seen.update(zip(batch.epochs, batch.exam_ids, strict=True))

    def merge(self) -> tuple[int, tuple[tuple[int, str], ...]]:
        """Return the first incomplete pass and what was used from it on, over all workers.

        Every worker must call it.
        """
        if dist.is_initialized():
            everyone: list[set[tuple[int, str]]] = [set()] * dist.get_world_size()
            dist.all_gather_object(everyone, self.seen)
            self.seen = set().union(*everyone)
        counts = Counter(epoch for epoch, _ in self.seen)
        while counts[self.epoch] >= self.num_exams:
            self.epoch += 1
        self.seen = {(epoch, exam) for epoch, exam in self.seen if epoch >= self.epoch}
        return self.epoch, tuple(sorted(self.seen))
