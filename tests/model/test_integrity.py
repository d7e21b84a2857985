"""A checkpoint of another model is refused by name; one that fits is not."""

from __future__ import annotations

import pytest

from ultra.config import ModelConfig
from ultra.model.integrity import CheckpointError, check_architecture, check_base


def change(config: ModelConfig, path: str, value: object) -> ModelConfig:
    raw = config.model_dump()
    *parents, last = path.split(".")
    node = raw
    for key in parents:
        node = node[int(key)] if isinstance(node, list | tuple) else node[key]
    node[last] = value
    return ModelConfig.model_validate(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("vision.grid", 4, r"its model.vision.grid is 4, the configuration's 2"),
        ("vision.encoders.1.width", 9, "its model.vision.encoders is .*'width': 9"),
        ("vision.encoders.0.layer", -1, "its model.vision.encoders is .*'layer': -1"),
        ("fusion.projector", "mlp", "its model.fusion.projector is mlp, the .* linear"),
        ("selection.pool", "attention", "its model.selection.pool is attention, the .* max"),
        ("language.lora.rank", 4, "its model.language.lora is .*'rank': 4"),
    ],
)
def test_another_architecture_is_named(random_config, path, value, message) -> None:
    other = change(random_config.model, path, value)
    with pytest.raises(CheckpointError, match=f"runs/x: a checkpoint of another model: {message}"):
        check_architecture("runs/x", other, random_config.model)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("language.lora", None),  # a stage without LoRA may come before one with it
        ("language.max_length", 77),
        ("selection.temperature", 0.5),
        ("vision.encoders.0.weights", "elsewhere"),
    ],
)
def test_what_decides_no_tensor_may_differ(random_config, path, value) -> None:
    check_architecture("runs/x", change(random_config.model, path, value), random_config.model)


def test_other_base_weights_are_named_wherever_they_lie() -> None:
    theirs = {"language": {"uri": "a", "sha256": "1" * 64}}
    check_base("runs/x", theirs, {"language": {"uri": "b", "sha256": "1" * 64}})
    with pytest.raises(
        CheckpointError, match=r"runs/x: stands on language weights .* 1{12}, .* b "
    ):
        check_base("runs/x", theirs, {"language": {"uri": "b", "sha256": "2" * 64}})
