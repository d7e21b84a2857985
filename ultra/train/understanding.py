"""Pictures of what the model makes of a few validation exams, as it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ultra.data import schema, stream
from ultra.model.drawing import draw_understanding
from ultra.model.encoders import FrozenEncoders
from ultra.model.llava_ultra import draw_number
from ultra.model.understanding import Understanding, understand
from ultra.tracking import Tracker
from ultra.train.batches import collator_of, to_inputs
from ultra.train.loop import Inputs
from ultra.train.stage import StageRun
from ultra.types import FrameGroup


@dataclass(frozen=True, slots=True)
class OpenExam:
    """A validation exam with what a forward pass about it needs, on the CPU."""

    group: FrameGroup
    inputs: Inputs


class PictureLog:
    """Draws the exams of `train.explained_exams` at the end of every epoch and of the stage.

    Every worker reads the same exams and computes the same, because parameters may be partitioned
    over all of them; the one that tracks also draws.

    Args:
        run: the stage.
        source: where the exams are.
        tracker: gets the pictures.
    """

    def __init__(self, run: StageRun, source: stream.Source, tracker: Tracker) -> None:
        self.run, self.num_exams, self.tracker = run, source.num_exams, tracker
        tracked = bool(run.config.tracking.uri)  # on every worker alike, as `tracker` is not
        count = run.config.train.explained_exams if tracked else 0
        self.exams = open_exams(run, source, count)

    def add(self, step: int) -> None:
        """Take a step that was made; every worker must call it for every step."""
        train = self.run.config.train
        last = step == self.run.schedule.num_steps
        if not last and not ends_epoch(step, train.batch_size, self.num_exams):
            return
        for exam in self.exams:
            understanding = explain(self.run, exam)
            if self.tracker.run_id:
                pictures = list(self.run.model.strategy.pictures(exam.group.frames))
                figure = draw_understanding(understanding, pictures, exam.group.valid)
                name = f"{self.run.stage.name}-{step:06d}/{exam.group.exam_id}"
                self.tracker.figure(f"understanding/{name}", figure)


def ends_epoch(step: int, batch_size: int, num_exams: int) -> bool:
    """Return whether a pass over the exams ends in the `step`-th step of a stage."""
    return step * batch_size // num_exams > (step - 1) * batch_size // num_exams


def open_exams(run: StageRun, source: stream.Source, count: int) -> list[OpenExam]:
    """Return the first `count` validation exams, without those that the stage asks nothing about.

    Encoders are built only for exams without features, and let go of.
    """
    config, seed = run.config.model, run.config.train.seed
    stage = run.stage.model_copy(update={"conversations": "one"})  # the one a picture shows
    rows = stream.read_split(source, "validation", count)
    device = torch.device("cpu")
    encoders = None
    if rows and not source.features:
        encoders = FrozenEncoders(config, str(run.engine.device))
    collate = collator_of(run)
    exams = []
    for row in rows:
        try:
            sample = stream.to_sample(
                row, stage, seed, config.tokens_per_frame, config.vision.dtype
            )
            batch = collate([sample])
        except ValueError:  # nothing to ask, or no answer within `max_length`
            continue
        exams.append(OpenExam(schema.from_row(row), to_inputs(batch, encoders, device)))
    return exams


def explain(run: StageRun, exam: OpenExam) -> Understanding:
    """Return what the model makes of an exam and its true answer; every worker must call it."""
    model, device = run.model, run.engine.device
    features: dict[str, Any] = exam.inputs["features"]
    return understand(
        model.config,
        model.fusion,
        model.scorer,
        model.language,
        {name: tensor.to(device) for name, tensor in features.items()},
        exam.inputs["input_ids_BS"][0].tolist(),
        exam.inputs["labels_BS"][0].tolist(),
        draw_number(exam.group.frames),
        run.engine.gather,
    )
