"""What a GPU holds in training, under each stage of ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ultra.config import TrainConfig
from ultra.model.trainable import PartCount
from ultra.train.footprint import Footprint

REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Elements that DeepSpeed, with its defaults, sets aside for gradients on their way, and keeps of
gathered parameters under ZeRO-3 at most."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU under a stage of ZeRO.

    Attributes:
        zero: the stage.
        weights: of all that the engine holds, in the type it computes in.
        gradients: of what trains.
        optimizer: Adam's two moments, and float32 masters where they are not the weights.
        teacher: the attention teacher's snapshot, whole on every GPU.
        buffers: DeepSpeed's own.
        activations: kept for the backward pass, for the longest samples.
        logits: beside those.
        features: of the same samples, as they come in.
        step: float32 gradients while the parameters move, when a pass's own are gone.
    """

    zero: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    buffers: int
    activations: int
    logits: int
    features: int
    step: int

    @property
    def total(self) -> int:
        """The most at any moment."""
        held = self.weights + self.gradients + self.optimizer + self.teacher + self.buffers
        return held + max(self.activations + self.logits + self.features, self.step)


def plan_memory(
    parts: Sequence[PartCount], train: TrainConfig, zero: int, footprint: Footprint, teacher: int
) -> Memory:
    """Return the bytes on each GPU under a stage of ZeRO.

    Args:
        parts: parameters, and whether they train.
        train: workers, precision and offload.
        zero: the stage.
        footprint: of the longest samples that a worker takes at a time.
        teacher: bytes of its snapshot.
    """
    width = int(getattr(torch, train.precision).itemsize)
    everything = sum(part.parameters for part in parts)
    trained = sum(part.parameters for part in parts if part.trainable)

    def share(value: int, since: int) -> int:
        return -(-value // train.num_workers) if zero >= since else value

    # Without ZeRO float32 weights are their own masters; ZeRO copies its part of them all the same.
    masters = 4 if width < 4 or zero else 0
    optimizer = share((masters + 8) * trained, 1)
    buffers = REDUCE_BUCKET if zero else 0
    if zero == 3:
        buffers += min(everything, LIVE_PARAMETERS)
    return Memory(
        zero=zero,
        weights=share(width * everything, 3),
        gradients=share(width * trained, 2),
        optimizer=0 if zero and train.zero.offload == "cpu" else optimizer,
        teacher=teacher,
        buffers=width * buffers,
        activations=(footprint.partitioned_activations if zero == 3 else footprint.activations),
        logits=footprint.logits,
        features=footprint.features,
        step=share(4 * trained, 1),
    )
