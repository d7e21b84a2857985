"""When checkpoints are kept, which is the best, and when a stage ends."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ultra.config import load
from ultra.model.checkpoint import Progress
from ultra.tracking import NullTracker
from ultra.train.validation import LOSS
from ultra.train.watch import Moment, StageWatch

NUM_STEPS = 8


class Losses:
    """Validation losses as given, one a look."""

    def __init__(self, *losses: float) -> None:
        self.losses = iter(losses)

    def measure(self) -> dict[str, float]:
        return {LOSS: next(self.losses)}


def watch_stage(
    losses: Losses | None,
    *overrides: str,
    progress: Progress | None = None,
    stop_after: int = 99,
    num_steps: int = NUM_STEPS,
) -> list[Moment]:
    """Go through a stage and return what was kept."""
    config = load("tiny", ["tracking.uri=", "train.explained_exams=0", *overrides])
    progress = progress or Progress(stage=1, total_step=5)
    schedule = SimpleNamespace(num_steps=num_steps, offset=progress.total_step - progress.step)
    model = SimpleNamespace(
        language=SimpleNamespace(tokenizer=None), strategy=SimpleNamespace(num_pictures=len)
    )
    run: Any = SimpleNamespace(
        config=config, stage=config.train.stages[1], schedule=schedule, model=model
    )
    kept: list[Moment] = []
    steps = iter(range(progress.step + 1, num_steps + 1))
    source: Any = SimpleNamespace(num_exams=7, features=True, pieces=())
    validation: Any = losses
    step = progress.step
    watch = StageWatch(
        run, progress, source, NullTracker(), validation, kept.append,
        lambda: step >= stop_after,
    )  # fmt: skip
    for step in steps:
        if watch(step, {"loss": 1.0}):
            break
    assert watch.kept is kept[-1]
    return kept


def test_a_stage_without_settings_ends_with_one_checkpoint() -> None:
    (moment,) = watch_stage(None)
    assert moment == Moment("2-instruct-000008", Progress(2, 0, 13), False, False, True)


def test_checkpoints_come_every_so_many_steps_and_know_the_place() -> None:
    moments = watch_stage(None, "train.checkpoint_every=3")
    assert [m.name[-6:] for m in moments] == ["000003", "000006", "000008"]
    assert [m.progress.total_step for m in moments] == [8, 11, 13]
    assert [m.progress.step for m in moments] == [3, 6, 0]
    assert [m.final for m in moments] == [False, False, True]


def test_the_best_is_kept_when_it_is_seen() -> None:
    moments = watch_stage(Losses(3.0, 2.0, 2.5, 2.4), "train.validate_every=2")
    assert [(m.name[-6:], m.best) for m in moments] == [
        ("000002", True), ("000004", True), ("000008", False),
    ]  # fmt: skip
    assert moments[1].progress.best == 2.0
    assert not moments[-1].goes_back  # without early stopping the last weights go on


def test_a_stage_ends_early_and_goes_back_to_the_best() -> None:
    moments = watch_stage(
        Losses(3.0, 2.0, 2.0, 2.1, 0.0), "train.validate_every=1", "train.early_stopping_patience=2"
    )
    assert [m.name[-6:] for m in moments] == ["000001", "000002", "000004"]
    last = moments[-1]
    assert (last.goes_back, last.best, last.final) == (True, False, True)
    assert last.progress == Progress(2, 0, 9)


def test_a_stage_that_is_best_at_its_end_goes_on_with_that() -> None:
    moments = watch_stage(
        Losses(3.0, 2.0), "train.validate_every=4", "train.early_stopping_patience=1"
    )
    assert [(m.best, m.goes_back) for m in moments] == [(True, False), (True, False)]


def test_patience_goes_on_from_a_checkpoint() -> None:
    progress = Progress(1, 4, 9, 0, (), best=1.0, stale=1)
    settings = ("train.validate_every=1", "train.early_stopping_patience=2")
    moments = watch_stage(Losses(1.5), *settings, progress=progress)
    assert [m.name[-6:] for m in moments] == ["000005"]
    assert moments[0].goes_back
    kept = watch_stage(Losses(1.5, 9, 9, 9), *settings, progress=replace(progress, stale=0))
    assert [m.name[-6:] for m in kept] == ["000006"]


@pytest.mark.parametrize("at", [2, 5])
def test_who_asks_it_to_stop_gets_a_checkpoint_of_that_step(at: int) -> None:
    (moment,) = watch_stage(None, stop_after=at)
    assert (moment.progress.stage, moment.progress.step) == (1, at)
    assert not moment.final


def test_the_last_step_ends_the_stage_whoever_asked() -> None:
    (moment,) = watch_stage(None, stop_after=NUM_STEPS)
    assert moment.progress.stage == 2
