"""The learning rate of a step, and how long a stage is."""

from __future__ import annotations

import math

from ultra.config import StageConfig


def learning_rate(step: int, num_steps: int, stage: StageConfig) -> float:
    """Return the rate of a step (from 0): linear warm-up, then a half cosine to zero."""
    warmup = round(num_steps * stage.warmup_fraction)
    if step < warmup:
        return stage.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def count_steps(stage: StageConfig, num_exams: int, batch_size: int) -> int:
    """Return the optimizer steps of a stage.

    Raises:
        ValueError: when there is nothing to train on.
    """
    if num_exams == 0:
        raise ValueError("no exams to train on")
    if stage.steps is not None:
        return stage.steps
    assert stage.epochs is not None
    return math.ceil(stage.epochs * num_exams / batch_size)
