"""A stage on one worker: from a configuration and a checkpoint to an engine, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ultra.config import PipelineConfig, StageConfig
from ultra.model import checkpoint
from ultra.model.checkpoint import Checkpoint, Progress
from ultra.model.integrity import check_architecture, check_base
from ultra.model.language import LanguageBranch
from ultra.model.llava import start_projector
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.teacher import AttentionTeacher
from ultra.model.trainable import count_parts
from ultra.train.loop import Schedule, Teaching
from ultra.train.progress import add_up
from ultra.train.schedule import count_steps, learning_rate

if TYPE_CHECKING:
    from ultra.train.zero import ZeroEngine


@dataclass(slots=True)
class StageRun:
    """A stage ready to take steps."""

    config: PipelineConfig
    stage: StageConfig
    model: LlavaUltra
    engine: ZeroEngine
    teaching: Teaching
    schedule: Schedule
    base: Mapping[str, Mapping[str, str]]


def begin_stage(
    config: PipelineConfig,
    progress: Progress,
    start: Checkpoint | None,
    num_exams: int,
    base: Mapping[str, Mapping[str, str]],
) -> StageRun:
    """Return the stage that `progress` stands in, with the weights of `start`.

    Args:
        config: the whole tree.
        progress: where to begin; its optimizer state is restored when it is within a stage.
        start: the checkpoint to go on from; None begins with fresh projectors.
        num_exams: exams of an epoch.
        base: what `describe_base` says of the configuration's weights.

    Raises:
        CheckpointError: when `start` is of another model.
    """
    from ultra.train.zero import ZeroEngine  # DeepSpeed: seconds to import, for workers only

    train = config.train.settle_precision(has_bfloat16=_all_have_bfloat16())
    stage = train.stages[progress.stage]
    if start is not None:
        check_architecture(start.uri, start.config.model, config.model)
        check_base(start.uri, start.base, base)
    torch.manual_seed(train.seed)
    model = _build_model(config, start)
    if train.gradient_checkpointing:
        model.language.base.gradient_checkpointing_enable({"use_reentrant": False})
    teaching = build_teaching(config, model, start)
    model.language.skip_idle_lora(trains="lora" in stage.trainable)
    engine = ZeroEngine(model, train, stage)
    if teaching.teacher is not None:
        teaching.teacher.to(engine.device)
        teaching.snapshot = partial(
            teaching.teacher.copy_from, model.fusion, model.language, engine.gather
        )
    if start is not None and progress.step:
        engine.restore(start.moments(), progress.step)
    num_steps = count_steps(stage, num_exams, train.batch_size)
    model.train()
    return StageRun(
        config,
        stage,
        model,
        engine,
        teaching,
        Schedule(
            first=progress.step,
            num_steps=num_steps,
            accumulation=train.gradient_accumulation,
            learning_rate=partial(learning_rate, num_steps=num_steps, stage=stage),
            offset=progress.total_step - progress.step,
            seed=train.seed,
        ),
        base,
    )


def write_stage(run: StageRun, folder: Path, progress: Progress, rank: int) -> None:
    """Write the checkpoint of a stage as it stands; every worker must call it, one writes."""
    weights, moments = run.engine.weights(), run.engine.moments()
    if rank == 0:
        teacher = run.teaching.teacher if run.teaching.taken else None
        checkpoint.write(
            folder,
            run.config,
            weights,
            run.model.language,
            run.base,
            teacher=None if teacher is None else teacher.state_dict(),
            moments=moments,
            progress=progress,
        )


def name_checkpoint(index: int, stage: StageConfig, step: int) -> str:
    """Return the name of the checkpoint at a step of a stage."""
    return f"{index + 1}-{stage.name}-{step:06d}"


def place_checkpoint(uri: str) -> tuple[int, int]:
    """Return stage and step by an address of such a name; what has another comes before all."""
    named = re.fullmatch(r"(\d+)-[a-z]+-(\d{6,})", uri.rpartition("/")[2])
    return (int(named[1]), int(named[2])) if named else (0, 0)


def describe_parts(run: StageRun) -> str:
    """Return the table of what a stage trains: parameters, whether they train, learning rate."""
    lines = [f"stage {run.stage.name}, in {run.engine.precision}"]
    lines += [f"  {'part':<12}{'parameters':>14}  learning rate"]
    for count in count_parts(run.model):
        if count.trainable != (count.part in run.stage.trainable):
            raise AssertionError(f"{count.part} trains: {count.trainable}, against the preset")
        scale = run.config.train.learning_rate_scales.get(count.part, 1.0)
        rate = f"{run.stage.learning_rate * scale:g}" if count.trainable else "frozen"
        lines.append(f"  {count.part:<12}{count.parameters:>14,}  {rate}")
    return "\n".join(lines)


def _all_have_bfloat16() -> bool:
    """Return whether every worker has a GPU made for bfloat16; every worker must call it."""
    cuda = torch.cuda
    has_it = cuda.is_available() and cuda.is_bf16_supported(including_emulation=False)
    return not add_up(torch.tensor([0.0 if has_it else 1.0])).any()


def _build_model(config: PipelineConfig, start: Checkpoint | None) -> LlavaUltra:
    if start is None:
        model = LlavaUltra(config.model, LanguageBranch(config.model.language))
        if config.model.fusion.weights:
            start_projector(model.fusion, config.model.fusion.weights)
        return model
    return checkpoint.load_model(start.uri, config=config.model)


def build_teaching(config: PipelineConfig, model: LlavaUltra, start: Checkpoint | None) -> Teaching:
    """Return what teaches a model's feature score, with the snapshot of `start` if it has one."""
    selection = config.model.selection
    kind = selection.teacher if model.strategy.scored else "none"
    if selection.redundancy_weight == 0:
        kind = "none"
    teaching = Teaching(kind, selection.teacher_warmup_steps)
    if kind == "attention":
        teaching.teacher = AttentionTeacher(config.model, model.language)
        state = start.teacher() if start is not None else None
        if state is not None:
            teaching.teacher.load_state_dict(state)
            teaching.taken = True
    return teaching
