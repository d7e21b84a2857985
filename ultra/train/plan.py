"""A plan before the money: what each stage trains, whether it fits, how long it takes.

The model is built and run on torch's meta device, so no weight, no GPU and no exam is needed. What
the figures leave out: the CUDA context (about half a GiB) and what the allocator cannot use; text
that is padded; and everything but the encoders, the model and its teacher, the waiting for data and
for other workers among it, all of which `utilisation` stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ultra.config import PipelineConfig, StageConfig, TrainConfig
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_model
from ultra.model.strategies import find_strategy, num_visual_tokens
from ultra.model.trainable import PartCount, count_parts, select_trainable
from ultra.train.footprint import Footprint, Shape, encoder_flops, frame_bytes, measure
from ultra.train.loop import Teaching
from ultra.train.schedule import count_steps
from ultra.train.stage import build_teaching

STAGES = (0, 1, 2, 3)
"""Of ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000
"""Elements that DeepSpeed, with its defaults, sets aside for gradients on their way, and keeps of
gathered parameters under ZeRO-3 at most."""

History = Mapping[str, Sequence[tuple[int, float]]]
"""Metric -> (step over all stages, value), as `tracking.read_history` returns it."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan cannot know.

    Attributes:
        exams: of the training split.
        frames: of a mean exam.
        text_tokens: of a mean conversation, and of its findings.
        gpu_memory: GiB of each GPU.
        utilisation: share of `tflops` that training reaches.
        tflops: peak of a GPU at the precision, in 10^12 operations a second.
    """

    exams: int = 20_000
    frames: int = 9
    text_tokens: int = 300
    gpu_memory: float = 80.0
    utilisation: float = 0.35
    tflops: float = 312.0


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


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage.

    Attributes:
        parts: parameters, and whether they train.
        memory: under each stage of ZeRO.
        tokens: that the language model reads of an exam.
        flops: an exam takes with features from the cache.
        flops_from_pixels: an exam takes where the encoders run in training.
        samples: exams of the whole stage, each as often as it comes.
        hours: with features from the cache.
        hours_from_pixels: where the encoders run in training.
        measured_utilisation: of the last run; None without one.
    """

    name: str
    parts: tuple[PartCount, ...]
    memory: tuple[Memory, ...]
    tokens: int
    flops: float
    flops_from_pixels: float
    samples: int
    hours: float
    hours_from_pixels: float
    measured_utilisation: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages, and the feature cache.

    Attributes:
        zero: the stage of ZeRO that is configured.
        longest_tokens: of a row, for which memory is given.
        longest_frames: of an exam, for which memory is given.
        encode_flops: of all frames of an exam.
        encode_hours: to fill the cache, on as many GPUs as train.
        cache_frame_bytes: features of a picture.
        cache_bytes: features of all exams.
    """

    name: str
    workers: int
    zero: int
    precision: str
    micro_batch_size: int
    longest_tokens: int
    longest_frames: int
    assumptions: Assumptions
    stages: tuple[StagePlan, ...]
    encode_flops: int
    encode_hours: float
    cache_frame_bytes: int
    cache_bytes: int


def make_plan(
    config: PipelineConfig, assumptions: Assumptions, history: History | None = None
) -> Plan:
    """Return the plan of both stages.

    Args:
        config: the whole tree; its weights may be missing where it names architectures.
        assumptions: what it cannot know.
        history: of the last training run, for what it measured.

    Raises:
        ConfigError: for a model of which nothing is known.
    """
    train, vision = config.train, config.model.vision
    strategy = find_strategy(config.model)
    pictures = strategy.num_pictures(assumptions.frames)
    encode_flops = pictures * sum(encoder_flops(e, vision.grid) for e in vision.encoders)
    model = outline_model(config.model).to(getattr(torch, train.precision))
    with torch.device("meta"):
        teaching = build_teaching(config, model, None)
    stages, offset = [], 0
    for stage in train.stages:
        select_trainable(model, stage.trainable)
        steps = count_steps(stage, assumptions.exams, train.batch_size)
        span = range(offset, offset + steps)
        stages.append(
            _plan_stage(config, stage, model, teaching, assumptions, span, encode_flops, history)
        )
        offset += steps
    return Plan(
        name=config.name,
        workers=train.num_workers,
        zero=train.zero.stage,
        precision=train.precision,
        micro_batch_size=train.micro_batch_size,
        longest_tokens=config.model.language.max_length,
        longest_frames=config.data.max_frames,
        assumptions=assumptions,
        stages=tuple(stages),
        encode_flops=encode_flops,
        encode_hours=_hours(assumptions.exams * encode_flops, train.num_workers, assumptions),
        cache_frame_bytes=frame_bytes(vision),
        cache_bytes=assumptions.exams * pictures * frame_bytes(vision),
    )


def _plan_stage(
    config: PipelineConfig,
    stage: StageConfig,
    model: LlavaUltra,
    teaching: Teaching,
    assumptions: Assumptions,
    span: range,
    encode_flops: int,
    history: History | None,
) -> StagePlan:
    train, strategy = config.train, model.strategy
    mean = Shape(
        1,
        strategy.num_pictures(assumptions.frames),
        num_visual_tokens(config.model, assumptions.frames) + assumptions.text_tokens,
        assumptions.text_tokens,
    )
    longest = Shape(
        train.micro_batch_size,
        strategy.num_pictures(config.data.max_frames),
        config.model.language.max_length,
    )
    taken = measure(model, teaching, mean)
    taught = sum(teaching.due(step) for step in span) / len(span)
    flops = taken.flops - (1 - taught) * taken.teacher_flops
    parts, samples = tuple(count_parts(model)), len(span) * train.batch_size
    footprint = measure(model, teaching, longest)
    teacher = sum(p.nbytes for p in teaching.teacher.parameters()) if teaching.teacher else 0
    return StagePlan(
        name=stage.name,
        parts=parts,
        memory=tuple(plan_memory(parts, train, zero, footprint, teacher) for zero in STAGES),
        tokens=taken.tokens,
        flops=flops,
        flops_from_pixels=flops + encode_flops,
        samples=samples,
        hours=_hours(samples * flops, train.num_workers, assumptions),
        hours_from_pixels=_hours(
            samples * (flops + encode_flops), train.num_workers, assumptions
        ),
        measured_utilisation=_measured(history, span, flops, train.num_workers, assumptions),
    )


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
        activations=footprint.activations,
        logits=footprint.logits,
        features=footprint.features,
        step=share(4 * trained, 1),
    )


def _hours(flops: float, workers: int, assumptions: Assumptions) -> float:
    rate = workers * assumptions.tflops * 1e12 * assumptions.utilisation
    return flops / rate / 3600


def _measured(
    history: History | None, span: range, flops: float, workers: int, assumptions: Assumptions
) -> float | None:
    """Return the share of the GPUs' peak that the last run reached in a stage."""
    rates = [
        rate
        for step, rate in (history or {}).get("samples_per_second", ())
        if span.start < step <= span.stop
    ]
    if not rates:
        return None
    return sum(rates) / len(rates) * flops / (workers * assumptions.tflops * 1e12)
