"""Weights in the formats of LLaVA, LLaVA-Med and transformers' LLaVA, in small."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ultra.config import ConfigError, FusionConfig, LanguageConfig, VisionConfig
from ultra.model.language import LanguageBranch
from ultra.model.llava import start_projector
from ultra.model.vision import Fusion

WIDTH, CHANNELS = 24, 20

LINEAR = {"weight": (WIDTH, CHANNELS), "bias": (WIDTH,)}
MLP = {
    "0.weight": (WIDTH, CHANNELS), "0.bias": (WIDTH,),
    "2.weight": (WIDTH, WIDTH), "2.bias": (WIDTH,),
}  # fmt: skip


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def prefix(tensors: dict[str, Tensor], text: str) -> dict[str, Tensor]:
    return {f"{text}{name}": tensor for name, tensor in tensors.items()}


def make_fusion(projector: str, *others: str) -> Fusion:
    encoders = [{"name": name, "weights": "w", "width": CHANNELS} for name in ("clip", *others)]
    vision = VisionConfig.model_validate({"grid": 2, "encoders": encoders})
    config = FusionConfig.model_validate({"projector": projector, "normalise": False})
    return Fusion(vision, config, WIDTH)


def as_published(features: Tensor, own: dict[str, Tensor]) -> Tensor:
    """LLaVA's projector, written out: a linear layer, or two about a GELU; nothing before it."""
    if "weight" in own:
        return features @ own["weight"].T + own["bias"]
    hidden = functional.gelu(features @ own["0.weight"].T + own["0.bias"])
    return hidden @ own["2.weight"].T + own["2.bias"]


@pytest.fixture(scope="module")
def llama(random_backbones: Path) -> dict[str, Tensor]:
    return load_file(random_backbones / "language" / "model.safetensors")


@pytest.fixture
def write(random_backbones: Path, tmp_path: Path) -> Callable[..., Path]:
    """A folder with tensors under LLaVA's names, in files and with a `config.json` as told."""

    def write_folder(files: dict[str, dict[str, Tensor]], model_type: str, nested: bool) -> Path:
        folder = tmp_path / "published"
        shutil.copytree(random_backbones / "language", folder)
        (folder / "model.safetensors").unlink()
        settings = json.loads((folder / "config.json").read_text())
        if nested:
            settings = {"text_config": settings, "vision_config": {}, "image_token_index": 9}
        settings |= {"model_type": model_type, "architectures": ["Llava"]}
        (folder / "config.json").write_text(json.dumps(settings))
        for name, tensors in files.items():
            if name.endswith(".bin"):
                torch.save(tensors, folder / name)
            else:
                save_file(tensors, folder / name, metadata={"format": "pt"})
        if len(weights := [name for name in files if "-of-" in name]) > 1:
            index = {tensor: name for name in weights for tensor in files[name]}
            kind = "pytorch_model.bin" if weights[0].endswith(".bin") else "model.safetensors"
            (folder / f"{kind}.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": index})
            )
        return folder

    return write_folder


def tower(text: str = "model.vision_tower.vision_tower.vision_model.") -> dict[str, Tensor]:
    return prefix({"embeddings.class_embedding": torch.zeros(7)}, text)


@pytest.mark.parametrize(
    ("file", "text", "shapes"),
    [
        ("mm_projector.bin", "model.mm_projector.", LINEAR),
        ("mm_projector.bin", "mm_projector.", LINEAR),
        ("mm_projector.safetensors", "model.mm_projector.", MLP),
        ("non_lora_trainables.bin", "base_model.model.model.mm_projector.", MLP),
    ],
)
def test_a_projector_alone_is_read_by_name(
    tmp_path: Path, file: str, text: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    own = draw(shapes)
    named = prefix(own, text)
    if file.endswith(".bin"):
        torch.save({name: tensor.half() for name, tensor in named.items()}, tmp_path / file)
        own = {name: tensor.half().float() for name, tensor in own.items()}
    else:
        save_file(named, tmp_path / file)
    features = torch.randn(3, 4, CHANNELS)
    for uri in (tmp_path, tmp_path / file):  # the folder, or the file itself
        fusion = make_fusion("linear" if shapes is LINEAR else "mlp")
        start_projector(fusion, str(uri))
        torch.testing.assert_close(fusion({"clip": features}), as_published(features, own))


@pytest.mark.parametrize(
    ("layout", "model_type"),
    [("one", "llava"), ("shards", "llava_llama"), ("safetensors", "llava_llama")],
)
def test_a_whole_llava_gives_its_language_model_and_its_projector(
    write, llama, caplog, layout: str, model_type: str
) -> None:
    own = draw(MLP)
    rest = {**prefix(own, "model.mm_projector."), **tower()}
    # Of older LLaMAs, which kept what follows from the sizes.
    rest["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    first, second = dict(list(llama.items())[:9]), dict(list(llama.items())[9:])
    files = {
        "one": {"pytorch_model.bin": {**llama, **rest}},
        "shards": {
            "pytorch_model-00001-of-00002.bin": first,
            "pytorch_model-00002-of-00002.bin": {**second, **rest},
        },
        "safetensors": {
            "model-00001-of-00002.safetensors": {**first, **rest},
            "model-00002-of-00002.safetensors": second,
        },
    }[layout]
    folder = write(files, model_type, nested=False)
    check_whole(folder, llama, own)
    assert "left out the projector and the vision tower" in caplog.text
    assert "read the projector, left out" in caplog.text


@pytest.mark.parametrize(
    ("language", "projector", "vision"),
    [
        ("language_model.", "multi_modal_projector.", "vision_tower.vision_model."),
        (None, "model.multi_modal_projector.", "model.vision_tower.vision_model."),
    ],
)
def test_transformers_llava_gives_the_same_under_its_names(
    write, llama, language: str | None, projector: str, vision: str
) -> None:
    own = draw(MLP)
    named = {
        f"{projector}linear_{1 + int(name[0]) // 2}.{name[2:]}": tensor
        for name, tensor in own.items()
    }
    spoken = {
        f"{language}{name}" if language else name.replace("model.", "model.language_model.", 1): t
        for name, t in llama.items()
    }
    folder = write({"model.safetensors": {**spoken, **named, **tower(vision)}}, "llava", True)
    check_whole(folder, llama, own)


def check_whole(folder: Path, llama: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    branch = LanguageBranch(LanguageConfig(weights=str(folder), lora=None))
    read = branch.base.state_dict()
    assert read.keys() == llama.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in llama.items())
    assert branch.tokenizer.bos_token_id == 1
    fusion = make_fusion("mlp")
    start_projector(fusion, str(folder))
    features = torch.randn(5, 4, CHANNELS)
    torch.testing.assert_close(fusion({"clip": features}), as_published(features, own))


def test_with_a_second_encoder_only_clip_s_projector_starts_so(tmp_path: Path) -> None:
    torch.save(prefix(draw(LINEAR), "model.mm_projector."), tmp_path / "mm_projector.bin")
    fusion = make_fusion("linear", "sam")
    before = fusion.projectors["sam"].weight.detach().clone()
    start_projector(fusion, str(tmp_path))
    assert torch.equal(fusion.projectors["clip"].weight, draw(LINEAR)["weight"])
    assert torch.equal(fusion.projectors["sam"].weight, before)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (prefix(draw(MLP), "model.mm_projector."), r"\['0.bias', .*wants \['bias', 'weight'\]"),
        (
            prefix(draw({**LINEAR, "bias": (5,)}), "model.mm_projector."),
            r"bias is \(5,\), .*\(24,\)",
        ),
        (tower(), "has the projector tensors none"),
        (
            {**prefix(draw(LINEAR), "model.mm_projector."), "model.image_newline": torch.ones(3)},
            "unknown tensor model.image_newline; known: those of the projector, the vision tower",
        ),
    ],
)
def test_a_projector_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    torch.save(tensors, tmp_path / "mm_projector.bin")
    fusion = make_fusion("linear")
    before = {name: tensor.clone() for name, tensor in fusion.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        start_projector(fusion, str(tmp_path))
    assert all(torch.equal(fusion.state_dict()[name], value) for name, value in before.items())


class Surprise:
    """Something that a pickle would run."""

    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, capsys) -> None:
    torch.save({"model.mm_projector.weight": Surprise()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ConfigError, match=r"mm_projector.bin: no tensors by name to read"):
        start_projector(make_fusion("linear"), str(tmp_path))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("broken", [b"", b"no tensors"])
@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_broken_file_is_refused_by_name(tmp_path: Path, name: str, broken: bytes) -> None:
    (tmp_path / name).write_bytes(broken)
    with pytest.raises(ConfigError, match=f"{name}: no tensors by name to read"):
        start_projector(make_fusion("linear"), str(tmp_path))


def test_a_model_without_clip_has_no_place_for_it(tmp_path: Path) -> None:
    vision = VisionConfig.model_validate(
        {"grid": 2, "encoders": [{"name": "sam", "weights": "w", "width": 36}]}
    )
    fusion = Fusion(vision, FusionConfig(), WIDTH)
    with pytest.raises(ConfigError, match="it is for 'clip', which no encoder is"):
        start_projector(fusion, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "1 of its weights are missing, e.g. model.norm.weight"),
        ({"model.layers.0.extra": torch.ones(3)}, "unknown tensor model.layers.0.extra"),
        ({"model.image_newline": torch.ones(3)}, "unknown tensor model.image_newline"),
        ({"model.norm.weight": torch.ones(5)}, r"model.norm.weight is \(5,\), its .* \(24,\)"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused_by_name(
    write, llama, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {name: t for name, t in {**llama, **change}.items() if t is not None}
    folder = write({"model.safetensors": tensors}, "llava", nested=False)
    with pytest.raises(ConfigError, match=message):
        LanguageBranch(LanguageConfig(weights=str(folder), lora=None))


def test_the_norm_can_be_left_out_of_what_a_projector_reads() -> None:
    features = {"clip": torch.randn(2, 4, CHANNELS) * 3 + 1}
    fusion = make_fusion("linear")
    plain = fusion(features)
    fusion.normalise = True
    normed = fusion({"clip": functional.layer_norm(features["clip"], (CHANNELS,))})
    torch.testing.assert_close(fusion(features), normed)
    assert not torch.allclose(plain, normed, atol=1e-3)
