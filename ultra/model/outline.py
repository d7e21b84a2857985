"""Models as torch's meta device has them: every shape and no value, whatever their size.

What they are made of is read beside the weights where those are at hand, and else from the
architecture that the configuration names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ultra import storage
from ultra.config import ConfigError, EncoderConfig, InputError, LanguageConfig, ModelConfig
from ultra.model import llava
from ultra.model.dinov2 import MODEL_TYPES
from ultra.model.encoders import find_encoder
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.pretrained import first_line, split_gguf
from ultra.model.sam import make_sam_encoder, read_sam_size, read_sam_weights
from ultra.model.vision_encoder import count_layers

ATTENTION = "outline"
"""Name, for transformers, of attention by a fused kernel that needs no values to be chosen."""


def outline_model(config: ModelConfig) -> LlavaUltra:
    """Return all that trains, as `LlavaUltra` builds it, on the meta device.

    Raises:
        ConfigError: for a language model of which nothing is known.
    """
    language = config.language
    with torch.device("meta"):
        return LlavaUltra(config, LanguageBranch(language, opened=_outline_language(language)))


def outline_encoder(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    """Return what is computed of an encoder, on the meta device, and the side of its input.

    Args:
        config: names the encoder and its weights.
        grid: visual tokens along one side of a frame.

    Raises:
        ConfigError: for an encoder of which nothing is known.
    """
    find_encoder(config)
    if config.name not in OUTLINES:
        raise ConfigError(
            f"model.vision.encoders: no outline of {config.name!r}; there is one of: "
            f"{', '.join(OUTLINES)}"
        )
    with torch.device("meta"):
        return OUTLINES[config.name](config, grid)


def _outline_language(config: LanguageConfig) -> tuple[Any, Any]:
    """Return a model without values, and of its tokenizer what a forward pass reads."""
    from transformers import AutoModelForCausalLM

    settings = _settings("model.language", config)
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": _attend()}
    try:
        model = AutoModelForCausalLM.from_config(settings, **options)
    except ValueError as error:
        raise ConfigError(f"model.language: no language model: {first_line(error)}") from None
    return model, SimpleNamespace(bos_token_id=settings.bos_token_id)


def _outline_clip(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    from transformers import CLIPVisionModel

    settings = _settings(f"encoder {config.name}", config, "clip_vision_model")
    model = CLIPVisionModel._from_config(settings, attn_implementation=_attend())
    encoder = getattr(model, "vision_model", model).encoder
    encoder.layers = encoder.layers[: count_layers(config, len(encoder.layers))]
    return model, settings.image_size


def _outline_dinov2(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    from transformers import AutoModel

    settings = _settings(f"encoder {config.name}", config, *MODEL_TYPES)
    model = AutoModel.from_config(settings, attn_implementation=_attend())
    model.encoder.layer = model.encoder.layer[: count_layers(config, len(model.encoder.layer))]
    model.layernorm = nn.Identity()
    return model, grid * settings.patch_size


def _outline_sam(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    where = f"encoder {config.name}"
    path = _local(config.weights)
    try:
        if path is not None:
            size = read_sam_size(read_sam_weights(path))
        else:
            size = _read_architecture(where, config)
            del size["model_type"]
        model = make_sam_encoder(**size)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: no SAM: {first_line(error)}") from None
    return model, int(model.img_size)


OUTLINES: dict[str, Callable[[EncoderConfig, int], tuple[nn.Module, int]]] = {
    "clip": _outline_clip,
    "dinov2": _outline_dinov2,
    "sam": _outline_sam,
}
"""Name of an encoder -> what makes its outline."""


def _settings(where: str, config: EncoderConfig | LanguageConfig, *kinds: str) -> Any:
    """Return transformers' configuration of a model, from its weights or its architecture.

    Raises:
        ConfigError: when there is none, or its model type is not among `kinds`, if any are given.
    """
    from transformers import AutoConfig

    path = _local(config.weights)
    try:
        if path is not None and path.suffix == ".gguf":
            folder, extra = split_gguf(path)
            return AutoConfig.from_pretrained(folder, **extra)
        raw = _read_config_json(config.weights) or _read_architecture(where, config)
        if isinstance(config, LanguageConfig):
            raw = llava.text_settings(raw)
        elif "vision_config" in raw:  # of CLIP with its text side
            raw = {"model_type": "clip_vision_model", **raw["vision_config"]}
        if kinds and raw.get("model_type") not in kinds:
            raise ConfigError(
                f"{where}: {raw.get('model_type')} where one of {', '.join(kinds)} is wanted"
            )
        return AutoConfig.for_model(**raw)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise ConfigError(f"{where}: no model to outline: {first_line(error)}") from None


def _local(weights: str) -> Path | None:
    """Return where weights are on this machine, if anywhere; none is fetched for its size."""
    if "://" in weights:
        return None
    try:
        return storage.fetch(weights)
    except storage.StorageError:
        return None


def _read_config_json(weights: str) -> dict[str, Any] | None:
    try:
        read: dict[str, Any] = json.loads(storage.read_bytes(storage.join(weights, "config.json")))
    except storage.StorageError:
        return None
    return read


def _read_architecture(where: str, config: EncoderConfig | LanguageConfig) -> dict[str, Any]:
    name = config.architecture
    shipped = resources.files("ultra") / "presets" / "architectures"
    path: Any = Path(name) if name.endswith(".json") else shipped / f"{name}.json"
    if not name or not path.is_file():
        known = ", ".join(sorted(p.name.removesuffix(".json") for p in shipped.iterdir()))
        asked = f"no architecture {name!r}" if name else "and no architecture is named"
        raise ConfigError(
            f"{where}: nothing to read at {config.weights}, {asked}; known: {known}; "
            "or give a transformers config.json"
        )
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _attend() -> str:
    """Return what transformers calls `_fused_attention`, made known to it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _fused_attention)
    return ATTENTION


def _fused_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Attend as a fused kernel does, which keeps no attention map.

    torch chooses a kernel by the device, and for the meta device the one that keeps everything.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        is_causal=causal,
        scale=scaling,
    )[0]
    return out.transpose(1, 2).contiguous(), None
