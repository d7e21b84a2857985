"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterable

from ultra.model.trainable import PartCount
from ultra.train.memory import Memory
from ultra.train.plan import History, Plan, StagePlan

COLUMNS = (
    "weights", "gradients", "optimizer", "teacher", "buffers", "activations", "logits", "features",
    "step", "total",
)  # fmt: skip


def describe(plan: Plan, history: History) -> str:
    """Return the plan as lines.

    Args:
        plan: what is planned.
        history: of the last run of the same configuration; empty without one.
    """
    known, longest = plan.assumptions, plan.longest
    precision, again = plan.precision, "with" if plan.gradient_checkpointing else "without"
    if plan.assumes_precision:
        why = "on GPUs that have it" if precision == "bfloat16" else "without GPUs"
        precision = f"{precision} (what auto is {why})"
    return "\n".join(
        [
            f"{plan.name}: {plan.workers} workers, ZeRO-{plan.zero}, {precision}",
            f"assuming {known.exams:,} exams of {known.frames} frames and {known.text_tokens} "
            f"tokens of text, GPUs of {known.gpu_memory:g} GiB and {known.tflops:g} TFLOP/s, "
            f"{known.utilisation:.0%} of it used",
            f"memory is for micro-batches of {longest.samples}, of the longest samples: "
            f"{longest.tokens:,} tokens, pictures {longest.pictures}; {again} gradient "
            "checkpointing",
            "total is what is held, and the larger of what a pass keeps (activations, logits, "
            "features) and the step's float32 gradients; CUDA's own, about half a GiB, comes on "
            "top, and without the feature cache encoders of "
            f"{plan.encoder_bytes / 2**30:.2f} GiB and what they compute",
            *(line for stage in plan.stages for line in _describe_stage(plan, stage, history)),
            "",
            f"feature cache: {plan.frame_bytes / 2**20:.2f} MiB a frame, "
            f"{plan.cache_bytes / 2**30:,.1f} GiB in all; filled once with "
            f"{plan.encode_flops / 1e12:.2f} TFLOP an exam, {plan.encode_hours():.2f} hours",
        ]
    )


def _describe_stage(plan: Plan, stage: StagePlan, history: History) -> list[str]:
    measured = plan.measured_utilisation(stage, history)
    pixels = (stage.flops + plan.encode_flops) / 1e12
    cached, uncached = (plan.stage_hours(stage, cached=cached) for cached in (True, False))
    return [
        "",
        f"stage {stage.name}",
        f"  trains       {_list_parts(part for part in stage.parts if part.trainable)}",
        f"  frozen       {_list_parts(part for part in stage.parts if not part.trainable)}",
        f"  an exam      {stage.tokens:,} tokens, {stage.flops / 1e12:.2f} TFLOP with the feature "
        f"cache, {pixels:.2f} without",
        f"  hours        {cached:.2f} with the feature cache, {uncached:.2f} without, for "
        f"{stage.samples:,} samples in {stage.steps:,} steps",
        f"  utilisation  {plan.assumptions.utilisation:.1%} planned, measured in the last run: "
        f"{'none' if measured is None else f'{measured:.1%}'}",
        f"  {'GiB a GPU':<10}" + "".join(f"{column:>12}" for column in COLUMNS),
        *(
            _describe_memory(plan, memory, checkpointed)
            for memory, checkpointed in zip(stage.memory, stage.checkpointed, strict=True)
        ),
    ]


def _describe_memory(plan: Plan, memory: Memory, checkpointed: Memory) -> str:
    values = "".join(f"{getattr(memory, column) / 2**30:>12.2f}" for column in COLUMNS)
    notes = ["configured"] if memory.zero == plan.zero else []
    if not plan.fits(memory):
        notes.append(f"does not fit {plan.assumptions.gpu_memory:g} GiB under ZeRO-{memory.zero}")
        if plan.fits(checkpointed):
            notes.append(f"train.gradient_checkpointing makes it {checkpointed.total / 2**30:.2f}")
    return f"  {f'ZeRO-{memory.zero}':<10}{values}  {', '.join(notes)}".rstrip()


def _list_parts(parts: Iterable[PartCount]) -> str:
    return ", ".join(f"{part.part} {part.parameters:,}" for part in parts) or "nothing"
