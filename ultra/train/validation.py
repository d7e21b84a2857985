"""The validation split as training goes on: loss per token, and whether the right frame is chosen.

Shapes: B groups, K frames of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch

from ultra.config import ConfigError
from ultra.data import parquet, stream
from ultra.model.encoders import FrozenEncoders
from ultra.train.batches import collator_of, to_inputs
from ultra.train.loop import Metrics
from ultra.train.progress import add_up
from ultra.train.stage import StageRun
from ultra.types import Batch

LOSS = "validation/loss"
"""Nats a token, over the answers of all exams: every token counts alike."""
SELECTION = "validation/selection_accuracy"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an exam of the validation split stands."""

    piece: stream.Piece
    exam_id: str


class Validation:
    """Looks at the validation split; the workers share its exams.

    Args:
        run: the stage.
        source: where the exams are.
        encoders: encode the frames; None where the rows have features.
        rank: of this worker among `num_workers`.

    Raises:
        ConfigError: when the split has no exam.
    """

    def __init__(
        self,
        run: StageRun,
        source: stream.Source,
        encoders: FrozenEncoders | None,
        rank: int,
        num_workers: int,
    ) -> None:
        train = run.config.train
        self.run, self.encoders, self.collate = run, encoders, collator_of(run)
        places = list_places(source)[: train.validation_exams]
        if not places:
            raise ConfigError("train.validate_every: there is no exam in the validation split")
        self.size = train.micro_batch_size
        self.num_forwards = math.ceil(math.ceil(len(places) / num_workers) / self.size)
        self.own, self.spare = places[rank::num_workers], places[:1]

    def measure(self) -> Metrics:
        """Return the scores of the model as it stands; every worker must call it, and gets them."""
        self.run.model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        with torch.no_grad():
            torch.manual_seed(self.run.schedule.seed)  # for strategies that draw
            batches = self._batches(self.own)
            spare = next(self._batches(self.spare))
            for _ in range(self.num_forwards):
                # Parameters may be partitioned: who has no batch left goes through one again.
                batch = next(batches, None)
                found = self._measure(*(batch or spare))
                if batch is not None:
                    sums += found
        self.run.model.train()
        nats, tokens, right, gradable = add_up(sums).tolist()
        metrics = {LOSS: nats / tokens}
        if gradable:
            metrics[SELECTION] = right / gradable
        return metrics

    def _measure(self, batch: Batch, valid: list[tuple[bool, ...] | None]) -> torch.Tensor:
        inputs = to_inputs(batch, self.encoders, self.run.engine.device)
        outputs = self.run.engine(**inputs)
        right = [
            known[chosen]
            for known, chosen in zip(valid, outputs["chosen_B"].tolist(), strict=True)
            if known is not None
        ]
        numbers = [float(outputs["nats"]), float(outputs["tokens"]), sum(right), len(right)]
        return torch.tensor(numbers, dtype=torch.float64)

    def _batches(
        self, places: list[Place]
    ) -> Iterator[tuple[Batch, list[tuple[bool, ...] | None]]]:
        config, train = self.run.config.model, self.run.config.train
        rows = _read(places)
        while chunk := list(islice(rows, self.size)):
            samples = [
                stream.to_sample(
                    row, self.run.stage, train.seed, config.tokens_per_frame,
                    config.vision.dtype,
                )
                for row in chunk
            ]  # fmt: skip
            batch = self.collate(samples)
            pictures = batch.frame_mask_BK.sum(-1).tolist()
            yield (
                batch,
                [
                    sample.group.valid if gradable(sample.group.valid, count) else None
                    for sample, count in zip(samples, pictures, strict=True)
                ],
            )


def list_places(source: stream.Source) -> list[Place]:
    """Return where the exams of the validation split stand, in the order of the table."""
    return [
        Place(piece, row["exam_id"])
        for piece in source.pieces
        for row in parquet.read_row_group(piece.part_uri, piece.row_group, ["split", "exam_id"])
        if row["split"] == "validation"
    ]


def gradable(valid: tuple[bool, ...] | None, num_pictures: int) -> bool:
    """Return whether a choice among so many pictures can be right or wrong."""
    known = valid is not None and len(valid) == num_pictures
    return known and any(valid or ()) and not all(valid or ())


def _read(places: list[Place]) -> Iterator[dict[str, Any]]:
    for piece, group in groupby(places, key=lambda place: place.piece):
        wanted = {place.exam_id for place in group}
        for row in stream.read_exams(piece, "exam_id", wanted):
            yield {**row, "epoch": 0}
