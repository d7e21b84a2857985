"""The presets: whole at their own size without a value, and as small twins that train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.exam_tables import make_exam
from ultra.config import PipelineConfig, load
from ultra.data import schema
from ultra.model import checkpoint
from ultra.model.outline import outline_encoder, outline_model
from ultra.model.trainable import count_parts, part_of, select_trainable

LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320
LAYER = 2 * 2 * 1024 + 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024
CLIP_L_224 = 1024 + 3 * 14 * 14 * 1024 + (16 * 16 + 1) * 1024 + 24 * LAYER + 2 * 2 * 1024
CLIP_L_336 = CLIP_L_224 + (24 * 24 - 16 * 16) * 1024
SAM_L = (
    1024 + 3 * 16 * 16 * 1024 + 64 * 64 * 1024 + 24 * LAYER
    + 2 * 64 * (20 * (2 * 14 - 1) + 4 * (2 * 64 - 1))  # relative positions of 64 channels
    + 1024 * 256 + 9 * 256 * 256 + 2 * 2 * 256  # the neck: two convolutions, two norms
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "llava-ultra-13b": {
        "language": LLAMA_13B,
        "projectors": (1024 + 1) * 5120 + (4096 + 1) * 5120,
        "encoders": {"clip": CLIP_L_224, "sam": SAM_L},
        "trained": (["projectors", "alpha", "scorer"], ["projectors", "alpha", "scorer", "lora"]),
    },
    "llava-ultra-7b": {
        "language": LLAMA_7B,
        "projectors": (1024 + 1) * 4096 + (4096 + 1) * 4096,
        "encoders": {"clip": CLIP_L_224, "sam": SAM_L},
        "trained": (["projectors", "alpha", "scorer"], ["projectors", "alpha", "scorer", "lora"]),
    },
    "llava-med-7b": {
        "language": LLAMA_7B,
        "projectors": (1024 + 1) * 4096,
        "encoders": {"clip": CLIP_L_224},
        "trained": (["projectors"], ["projectors", "language"]),
    },
    "llava-7b": {
        "language": LLAMA_7B,
        "projectors": (1024 + 1) * 4096 + (4096 + 1) * 4096,
        "encoders": {"clip": CLIP_L_336},
        "trained": (["projectors"], ["projectors", "language"]),
    },
    "qilin-med-vl-13b": {
        "language": LLAMA_13B,
        "projectors": (1024 + 1) * 5120,
        "encoders": {"clip": CLIP_L_336},
        "trained": (["projectors"], ["projectors", "language"]),
    },
}
"""What papers and model cards state, or what follows from the sizes they state."""

LORA_OF_A_LAYER = {  # rank 64: a factor on either side of each of the seven linear layers
    "llava-ultra-13b": 64 * (4 * (5120 + 5120) + 3 * (5120 + 13824)) * 40,
    "llava-ultra-7b": 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008)) * 32,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_are_stated(name: str) -> None:
    expected, config = PRESETS[name], load(name)
    model = outline_model(config.model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    counts = {count.part: count.parameters for count in count_parts(model)}
    assert counts["language"] == expected["language"]
    assert counts["projectors"] == expected["projectors"]
    assert counts.get("lora") == LORA_OF_A_LAYER.get(name)
    for encoder in config.model.vision.encoders:
        whole = encoder.model_copy(update={"layer": -1})  # all of the tower, and not what is read
        module, _ = outline_encoder(whole, config.model.vision.grid)
        assert sum(p.numel() for p in module.parameters()) == expected["encoders"][encoder.name]


def test_the_encoders_have_the_size_that_their_papers_round() -> None:
    assert CLIP_L_224 == 303_179_776  # "303 M"
    assert SAM_L == 308_278_272


@pytest.mark.parametrize("name", PRESETS)
def test_each_stage_trains_what_its_paper_trains(name: str) -> None:
    config = load(name)
    model = outline_model(config.model)
    for stage, trained in zip(config.train.stages, PRESETS[name]["trained"], strict=True):
        select_trainable(model, stage.trainable)
        assert [c.part for c in count_parts(model) if c.trainable] == trained


def make_twin(name: str, backbones: Path, root: Path, *more: str) -> PipelineConfig:
    """A preset with weights of a few thousand parameters, one worker and two steps a stage."""
    preset = load(name)
    overrides = [
        f"root={root}", "tracking.uri=''", "model.vision.grid=2",
        f"model.language.weights={backbones / 'language'}", "model.language.max_length=300",
        "train.num_workers=1", "train.batch_size=2", "train.micro_batch_size=2",
        "train.zero.stage=2", "model.selection.teacher_warmup_steps=1",
    ]  # fmt: skip
    small = {"clip": ("clip", 20), "sam": ("sam.pth", 36)}
    for index, encoder in enumerate(preset.model.vision.encoders):
        weights, width = small[encoder.name]
        path = f"model.vision.encoders.{index}"
        overrides += [f"{path}.weights={backbones / weights}", f"{path}.width={width}"]
    for index in range(len(preset.train.stages)):
        overrides += [f"train.stages.{index}.epochs=null", f"train.stages.{index}.steps=2"]
    return load(name, [*overrides, *more])


def rows_of(config: PipelineConfig) -> Iterator[dict[str, Any]]:
    """Exams with random features, for ever."""
    rng = np.random.default_rng(5)
    composes = config.model.selection.strategy == "composite"
    for number in cycle(range(5)):
        exam = make_exam(number)
        count = 1 if composes else len(exam.frames)
        features = {
            e.name: [
                rng.normal(size=(config.model.tokens_per_frame, e.width)).astype("f2").tobytes()
                for _ in range(count)
            ]
            for e in config.model.vision.encoders
        }
        yield {**schema.to_row(exam), "epoch": 0, "features": features}


@pytest.mark.parametrize("name", PRESETS)
def test_the_small_twin_of_a_preset_trains_both_stages(
    name: str, random_backbones: Path, tmp_path: Path
) -> None:
    from ultra.train.alone import fit_alone

    config = make_twin(name, random_backbones, tmp_path)
    final = fit_alone(config, rows_of(config), 5, tmp_path / "stages")
    whole = "language" in config.train.stages[1].trainable
    assert final.name == "2-instruct-000002"
    assert (final / "language").exists() == whole
    assert (final / "adapter").exists() != whole
    for number, stage in enumerate(config.train.stages, start=1):
        moments = checkpoint.read(str(final.parent / f"{number}-{stage.name}-000002")).moments()
        assert {part_of(name) for name in moments.masters} == set(stage.trainable)
        learnt = {part_of(name) for name, moment in moments.exp_avg.items() if moment.any()}
        assert learnt == set(stage.trainable)
    trained = checkpoint.load_model(str(final))
    assert all(bool(parameter.isfinite().all()) for parameter in trained.parameters())


def test_a_preset_goes_on_from_weights_that_llava_published(
    random_backbones: Path, tmp_path: Path
) -> None:
    from ultra.train.alone import fit_alone

    folder = tmp_path / "llava"
    shutil.copytree(random_backbones / "language", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "llava_llama"}))
    llama = load_file(folder / "model.safetensors")
    own = {
        "0.weight": torch.randn(24, 20), "0.bias": torch.randn(24),
        "2.weight": torch.randn(24, 24), "2.bias": torch.randn(24),
    }  # fmt: skip
    beside = {f"model.mm_projector.{name}": tensor for name, tensor in own.items()}
    save_file({**llama, **beside}, folder / "model.safetensors", metadata={"format": "pt"})
    still = [f"train.stages.{i}.learning_rate=1e-12" for i in range(2)]
    given = [f"model.language.weights={folder}", f"model.fusion.weights={folder}"]
    exact = ["train.precision=float32", "model.language.dtype=float32"]
    config = make_twin("llava-7b", random_backbones, tmp_path, *still, *given, *exact)
    final = fit_alone(config, rows_of(config), 5, tmp_path / "stages")
    for stage in ("1-align-000002", final.name):
        state = checkpoint.load_model(str(final.parent / stage)).state_dict()
        for name, tensor in own.items():
            torch.testing.assert_close(state[f"fusion.projectors.clip.{name}"], tensor)
        for name, tensor in llama.items():
            torch.testing.assert_close(state[f"language.model.{name}"], tensor)
