"""What happens between the steps of a stage: numbers, pictures, validation and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ultra.data.stream import Source
from ultra.model.checkpoint import Progress
from ultra.tracking import Tracker
from ultra.train.loop import Metrics
from ultra.train.progress import StepLog, UsedExams
from ultra.train.stage import StageRun, name_checkpoint
from ultra.train.understanding import PictureLog
from ultra.train.validation import LOSS, Validation


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment that a checkpoint keeps.

    Attributes:
        name: of the checkpoint; a later moment's sorts after it.
        progress: how far training has come.
        best: whether its validation loss is the lowest of the stage so far.
        goes_back: whether its weights are those of the best moment, not those of now.
        final: whether the last stage ends with it.
    """

    name: str
    progress: Progress
    best: bool
    goes_back: bool
    final: bool


class StageWatch:
    """Takes the numbers of every step; every worker must call it for every step.

    Its `kept` is the moment that was saved last.

    Args:
        run: the stage.
        progress: where it goes on from.
        source: where the exams are.
        tracker: gets numbers and pictures.
        validation: looks at the validation split; None never does.
        save: keeps a moment; every worker calls it.
        asked_to_stop: whether somebody asked, the same answer on every worker.
    """

    def __init__(
        self,
        run: StageRun,
        progress: Progress,
        source: Source,
        tracker: Tracker,
        validation: Validation | None,
        save: Callable[[Moment], None],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self.run, self.progress = run, progress
        self.kept: Moment | None = None
        self.validation, self.save, self.asked_to_stop = validation, save, asked_to_stop
        train, schedule = run.config.train, run.schedule
        self.log = StepLog(
            tracker, run.stage.name, schedule.num_steps, schedule.offset, train.batch_size,
            train.log_every,
        )  # fmt: skip
        self.pictures = PictureLog(run, source, tracker)
        self.used = UsedExams(progress, source.num_exams)
        self.best, self.stale = progress.best, progress.stale

    def __call__(self, step: int, metrics: Metrics) -> bool:
        """Take a step that was made and return whether it was the last of this run."""
        train = self.run.config.train
        self.log.add(step, metrics)
        self.pictures.add(step)
        done = step == self.run.schedule.num_steps
        improved = self._look(step, done)
        if train.early_stopping_patience is not None:
            done = done or self.stale >= train.early_stopping_patience
        stop = self.asked_to_stop() and not done
        due = train.checkpoint_every is not None and step % train.checkpoint_every == 0
        if done or stop or improved or due:
            self.kept = self._moment(step, done, improved)
            self.save(self.kept)
        return done or stop

    def _look(self, step: int, done: bool) -> bool:
        """Return whether the model is better on the validation split than it ever was."""
        train = self.run.config.train
        if self.validation is None or train.validate_every is None:
            return False
        if step % train.validate_every and not done:
            return False
        metrics = self.validation.measure()
        self.log.add_validation(step, metrics)
        improved = self.best is None or metrics[LOSS] < self.best
        self.best = metrics[LOSS] if improved else self.best
        self.stale = 0 if improved else self.stale + 1
        return improved

    def _moment(self, step: int, done: bool, improved: bool) -> Moment:
        index, total = self.progress.stage, self.run.schedule.offset + step
        epoch, seen = self.used.merge()
        after = Progress(index, step, total, epoch, seen, self.best, self.stale)
        if done:
            after = Progress(index + 1, 0, total)
        stops_early = self.run.config.train.early_stopping_patience is not None
        return Moment(
            name=name_checkpoint(index, self.run.stage, step),
            progress=after,
            best=improved,
            goes_back=done and stops_early and not improved,
            final=after.stage == len(self.run.config.train.stages),
        )
