"""Rows of exams as the model's inputs, from cached features or from pixels.

Shapes: B samples, K frames of a group (padded) or the one picture composed of them, N of a batch,
T visual tokens, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ultra.data.collate import Collator
from ultra.data.stream import to_sample
from ultra.model.encoders import FrozenEncoders
from ultra.model.strategies import num_visual_tokens
from ultra.train.loop import Inputs
from ultra.train.stage import StageRun
from ultra.types import Batch

Row = Mapping[str, Any]
"""A row as `stream.read_window` yields it."""

ARRAYS = (
    "frame_mask_BK",
    "input_ids_BS",
    "labels_BS",
    "text_mask_BS",
    "conversation_BS",
    "findings_ids_BS",
    "findings_mask_BS",
)


def read_inputs(
    run: StageRun,
    steps: Iterable[Sequence[Row]],
    encoders: FrozenEncoders | None,
    used: Callable[[Batch], None],
) -> Iterator[Inputs]:
    """Yield the inputs of a stage on this worker, one item a forward pass.

    Args:
        run: the stage.
        steps: the worker's rows of each step, all at once, so that its forward passes can have
            rows of like lengths.
        encoders: encode the frames; None where the rows have features.
        used: called with every batch.
    """
    train, model, collate = run.config.train, run.config.model, collator_of(run)
    for rows in steps:
        samples = [
            to_sample(row, run.stage, train.seed, model.tokens_per_frame, model.vision.dtype)
            for row in rows
        ]
        for batch in collate.batches(samples, train.micro_batch_size):
            used(batch)
            yield to_inputs(batch, encoders, run.engine.device)


def collator_of(run: StageRun) -> Collator:
    """Return what pads the samples of a stage."""
    model = run.config.model
    language = model.language
    return Collator(
        run.model.language.tokenizer, language.template, partial(num_visual_tokens, model),
        language.max_length, run.model.strategy.num_pictures,
    )  # fmt: skip


def to_inputs(
    batch: Batch, encoders: FrozenEncoders | None, device: torch.device
) -> dict[str, Any]:
    """Return the keyword arguments of `LlavaUltra.forward` for a batch.

    Args:
        batch: with features, or with frames to encode.
        encoders: encode the frames; None where the batch has features.
        device: where the tensors go.
    """
    inputs: dict[str, Any] = {
        name: torch.from_numpy(getattr(batch, name)).to(device) for name in ARRAYS
    }
    if batch.features is not None:
        features = {name: torch.from_numpy(a).to(device) for name, a in batch.features.items()}
    else:
        assert encoders is not None, "a batch of pixels needs the encoders"
        features = encode_batch(batch, encoders, inputs["frame_mask_BK"])
    return {"features": features, **inputs}


def encode_batch(
    batch: Batch, encoders: FrozenEncoders, frame_mask_BK: Tensor
) -> dict[str, Tensor]:
    """Return encoder name -> (B, K, T, F) of a batch's frames, zero where there is none."""
    padded = {}
    for name, encoded_NTF in encoders.encode(batch.frames or ()).items():
        shape = (*frame_mask_BK.shape, *encoded_NTF.shape[1:])
        features_BKTF = encoded_NTF.new_zeros(shape)
        features_BKTF[frame_mask_BK.to(encoded_NTF.device)] = encoded_NTF
        padded[name] = features_BKTF.to(frame_mask_BK.device)
    return padded
