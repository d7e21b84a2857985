"""Learning rates and stage lengths worked out by hand."""

from __future__ import annotations

import math

import pytest

from ultra.config import StageConfig
from ultra.train.schedule import count_steps, learning_rate


def make_stage(**values) -> StageConfig:
    return StageConfig.model_validate({"name": "align", "trainable": ["scorer"], **values})


@pytest.mark.parametrize(
    ("step", "share"),
    [
        (0, 1 / 3),  # two steps of warm-up: a third, two thirds, and then all of it
        (1, 2 / 3),
        (2, 1.0),
        (4, 0.5 * (1 + math.sqrt(0.5))),  # a quarter of the way down
        (6, 0.5),
        (8, 0.5 * (1 - math.sqrt(0.5))),
        (9, 0.5 * (1 - math.cos(math.pi / 8))),
    ],
)
def test_ten_steps_by_hand(step, share) -> None:
    stage = make_stage(steps=10, learning_rate=2e-3, warmup_fraction=0.2)
    assert learning_rate(step, 10, stage) == pytest.approx(2e-3 * share, rel=1e-9)


def test_without_warmup_it_starts_at_the_top() -> None:
    stage = make_stage(steps=4, learning_rate=0.5, warmup_fraction=0)
    half = math.sqrt(0.5)
    rates = [learning_rate(step, 4, stage) for step in range(4)]
    assert rates == pytest.approx([0.5, 0.25 * (1 + half), 0.25, 0.25 * (1 - half)])


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.5, 1.0])
def test_every_step_moves(num_steps, fraction) -> None:
    stage = make_stage(steps=num_steps, learning_rate=1.0, warmup_fraction=fraction)
    rates = [learning_rate(step, num_steps, stage) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(
    ("length", "num_exams", "batch_size", "expected"),
    [
        ({"steps": 12}, 100, 16, 12),
        ({"epochs": 1}, 100, 16, 7),
        ({"epochs": 3}, 100, 16, 19),
        ({"epochs": 2}, 8, 16, 1),
        ({"epochs": 2}, 64, 16, 8),
    ],
)
def test_the_steps_of_a_stage(length, num_exams, batch_size, expected) -> None:
    assert count_steps(make_stage(**length), num_exams, batch_size) == expected


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no exams to train on"):
        count_steps(make_stage(steps=5), 0, 16)
