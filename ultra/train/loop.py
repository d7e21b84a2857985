"""The steps of a stage, whatever engine takes them and wherever the batches come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from ultra.model.teacher import AttentionTeacher

Inputs = Mapping[str, Any]
Metrics = dict[str, float]


class Span(StrEnum):
    """A part of a step, in their order; what is between steps belongs to none.

    A profile tells LANGUAGE and LOSSES from FORWARD, and the likelihood teacher, by the language
    model's calls.
    """

    DATA = "waiting for data"
    TEACHER = "teacher"
    FORWARD = "fusion and scorer"
    LANGUAGE = "language model"
    LOSSES = "losses"
    BACKWARD = "backward"
    UPDATE = "optimizer update"
    OTHER = "other"
    BETWEEN = "between steps"


class Engine(Protocol):
    """What takes a step: DeepSpeed's engine behind `zero.ZeroEngine`, or any other."""

    def __call__(self, **inputs: Any) -> dict[str, Tensor]:
        """Return the model's outputs, `loss` among them."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one forward pass."""

    def step(self) -> None:
        """Count a forward pass; at the last of a step, move the parameters."""

    def set_learning_rate(self, rate: float) -> None:
        """Set the base learning rate; each parameter group scales it."""

    def alpha(self) -> float | None:
        """Return the fusion's alpha, or None with one encoder."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which steps to take and how.

    Attributes:
        first: step to begin with, 0 for a fresh stage.
        num_steps: steps of the whole stage.
        accumulation: forward passes of a step.
        learning_rate: rate of a step.
        offset: steps of the stages before this one.
        seed: every step draws from a generator seeded with it and the step's number, so a run
            that is cut off goes on with the same draws.
    """

    first: int
    num_steps: int
    accumulation: int
    learning_rate: Callable[[int], float]
    offset: int = 0
    seed: int = 0


@dataclass(slots=True)
class Teaching:
    """When and with what the feature score is taught (Eq. 5).

    Attributes:
        kind: `selection.teacher`.
        first: number of the step, over all stages, at which the redundancy loss starts.
        teacher: the attention teacher; None for the other kinds.
        snapshot: makes `teacher` a copy of the model as it stands.
        taken: whether `teacher` holds a snapshot.
    """

    kind: str
    first: int
    teacher: AttentionTeacher | None = None
    snapshot: Callable[[], None] | None = None
    taken: bool = False

    def due(self, total_step: int) -> bool:
        """Return whether a step has the redundancy loss; the same on every worker."""
        return self.kind != "none" and total_step >= self.first

    def extend(self, inputs: Inputs, total_step: int) -> dict[str, Any]:
        """Return the inputs of a step with what the redundancy loss needs."""
        if not self.due(total_step):
            return dict(inputs)
        if self.teacher is None:
            return {**inputs, "teach": True}
        if not self.taken and self.snapshot is not None:
            self.snapshot()
            self.taken = True
        scores = self.teacher(
            inputs["features"],
            inputs["frame_mask_BK"],
            inputs["findings_ids_BS"],
            inputs["findings_mask_BS"],
        )
        return {**inputs, "teach": True, "teacher_BK": scores}


def run_stage(
    engine: Engine,
    batches: Iterator[Inputs],
    schedule: Schedule,
    teaching: Teaching,
    report: Callable[[int, Metrics], bool | None],
    mark: Callable[[Span], None] = lambda span: None,
) -> None:
    """Take the steps of a stage.

    Args:
        engine: takes a step.
        batches: inputs of the model, one item a forward pass, without end.
        schedule: which steps.
        teaching: the redundancy loss.
        report: called after every step with the number of steps done and this worker's means; when
            it returns True, that was the last step.
        mark: called where a part of a step begins, and with BETWEEN where a step ends.

    Raises:
        FloatingPointError: when the loss is no longer finite.
    """
    for step in range(schedule.first, schedule.num_steps):
        mark(Span.OTHER)
        total_step = schedule.offset + step
        rate = schedule.learning_rate(step)
        engine.set_learning_rate(rate)
        torch.manual_seed(schedule.seed * 1_000_003 + total_step)
        sums: Metrics = {}
        for _ in range(schedule.accumulation):
            mark(Span.DATA)
            batch = next(batches)
            mark(Span.TEACHER)
            inputs = teaching.extend(batch, total_step)
            mark(Span.FORWARD)
            outputs = engine(**inputs)
            loss = float(outputs["loss"].detach())
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {total_step}")
            mark(Span.BACKWARD)
            engine.backward(outputs["loss"])
            mark(Span.UPDATE)
            engine.step()
            mark(Span.OTHER)
            for name, value in outputs.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / schedule.accumulation
        sums["learning_rate"] = rate
        alpha = engine.alpha()
        if alpha is not None:
            sums["alpha"] = alpha
        mark(Span.BETWEEN)
        if report(step + 1, sums):
            return
