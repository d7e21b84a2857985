"""A plan before the money: what each stage trains, whether it fits, how long it takes.

The model is built and run on torch's meta device, so no weight, no GPU and no exam is needed. What
the figures leave out: the CUDA context (about half a GiB) and what the allocator cannot use; text
that is padded; and everything but the encoders, the model and its teacher, the waiting for data and
for other workers among it, all of which `utilisation` stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ultra.config import PipelineConfig, StageConfig
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_model
from ultra.model.strategies import num_visual_tokens
from ultra.model.trainable import PartCount, count_parts, select_trainable
from ultra.train.footprint import (
    Shape,
    compute_again,
    frame_bytes,
    measure,
    measure_both,
    measure_encoder,
)
from ultra.train.loop import Teaching
from ultra.train.memory import Memory, plan_memory
from ultra.train.schedule import count_steps
from ultra.train.stage import build_teaching

History = Mapping[str, Sequence[tuple[int, float]]]
"""Metric -> (step over all stages, value), as `tracking.read_history` returns it."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a plan cannot know.

    Attributes:
        exams: of the training split.
        frames: of a mean exam.
        text_tokens: of a mean conversation, and of its findings.
        conversations: of a mean exam, for stages that train on all of them.
        gpu_memory: GiB of each GPU.
        utilisation: share of `tflops` that training reaches.
        tflops: peak of a GPU at the precision, in 10^12 operations a second.
    """

    exams: int = 20_000
    frames: int = 9
    text_tokens: int = 300
    conversations: int = 6
    gpu_memory: float = 80.0
    utilisation: float = 0.35
    tflops: float = 312.0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """A stage.

    Attributes:
        parts: parameters, and whether they train.
        memory: under each stage of ZeRO.
        checkpointed: the same with gradient checkpointing, whether it is configured or not.
        tokens: that the language model reads of an exam.
        flops: an exam takes, its features from the cache, with what gradient checkpointing
            computes again where it is configured; a mean over the stage's steps, of which
            those before the teacher's warm-up ends have no teacher.
        first_step: counted over all stages.
        steps: of the stage.
        samples: exams of the stage, each as often as it comes.
    """

    name: str
    parts: tuple[PartCount, ...]
    memory: tuple[Memory, ...]
    checkpointed: tuple[Memory, ...]
    tokens: int
    flops: float
    first_step: int
    steps: int
    samples: int


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages, and the feature cache.

    Attributes:
        zero: the stage of ZeRO that is configured.
        precision: that is computed in.
        assumes_precision: whether that is taken for granted, as `train.precision` leaves it to the
            hardware: GPUs are taken to have bfloat16, workers without one compute in float32.
        gradient_checkpointing: whether it is configured.
        longest: samples that memory is given for.
        encode_flops: of all frames of an exam.
        encoder_bytes: weights of the encoders, on each GPU where they run in training.
        frame_bytes: features of a picture, in the cache.
        cache_bytes: features of all exams.
    """

    name: str
    workers: int
    zero: int
    precision: str
    assumes_precision: bool
    gradient_checkpointing: bool
    longest: Shape
    assumptions: Assumptions
    stages: tuple[StagePlan, ...]
    encode_flops: int
    encoder_bytes: int
    frame_bytes: int
    cache_bytes: int

    def hours(self, flops: float) -> float:
        """Return how long all GPUs together take for some operations."""
        rate = self.workers * self.assumptions.tflops * 1e12 * self.assumptions.utilisation
        return flops / rate / 3600

    def stage_hours(self, stage: StagePlan, *, cached: bool) -> float:
        """Return how long a stage takes, with features from the cache or with the encoders."""
        encode = 0 if cached else self.encode_flops
        return self.hours(stage.samples * (stage.flops + encode))

    def encode_hours(self) -> float:
        """Return how long the same GPUs take to fill the cache."""
        return self.hours(self.assumptions.exams * self.encode_flops)

    def fits(self, memory: Memory) -> bool:
        """Return whether a GPU has that much."""
        return memory.total <= self.assumptions.gpu_memory * 2**30

    def measured_utilisation(self, stage: StagePlan, history: History) -> float | None:
        """Return the share of the GPUs' peak that a run reached in a stage; None without one."""
        span = range(stage.first_step + 1, stage.first_step + stage.steps + 1)
        rates = [rate for step, rate in history.get("samples_per_second", ()) if step in span]
        if not rates:
            return None
        peak = self.workers * self.assumptions.tflops * 1e12
        return sum(rates) / len(rates) * stage.flops / peak

    def to_json(self, history: History) -> dict[str, Any]:
        """Return the plan with what follows from it, as JSON has it; sizes are in bytes."""
        stages = [
            {
                **asdict(stage),
                "memory": [self._judge(memory) for memory in stage.memory],
                "checkpointed": [self._judge(memory) for memory in stage.checkpointed],
                "flops_from_pixels": stage.flops + self.encode_flops,
                "hours": self.stage_hours(stage, cached=True),
                "hours_from_pixels": self.stage_hours(stage, cached=False),
                "measured_utilisation": self.measured_utilisation(stage, history),
            }
            for stage in self.stages
        ]
        return {**asdict(self), "stages": stages, "encode_hours": self.encode_hours()}

    def _judge(self, memory: Memory) -> dict[str, Any]:
        return {**asdict(memory), "total": memory.total, "fits": self.fits(memory)}


def make_plan(config: PipelineConfig, assumptions: Assumptions) -> Plan:
    """Return the plan of all stages.

    Args:
        config: the whole tree; its weights may be missing where it names architectures.
        assumptions: what it cannot know.

    Raises:
        ConfigError: for a model of which nothing is known.
    """
    assumes_precision = config.train.precision == "auto"
    train = config.train.settle_precision(has_bfloat16=config.train.gpus_per_worker > 0)
    config, vision = config.model_copy(update={"train": train}), config.model.vision
    model = outline_model(config.model).to(getattr(torch, train.precision))
    with torch.device("meta"):
        teaching = build_teaching(config, model, None)
    num_pictures = model.strategy.num_pictures
    pictures = num_pictures(assumptions.frames)
    longest = Shape(
        train.micro_batch_size,
        num_pictures(config.data.max_frames),
        config.model.language.max_length,
    )
    encoders = [measure_encoder(encoder, vision.grid) for encoder in vision.encoders]
    stages: list[StagePlan] = []
    for stage in train.stages:
        first = sum(before.steps for before in stages)
        stages.append(_plan_stage(config, stage, first, assumptions, longest, model, teaching))
    return Plan(
        name=config.name,
        workers=train.num_workers,
        zero=train.zero.stage,
        precision=train.precision,
        assumes_precision=assumes_precision,
        gradient_checkpointing=train.gradient_checkpointing,
        longest=longest,
        assumptions=assumptions,
        stages=tuple(stages),
        encode_flops=pictures * sum(flops for flops, _ in encoders),
        encoder_bytes=sum(size for _, size in encoders),
        frame_bytes=frame_bytes(vision),
        cache_bytes=assumptions.exams * pictures * frame_bytes(vision),
    )


def _plan_stage(
    config: PipelineConfig,
    stage: StageConfig,
    first_step: int,
    assumptions: Assumptions,
    longest: Shape,
    model: LlavaUltra,
    teaching: Teaching,
) -> StagePlan:
    train, visual = config.train, num_visual_tokens(config.model, assumptions.frames)
    conversations, room = 1, config.model.language.max_length - visual
    if stage.conversations == "all":
        conversations = min(assumptions.conversations, max(room // assumptions.text_tokens, 1))
    mean = Shape(
        samples=1,
        pictures=model.strategy.num_pictures(assumptions.frames),
        tokens=visual + conversations * assumptions.text_tokens,
        findings=assumptions.text_tokens,
    )
    model.language.skip_idle_lora(trains="lora" in stage.trainable)
    select_trainable(model, stage.trainable)
    parts = tuple(count_parts(model))
    steps = count_steps(stage, assumptions.exams, train.batch_size)
    taught = sum(map(teaching.due, range(first_step, first_step + steps))) / steps
    with compute_again(model) if train.gradient_checkpointing else nullcontext():
        taken = measure(model, teaching, mean)
    most = measure_both(model, teaching, longest)
    teacher = sum(p.nbytes for p in teaching.teacher.parameters()) if teaching.teacher else 0
    plain, checkpointed = (
        tuple(plan_memory(parts, train, zero, footprint, teacher) for zero in range(4))
        for footprint in most
    )
    return StagePlan(
        name=stage.name,
        parts=parts,
        memory=checkpointed if train.gradient_checkpointing else plain,
        checkpointed=checkpointed,
        tokens=taken.tokens,
        flops=taken.flops - (1 - taught) * taken.teacher_flops,
        first_step=first_step,
        steps=steps,
        samples=steps * train.batch_size,
    )
