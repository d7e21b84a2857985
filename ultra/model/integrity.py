"""Whether a checkpoint is whole, and whether it is of the model that is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultra.config import InputError, ModelConfig


class CheckpointError(InputError, ValueError):
    """A folder that is no usable checkpoint; the message names it and what is wrong."""


def list_sizes(folder: Path) -> dict[str, int]:
    """Return path -> bytes of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def check_whole(uri: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise when a file of a checkpoint is missing, or has other than its bytes.

    Raises:
        CheckpointError: naming the checkpoint and the file.
    """
    found = list_sizes(folder)
    for name, size in sizes.items():
        if name not in found:
            raise CheckpointError(f"{uri}: {name} is missing")
        if found[name] != size:
            raise CheckpointError(f"{uri}: {name} has {found[name]} bytes, it was written {size}")


def check_architecture(uri: str, theirs: ModelConfig, wanted: ModelConfig) -> None:
    """Raise when a checkpoint is of another model than the configuration's.

    A checkpoint without LoRA may be the start of one with it.

    Raises:
        CheckpointError: naming the checkpoint, the first key that differs and both values.
    """
    found, expected = _shape(theirs), _shape(wanted)
    if theirs.language.lora is None:
        del found["language.lora"]
    for key, value in found.items():
        if value != expected[key]:
            raise CheckpointError(
                f"{uri}: a checkpoint of another model: its model.{key} is {value}, the "
                f"configuration's {expected[key]}"
            )


def check_base(
    uri: str, theirs: Mapping[str, Mapping[str, str]], wanted: Mapping[str, Mapping[str, str]]
) -> None:
    """Raise when a checkpoint stands on other base weights, wherever either lie.

    Args:
        uri: the checkpoint.
        theirs: what its `base.json` says.
        wanted: what `describe_base` says of the configuration.

    Raises:
        CheckpointError: naming the checkpoint and the weights.
    """
    for name, weights in theirs.items():
        expected = wanted[name]
        if weights["sha256"] != expected["sha256"]:
            raise CheckpointError(
                f"{uri}: stands on {name} weights with digest {weights['sha256'][:12]}, those at "
                f"{expected['uri']} have {expected['sha256'][:12]}"
            )


def _shape(model: ModelConfig) -> dict[str, Any]:
    """Return what decides which tensors there are and what features mean; digests say the rest."""
    lora = model.language.lora
    return {
        "vision.grid": model.vision.grid,
        "vision.encoders": [
            {"name": e.name, "width": e.width, "layer": e.layer, "pool": e.pool}
            for e in model.vision.encoders
        ],
        "fusion.projector": model.fusion.projector,
        "selection.pool": model.selection.pool,
        "language.lora": lora and lora.model_dump(exclude={"dropout"}),
    }
