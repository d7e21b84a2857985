"""The plan, against what small runs really keep, and against arithmetic by hand."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ultra.config import PipelineConfig, load
from ultra.model.language import LanguageBranch, load_tokenizer
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_model
from ultra.model.trainable import count_parts, select_trainable
from ultra.train.footprint import Shape, measure
from ultra.train.plan import Memory, plan_memory
from ultra.train.stage import build_teaching

TOLERANCE = 0.05
"""What the plan may be off by: it knows of no padding, and so of no mask."""

TINY_SHAPE = Shape(samples=3, pictures=4, tokens=90)
MEDIUM_SHAPE = Shape(samples=2, pictures=3, tokens=130)
MEDIUM = {
    "vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
"""34 million parameters."""


def bytes_of(tensors: Iterable[Any]) -> int:
    """Of the tensors among some values, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(storages.values())


def make_batch(config: PipelineConfig, shape: Shape) -> dict[str, Any]:
    """Random inputs of a shape; the last row is shorter than the others, as in any batch."""
    generator = torch.Generator().manual_seed(1)
    vision = config.model.vision
    ids = torch.randint(3, 90, (shape.samples, shape.tokens), generator=generator)
    ids[:, 2 : 2 + vision.grid**2] = -1
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, -7:] = False
    labels = ids.clone()
    labels[:, : 2 + vision.grid**2] = -100
    return {
        "features": {
            e.name: torch.randn(
                shape.samples, shape.pictures, vision.grid**2, e.width, generator=generator
            ).half()
            for e in vision.encoders
        },
        "frame_mask_BK": torch.ones(shape.samples, shape.pictures, dtype=torch.bool),
        "input_ids_BS": ids,
        "labels_BS": labels.masked_fill(~mask, -100),
        "text_mask_BS": mask,
        "findings_ids_BS": ids[:, -5:],
        "findings_mask_BS": mask[:, -5:],
    }


def run_for_real(config: PipelineConfig, model: LlavaUltra, shape: Shape) -> dict[str, int]:
    """Take a step of the second stage with DeepSpeed and return the bytes of what it holds."""
    from ultra.train.zero import ZeroEngine

    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    engine = ZeroEngine(model, config.train, config.train.stages[1])
    inner = engine.engine.optimizer
    batch = make_batch(config, shape)
    model.train()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = engine(**batch)
    weights = [*model.parameters(), *(getattr(p, "ds_tensor", None) for p in model.parameters())]
    inputs = [*weights, *model.buffers(), *batch["features"].values()]
    others = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    activations = bytes_of(t for t in kept if t.untyped_storage().data_ptr() not in others)
    kept.clear()
    engine.backward(outputs["loss"])
    if config.train.zero.stage == 3:
        gradients = [inner.grad_partitions_flat_buffer]
    elif config.train.zero.stage == 0:
        gradients = [p.grad for p in model.parameters()]
    else:
        gradients = [t for part in inner.averaged_gradients.values() for t in part or ()]
        gradients += [p.grad for p in model.parameters()]
    found = {"weights": bytes_of(weights), "gradients": bytes_of(gradients)}
    engine.step()
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups")
    groups = [group for name in names for group in getattr(inner, name, ())]
    masters = [t for g in groups for t in (g if isinstance(g, list) else [g])]
    states = [v for s in getattr(inner, "optimizer", inner).state.values() for v in s.values()]
    moments = bytes_of(t for t in states if isinstance(t, Tensor) and t.numel() > 1)
    own = {t.untyped_storage().data_ptr() for t in weights if isinstance(t, Tensor)}
    copies = bytes_of(t for t in masters if t.untyped_storage().data_ptr() not in own)
    engine.close()
    return {**found, "optimizer": copies + moments, "activations": activations}


def plan_alone(config: PipelineConfig, shape: Shape) -> Memory:
    """What the plan says of the same step."""
    model = outline_model(config.model).to(getattr(torch, config.train.precision))
    select_trainable(model, config.train.stages[1].trainable)
    with torch.device("meta"):
        teaching = build_teaching(config, model, None)
    footprint = measure(model, teaching, shape)
    return plan_memory(count_parts(model), config.train, config.train.zero.stage, footprint, 0)


def compare(config: PipelineConfig, model: LlavaUltra, shape: Shape) -> None:
    real, planned = run_for_real(config, model, shape), plan_alone(config, shape)
    parts = ("weights", "gradients", "optimizer")
    state = sum(getattr(planned, part) for part in parts)
    for name in (*parts, "activations"):
        print(f"{name:<12} planned {getattr(planned, name):>12,} measured {real[name]:>12,}")
    assert state == pytest.approx(sum(real[part] for part in parts), rel=TOLERANCE)
    assert planned.activations == pytest.approx(real["activations"], rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_tiny_preset_holds_what_was_planned(zero: int, precision: str) -> None:
    config = load(
        "tiny",
        [
            f"train.zero.stage={zero}", f"train.precision={precision}", "train.num_workers=1",
            "train.batch_size=12",  # one forward pass a step
            "model.language.lora.dropout=0.1",
        ],
    )  # fmt: skip
    model = LlavaUltra(config.model, LanguageBranch(config.model.language))
    compare(config, model, TINY_SHAPE)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("zero", [2, 3])
def test_a_medium_model_holds_what_was_planned(
    zero: int, whole: bool, random_backbones: Path, tmp_path: Path
) -> None:
    settings = LlamaConfig(**MEDIUM)
    settings.save_pretrained(tmp_path)
    trained = ["projectors", "alpha", "scorer", "language" if whole else "lora"]
    config = load(
        "tiny",
        [
            f"train.zero.stage={zero}", "train.num_workers=1", "train.batch_size=12",
            f"model.language.weights={tmp_path}", f"train.stages.1.trainable={trained}",
            *(["model.language.lora=null"] if whole else []),
        ],
    )  # fmt: skip
    opened = LlamaForCausalLM(settings), load_tokenizer(random_backbones / "language")
    model = LlavaUltra(config.model, LanguageBranch(config.model.language, opened=opened))
    compare(config, model, MEDIUM_SHAPE)
