"""A written checkpoint gives back the model, tensor for tensor, and refuses what is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ultra.config import parse
from ultra.model import checkpoint
from ultra.model.checkpoint import CheckpointError, Progress
from ultra.model.integrity import list_sizes
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
    connector = copy / "connector.safetensors"
    connector.write_bytes(b"\0" * connector.stat().st_size)
    assert checkpoint.load_language(str(copy)).width == 24


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"format: 3\n", "format 3, this ultra reads 1 and 2"),
        ("config.yaml", b"", "format None, this ultra reads"),
        ("config.yaml", b"format: 1\nnaem: x\n", "naem: unknown key"),
        ("connector.safetensors", b"", "connector.safetensors has 0 bytes, it was written"),
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


def test_what_is_missing_or_cut_short_is_named(random_checkpoint, tmp_path) -> None:
    sizes = list_sizes(Path(random_checkpoint))
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json"} < sizes.keys()
    for name in sizes.keys() - {"config.yaml", "base.json"}:
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(random_checkpoint, copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError, match=f"{copy}: {name} has {len(content) // 2} bytes"):
            checkpoint.read(str(copy))
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=f"{copy}: {name} is missing"):
            checkpoint.read(str(copy))


def test_bytes_that_are_no_tensors_are_refused(random_checkpoint, tmp_path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    file = copy / "connector.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"connector.safetensors cannot be read"):
        checkpoint.load_visual(str(copy))


def test_a_checkpoint_of_the_first_format_is_still_read(random_checkpoint, tmp_path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    config = checkpoint.read(str(copy)).config
    (copy / "config.yaml").write_text(f"format: 1\n{config.to_yaml()}")
    assert checkpoint.read(str(copy)).config == config


def test_a_final_checkpoint_has_no_training_to_go_on_with(random_checkpoint, tmp_path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    config = checkpoint.read(str(copy)).config
    progress = Progress(1, 4, 9, 2, ((2, "a"),), best=1.5, stale=1)
    checkpoint.amend(copy, config, progress)
    assert checkpoint.read(str(copy)).progress() == progress
    checkpoint.amend(copy, config, None)
    assert not (copy / "training").exists()
    with pytest.raises(CheckpointError, match="holds no state of training"):
        checkpoint.read(str(copy)).progress()


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
