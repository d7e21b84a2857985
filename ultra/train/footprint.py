"""What one step takes, found by taking it without values: bytes kept, and operations.

The model is on torch's meta device. Its real forward and backward pass run there at their real
shapes, so what is counted follows the code, whatever strategy, teacher or LoRA it has.

Shapes: B samples, K pictures of a group, T visual tokens of a picture, F channels of an encoder,
S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ultra.config import EncoderConfig, VisionConfig
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_encoder
from ultra.train.loop import Teaching


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one forward pass.

    Attributes:
        samples: B.
        pictures: K.
        tokens: S, visual and text tokens of a row.
        findings: tokens of the findings that the teacher reads.
    """

    samples: int
    pictures: int
    tokens: int
    findings: int = 1


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one forward and backward pass takes.

    Attributes:
        tokens: that the language model reads in all rows.
        activations: bytes kept for the backward pass; neither parameters nor inputs.
        partitioned_activations: the same under ZeRO-3, whose linear layers keep their inputs, those
            of frozen ones too.
        logits: bytes of logits beside those kept: packed and unpacked in their own type, their
            float32 copy, and its gradient.
        features: bytes of the encoders' features that come in.
        flops: floating-point operations, two a multiplication, the teacher's included.
        teacher_flops: the teacher's share of them.
    """

    tokens: int
    activations: int
    partitioned_activations: int
    logits: int
    features: int
    flops: int
    teacher_flops: int


def measure(model: LlavaUltra, teaching: Teaching, shape: Shape) -> Footprint:
    """Return the footprint of a pass; what trains is what requires a gradient.

    Args:
        model: an outline, in the type it computes in.
        teaching: of the same model; its teacher teaches.
        shape: of the pass.
    """
    inputs = _inputs(model, shape)
    kept = _Kept(model, inputs["features"])
    logits: list[Tensor] = []
    hooks = [model.language.register_forward_hook(lambda _m, _inputs, out: logits.append(out))]
    hooks += [linear.register_forward_pre_hook(kept.add_input) for linear in _keeping(model)]
    model.train()
    with _every_value_counts(), _count() as counter:
        with torch.autograd.graph.saved_tensors_hooks(kept.add, lambda tensor: tensor):
            loss = model(**inputs)["loss"]
        forward = counter.get_total_flops()
        for hook in hooks:  # what is computed again is kept no longer than its layer needs it
            hook.remove()
        loss.backward()
        both = counter.get_total_flops()
    model.zero_grad(set_to_none=True)
    with _every_value_counts(), torch.no_grad(), _count() as counter:
        model(**teaching.extend(inputs, teaching.first))
    taught = counter.get_total_flops()
    return Footprint(
        tokens=logits[0].shape[:2].numel(),
        activations=sum(storage.nbytes() for storage in kept.found.values()),
        partitioned_activations=sum(
            storage.nbytes() for storage in (kept.found | kept.inputs).values()
        ),
        logits=logits[0].numel() * (2 * logits[0].element_size() + 4 + 4),
        features=sum(f.nbytes for f in inputs["features"].values()),
        flops=both + taught - forward,
        teacher_flops=taught - forward,
    )


def measure_both(
    model: LlavaUltra, teaching: Teaching, shape: Shape
) -> tuple[Footprint, Footprint]:
    """Return the footprints of a pass without and with gradient checkpointing.

    The latter's activations are the layers' inputs, what is kept outside the layers, and what one
    layer has when it is computed again: one at a time is, and all are alike.
    """
    plain = measure(model, teaching, shape)
    with compute_again(model):
        kept = measure(model, teaching, shape)

    def peak(name: str) -> int:
        within: int = getattr(plain, name) - getattr(kept, name)
        return int(getattr(kept, name)) - -within // len(model.language.layers)

    names = ("activations", "partitioned_activations")
    return plain, replace(kept, **{name: peak(name) for name in names})


@contextmanager
def compute_again(model: LlavaUltra) -> Iterator[None]:
    """Let a model have gradient checkpointing for a while."""
    model.language.base.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.language.base.gradient_checkpointing_disable()


def measure_encoder(config: EncoderConfig, grid: int) -> tuple[int, int]:
    """Return the operations an encoder takes for one picture, and the bytes of its weights."""
    module, side = outline_encoder(config, grid)
    with torch.no_grad(), _count() as counter:
        module(torch.empty(1, 3, side, side, device="meta"))
    return int(counter.get_total_flops()), sum(p.nbytes for p in module.parameters())


def frame_bytes(vision: VisionConfig) -> int:
    """Return the bytes of one picture's features, as the cache keeps them."""
    size = int(getattr(torch, vision.dtype).itemsize)
    return sum(vision.grid**2 * encoder.width * size for encoder in vision.encoders)


def _inputs(model: LlavaUltra, shape: Shape) -> dict[str, Any]:
    vision = model.config.vision
    dtype = getattr(torch, vision.dtype)
    rows = (shape.samples, shape.tokens)
    with torch.device("meta"):
        return {
            "features": {
                encoder.name: torch.empty(
                    shape.samples, shape.pictures, vision.grid**2, encoder.width, dtype=dtype
                )
                for encoder in vision.encoders
            },
            "frame_mask_BK": torch.ones(shape.samples, shape.pictures, dtype=torch.bool),
            "input_ids_BS": torch.zeros(rows, dtype=torch.long),
            "labels_BS": torch.zeros(rows, dtype=torch.long),
            "text_mask_BS": torch.ones(rows, dtype=torch.bool),
            "findings_ids_BS": torch.zeros(shape.samples, shape.findings, dtype=torch.long),
            "findings_mask_BS": torch.ones(shape.samples, shape.findings, dtype=torch.bool),
        }


def _keeping(model: LlavaUltra) -> Iterator[nn.Linear]:
    """Yield the linear layers whose inputs stay, under ZeRO-3, until the backward pass."""
    again: set[nn.Module] = set()
    if getattr(model.language.layers[0], "gradient_checkpointing", False):
        again = set(model.language.layers.modules())
    return (m for m in model.modules() if isinstance(m, nn.Linear) and m not in again)


def _count() -> FlopCounterMode:
    """Return a counter that knows attention as `outline` has it, beside what torch's own knows."""

    def forward(query: Any, key: Any, value: Any, *_args: Any, **_rest: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    def backward(_grad: Any, query: Any, key: Any, value: Any, *_args: Any, **_rest: Any) -> int:
        return 5 * forward(query, key, value) // 2  # five products of matrices where it has two

    ops = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops._scaled_dot_product_flash_attention_for_cpu: forward,
            ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class _Kept:
    """Storages that autograd keeps, each once; those of parameters and inputs are not counted."""

    def __init__(self, model: LlavaUltra, features: dict[str, Tensor]) -> None:
        own = [*model.parameters(), *model.buffers(), *features.values()]
        self.others = {_identity(tensor) for tensor in own}
        # Held, so that no later storage has the identity of one of them.
        self.found: dict[int, torch.UntypedStorage] = {}
        self.inputs: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        if _identity(tensor) not in self.others:
            self.found[_identity(tensor)] = tensor.untyped_storage()
        return tensor

    def add_input(self, module: nn.Linear, args: tuple[Tensor, ...]) -> None:
        read = args[0]
        differentiable = read.requires_grad or module.weight.requires_grad
        if differentiable and _identity(read) not in self.others:
            self.inputs[_identity(read)] = read.untyped_storage()


def _identity(tensor: Tensor) -> int:
    # A storage without values has no address of data; this is the object's own.
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _every_value_counts() -> Iterator[None]:
    """Let masks be without values: all of a group's pictures are real."""
    from torch.fx.experimental import _config

    with _config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
        yield
