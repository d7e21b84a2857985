"""Weights as LLaVA, LLaVA-Med and transformers' LLaVA publish them, taken over by name.

A folder of them is a language model in transformers' layout with a projector, and perhaps the
vision tower, beside it. The language model is read where `model.language.weights` names the folder,
and the projector where `model.fusion.weights` does, for a checkpoint of ultra keeps its projectors
itself and stands on its language model. What ultra has no use for is told and left out, what it
does not know is refused.

LLaVA's projector reads CLIP's features as they are: with `model.fusion.normalise` off, one encoder
and the same picture, ultra's visual tokens are LLaVA's. What differs is the picture: LLaVA crops it
(v1) or pads it on both sides (v1.5), ultra pads below and to the right.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ultra import storage
from ultra.config import ConfigError
from ultra.model.pretrained import first_line, load_with_report
from ultra.model.vision import Fusion

logger = logging.getLogger(__name__)

MODEL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
"""What their `config.json` calls a model -> what transformers calls its language model."""

ENCODER = "clip"
"""The encoder whose features their projectors read."""

PROJECTOR = re.compile(r"(?:base_model\.model\.)?(?:model\.)?mm_projector\.((?:\d+\.)?\w+)")
PROJECTOR_OF_TRANSFORMERS = re.compile(r"(?:model\.)?multi_modal_projector\.linear_([12])\.(\w+)")
PARTS = {
    "the projector": re.compile(rf"{PROJECTOR.pattern}|{PROJECTOR_OF_TRANSFORMERS.pattern}"),
    "the vision tower": re.compile(r"(?:base_model\.model\.)?(?:model\.)?vision_tower\..+"),
    "the language model": re.compile(
        r"(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?"
        r"(?:embed_tokens|layers|norm|lm_head)\..+"
    ),
}
"""Part -> names of its tensors."""

LANGUAGE_KEYS = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
"""transformers' LLaVA -> the names of the language model alone."""


def text_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language model's part of what a `config.json` holds; all of it for no LLaVA."""
    kind = MODEL_TYPES.get(settings.get("model_type", ""))
    if kind is None:
        return dict(settings)
    return {**settings.get("text_config", settings), "model_type": kind}


def is_llava(folder: Path) -> bool:
    """Return whether a local folder holds LLaVA's weights, by its `config.json`."""
    path = folder / "config.json"
    return path.is_file() and json.loads(path.read_text()).get("model_type") in MODEL_TYPES


def load_language(folder: Path, dtype: torch.dtype) -> Any:
    """Return the causal language model of a folder, its projector and vision tower left out.

    Raises:
        ConfigError: when it cannot be read, or a tensor is missing, unknown or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(
        **text_settings(json.loads((folder / "config.json").read_text()))
    )
    model, report = load_with_report(
        AutoModelForCausalLM, folder, dtype, config=settings, key_mapping=LANGUAGE_KEYS
    )
    _account_for(report["unexpected_keys"], f"{folder}", "the language model")
    return model


def start_projector(fusion: Fusion, uri: str) -> None:
    """Set the projector of CLIP's features to one that LLaVA or LLaVA-Med published.

    Args:
        fusion: holds the projector; those of other encoders stay as they are.
        uri: a file of tensors, or a folder with one among its files.

    Raises:
        ConfigError: when there is none, it does not fit, or a tensor is unknown.
    """
    if ENCODER not in fusion.projectors:
        raise ConfigError(f"model.fusion.weights: it is for {ENCODER!r}, which no encoder is")
    mine = fusion.projectors[ENCODER].state_dict()
    found: dict[str, Tensor] = {}
    path = storage.fetch(uri)
    for file in _tensor_files(path):
        found |= _read_projector(file)
        if mine.keys() <= found.keys():
            break
    if mine.keys() != found.keys():
        raise ConfigError(
            f"model.fusion.weights: {uri} has the projector tensors {sorted(found) or 'none'}, "
            f"model.fusion.projector wants {sorted(mine)}"
        )
    for name, tensor in found.items():
        if tensor.shape != mine[name].shape:
            raise ConfigError(
                f"model.fusion.weights: {uri}: projector {name} is {tuple(tensor.shape)}, "
                f"this model's is {tuple(mine[name].shape)}"
            )
    fusion.projectors[ENCODER].load_state_dict(found)


def _tensor_files(path: Path) -> list[Path]:
    """Return the files that may hold a projector, those made to hold nothing else first."""
    if path.is_file():
        return [path]
    files = [f for f in path.iterdir() if f.suffix in {".safetensors", ".bin"}]
    return sorted(files, key=lambda file: (file.stat().st_size, file.name))


def _read_projector(file: Path) -> dict[str, Tensor]:
    """Return the projector's tensors of a file under ultra's names; `0.weight`, or `weight`."""
    own, others = {}, []
    for name, tensor in _tensors(file):
        if match := PROJECTOR.fullmatch(name):
            own[match[1]] = tensor()
        elif match := PROJECTOR_OF_TRANSFORMERS.fullmatch(name):
            own[f"{2 * (int(match[1]) - 1)}.{match[2]}"] = tensor()
        else:
            others.append(name)
    _account_for(others, str(file), "the projector")
    return own


def _tensors(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the names of a file's tensors and what reads each; nothing is unpickled but tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    yield name, partial(opened.get_tensor, name)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in state.items():
                yield name, tensor.clone
    except (OSError, RuntimeError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(f"{file}: no tensors by name to read: {first_line(error)}") from None


def _account_for(names: Iterable[str], where: str, wanted: str) -> None:
    """Log what is left out of a file beside what was wanted and is read.

    Raises:
        ConfigError: for a tensor that is of no known part.
    """
    left = set()
    for name in names:
        part = next((part for part, known in PARTS.items() if known.fullmatch(name)), wanted)
        if part == wanted:
            raise ConfigError(f"{where}: unknown tensor {name}; known: those of {', '.join(PARTS)}")
        left.add(part)
    if left:
        logger.warning("%s: read %s, left out %s", where, wanted, " and ".join(sorted(left)))
