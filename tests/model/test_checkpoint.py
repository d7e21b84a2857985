"""A written checkpoint gives back the model, tensor for tensor, and refuses what is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ultra.config import parse
from ultra.model import checkpoint
from ultra.model.checkpoint import CheckpointError
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra


def test_written_and_read_back_is_the_same(random_config, random_checkpoint) -> None:
    model = checkpoint.load_model(random_checkpoint)
    torch.manual_seed(1)
    original = LlavaUltra(random_config.model, LanguageBranch(random_config.model.language))
    for name, parameter in original.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    expected = original.state_dict()
    loaded = model.state_dict()
    assert expected.keys() == loaded.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, loaded[name]), name
    assert checkpoint.read(random_checkpoint).config == random_config


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": {"pool": "attention", "teacher_temperature": 0.5}},
        {"fusion": {"projector": "mlp", "alpha": 1.0}},
        {"vision": {"encoders": ["clip"]}},
        {"vision": {"encoders": ["sam"]}},
        {"vision": {"encoders": ["sam", "clip"]}},
    ],
)
def test_every_variant_of_the_connector_is_read_back(make_model, tmp_path, changes) -> None:
    if "vision" in changes:
        known = {e.name: e for e in make_model().config.vision.encoders}
        changes = {"vision": {"encoders": [known[n] for n in changes["vision"]["encoders"]]}}
    model = make_model(**changes)
    stages = [{"name": "align", "trainable": ["projectors", "scorer"], "steps": 1}]
    config = parse(
        {"name": "variant", "model": model.config.model_dump(), "train": {"stages": stages}}
    )
    state = {n: t for n, t in model.state_dict().items() if n.startswith(checkpoint.CONNECTOR)}
    base = checkpoint.describe_base(model.config)
    checkpoint.write(tmp_path, config, state, model.language, base)
    branch = checkpoint.load_visual(str(tmp_path))
    read = {f"fusion.{n}": t for n, t in branch.fusion.state_dict().items()}
    read |= {f"scorer.{n}": t for n, t in branch.scorer.state_dict().items()}
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    assert branch.config == model.config


def test_nothing_is_pickled(random_checkpoint) -> None:
    suffixes = {p.suffix for p in Path(random_checkpoint).rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".yaml", ".md"}


def test_the_encoder_side_needs_no_language_model_and_the_other_way_round(
    random_checkpoint, random_backbones, tmp_path, monkeypatch
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace(str(random_backbones / "language"), "/missing"))
    branch = checkpoint.load_visual(str(copy))
    assert {n for n, _ in branch.fusion.named_parameters()} >= {"alpha"}
    with pytest.raises(OSError, match="/missing"):
        checkpoint.load_language(str(copy))
    text = text.replace(str(random_backbones / "clip"), "/missing")
    (copy / "config.yaml").write_text(text)
    (copy / "connector.safetensors").unlink()
    assert checkpoint.load_language(str(copy)).width == 24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"format: 2\n", "format 2, this ultra reads 1"),
        ("config.yaml", b"format: 1\nnaem: x\n", "naem: unknown key"),
        ("connector.safetensors", b"\0" * 10, "connector.safetensors cannot be read"),
        ("base.json", b"{", "no checkpoint at"),
    ],
)
def test_broken_checkpoints_are_refused(
    random_checkpoint, tmp_path, name, content, message
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    (copy / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_visual(str(copy))


def test_other_base_weights_are_refused(random_checkpoint, tmp_path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    text = (copy / "base.json").read_text()
    digest = checkpoint.read(str(copy)).base["sam"]["sha256"]
    (copy / "base.json").write_text(text.replace(digest, "0" * 64))
    with pytest.raises(CheckpointError, match="stands on sam weights with digest 000000000000"):
        checkpoint.load_visual(str(copy))


def test_a_missing_one_is_named(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        checkpoint.read(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(torch.empty(0), "is empty"), (torch.tensor([float("nan")]), "NaN or infinity")],
)
def test_empty_and_nan_tensors_are_never_written(random_config, tmp_path, tensor, message) -> None:
    language = LanguageBranch(random_config.model.language)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.write(tmp_path, random_config, {"fusion.alpha": tensor}, language, {})
