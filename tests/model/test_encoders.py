"""The frozen encoders together: one grid, one place per token, one cache key."""

from __future__ import annotations

import io
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.model.encoder_weights import (
    GRID,
    clip_config,
    dinov2_config,
    encoder_configs,
    make_sam_encoder,
    model_config,
    png,
    sam_config,
)
from ultra.config import ConfigError, load, parse
from ultra.model import checkpoint, encoders
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra, VisualBranch
from ultra.model.pictures import compose
from ultra.model.vision import Fusion


def brighten(height: int, width: int, row: int, column: int) -> tuple[bytes, bytes]:
    """A dark frame, and the same with one of the 4 x 4 grid's cells bright."""
    cell = max(height, width) // GRID
    frame = np.full((height, width, 3), 40)
    bright = frame.copy()
    bright[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 220
    return png(frame), png(bright)


@pytest.mark.parametrize(
    "pair", ["clip unshuffle", "clip avgpool", "clip dinov2", "dinov2 avgpool"]
)
@pytest.mark.parametrize(
    ("height", "width", "row", "column"),
    [(96, 96, 0, 1), (96, 96, 2, 3), (96, 96, 3, 0), (48, 96, 1, 3), (96, 48, 3, 1)],
)
def test_a_token_stands_for_the_same_place_in_both(
    weights, pair, height, width, row, column
) -> None:
    known = {
        "clip": clip_config(weights, layer=1),
        "dinov2": dinov2_config(weights, layer=1),
        "unshuffle": sam_config(weights / "sam.pth"),
        "avgpool": sam_config(weights / "sam.pth", pool="avgpool", width=9),
    }
    encoders = [known[name] for name in pair.split()]
    frozen = FrozenEncoders(model_config(weights, encoders=encoders))
    features = frozen.encode([brighten(height, width, row, column)])
    for name, (dark_TF, bright_TF) in features.items():
        moved_T = (bright_TF - dark_TF).norm(dim=-1)
        assert int(moved_T.argmax()) == GRID * row + column, name


def random_frames(count: int) -> list[bytes]:
    rng = np.random.default_rng(5)
    return [png(rng.integers(0, 256, (30 + 7 * i, 50, 3))) for i in range(count)]


WIDTHS = {"clip": 20, "dinov2": 28, "sam": 36}


@pytest.mark.parametrize("names", [*((name,) for name in WIDTHS), *permutations(WIDTHS, 2)])
def test_each_family_works_alone_and_beside_any_other(weights, normalise, names) -> None:
    known = encoder_configs(weights)
    config = model_config(weights, encoders=[known[name] for name in names])
    frozen = FrozenEncoders(config)
    frames = random_frames(3)
    features = frozen.encode([frames[:1], frames[1:]])
    assert {n: tuple(f.shape) for n, f in features.items()} == {
        n: (3, 16, WIDTHS[n]) for n in names
    }
    for name in names:  # a neighbour changes nothing
        alone = FrozenEncoders(model_config(weights, encoders=[known[name]])).encode([frames])
        torch.testing.assert_close(features[name], alone[name], rtol=1e-4, atol=1e-5)
    fusion = Fusion(config.vision, config.fusion, 24, embedding_std=0.5)
    assert (fusion.alpha is None) == (len(names) == 1)
    projected = [
        normalise(features[n]) @ fusion.projectors[n].weight.detach().double().numpy().T
        for n in names
    ]
    np.testing.assert_allclose(
        fusion(features).detach(), np.mean(projected, axis=0), rtol=1e-3, atol=1e-4
    )


def test_features_do_not_depend_on_the_chunks(weights) -> None:
    frozen = FrozenEncoders(model_config(weights))
    frames = random_frames(5)
    groups = [frames[:2], frames[2:3], frames[3:]]
    whole = frozen.encode(groups)
    assert {n: tuple(f.shape) for n, f in whole.items()} == {
        "clip": (5, 16, 20),
        "sam": (5, 16, 36),
    }
    for chunk in (1, 2, 5):
        parts = frozen.encode(groups, chunk=chunk)
        for name, features in whole.items():
            torch.testing.assert_close(parts[name], features, rtol=1e-4, atol=1e-5)


def test_features_have_the_type_of_the_config(weights) -> None:
    frozen = FrozenEncoders(model_config(weights, dtype="float16"))
    first, second, third = random_frames(3)
    as_numpy = frozen([[first], [second, third]])
    assert [len(group["sam"]) for group in as_numpy] == [1, 2]
    assert {f.dtype for group in as_numpy for f in group.values()} == {np.dtype("float16")}
    assert not any(p.requires_grad for e in frozen.encoders.values() for p in e.parameters())


def test_building_them_leaves_the_draws_of_training_alone(weights) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    FrozenEncoders(model_config(weights))
    assert torch.equal(torch.rand(2), expected)


def test_grey_and_palette_frames_are_read_as_rgb(weights) -> None:
    frozen = FrozenEncoders(model_config(weights))
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    frames = []
    for mode in ("L", "RGB", "P"):
        file = io.BytesIO()
        grey.convert(mode).save(file, "PNG")
        frames.append(file.getvalue())
    first, second, third = frozen.encode([frames])["clip"]
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)


def test_the_cache_key_follows_all_that_features_depend_on(weights, tmp_path) -> None:
    base = model_config(weights)
    clip, sam = base.vision.encoders
    dinov2 = dinov2_config(weights)
    torch.manual_seed(9)
    torch.save(make_sam_encoder().state_dict(), tmp_path / "other.pth")
    keys = [
        cache_key(config)
        for config in (
            base,
            model_config(weights, dtype="float16"),
            model_config(weights, encoders=(clip_config(weights, layer=-1), sam)),
            model_config(weights, encoders=(clip, sam_config(weights / "sam.pth", pool="avgpool"))),
            model_config(weights, encoders=(clip, sam_config(tmp_path / "other.pth"))),
            model_config(
                weights, encoders=(clip_config(weights, weights=str(weights / "whole-clip")), sam)
            ),
            model_config(weights, encoders=(clip,)),
            model_config(weights, encoders=(clip, dinov2)),
            model_config(weights, encoders=(clip, dinov2_config(weights, layer=-1))),
            model_config(weights, "composite"),
            model_config(weights, grid=2),
        )
    ]
    assert len(set(keys)) == len(keys)
    # Where the weights lie is no part of what they are.
    (tmp_path / "moved.pth").write_bytes((weights / "sam.pth").read_bytes())
    moved = model_config(weights, encoders=(clip, sam_config(tmp_path / "moved.pth")))
    assert cache_key(moved) == keys[0]
    # Nor is a strategy that shows frames as they are, or an option of another family.
    for strategy in ("first", "random", "each", "all", "mean"):
        assert cache_key(model_config(weights, strategy)) == keys[0]
    other = model_config(weights, encoders=(clip_config(weights, pool="avgpool"), sam))
    assert cache_key(other) == keys[0]


def test_a_composite_is_encoded_as_the_picture_it_is(weights) -> None:
    frames = random_frames(6)
    groups = [frames[:3], frames[3:4], frames[1:]]
    features = FrozenEncoders(model_config(weights, "composite")).encode(groups)
    plain = FrozenEncoders(model_config(weights))
    for index, group in enumerate(groups):
        alone = plain.encode([[png(compose(group))]])
        for name, (picture_TF,) in alone.items():
            torch.testing.assert_close(features[name][index], picture_TF, rtol=1e-4, atol=1e-5)
    assert len(features["clip"]) == 3


@pytest.mark.parametrize("use", [cache_key, FrozenEncoders])
def test_an_unknown_name_is_refused_with_those_that_are_known(weights, use) -> None:
    encoders = [clip_config(weights, name="clpi")]
    with pytest.raises(ConfigError) as caught:
        use(model_config(weights, encoders=encoders))
    message = "model.vision.encoders: unknown 'clpi'; allowed: clip, dinov2, sam"
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        use(model_config(weights, "fisrt"))
    allowed = "adaptive, first, random, each, all, mean, composite"
    message = f"model.selection.strategy: unknown 'fisrt'; allowed: {allowed}"
    assert str(caught.value) == message


def test_the_recipe_for_an_encoder(
    read_recipe, weights, tmp_path, monkeypatch, make_config, make_inputs
) -> None:
    """What CONTRIBUTING.md says, followed: from an entry to features, losses and a checkpoint."""
    monkeypatch.setattr(encoders, "ENCODERS", dict(encoders.ENCODERS))
    exec(read_recipe("class PatchEncoder"), {})
    kernel_FCPP = np.random.default_rng(6).normal(size=(10, 3, 7, 7)).astype(np.float32)
    save_file({"kernel": torch.from_numpy(kernel_FCPP)}, tmp_path / "patch.safetensors")
    patch = {"name": "patch", "weights": str(tmp_path / "patch.safetensors"), "width": 10}
    with pytest.raises(ConfigError, match="encoder patch: its weights give 10 channels"):
        FrozenEncoders(model_config(weights, encoders=[{**patch, "width": 11}]))

    # Its tokens, by hand: row 1 and column 3 of the grid, of pixels from -1 to 1.
    config = make_config()
    clip, _ = config.vision.model_dump()["encoders"]
    config = make_config(vision={"encoders": [clip, patch], "dtype": "float32"})
    image = np.random.default_rng(8).integers(0, 256, (14, 14, 3))
    tokens_TF = FrozenEncoders(config)([[png(image)]])[0]["patch"][0]
    cell_CPP = image[7:, 7:].transpose(2, 0, 1) / 127.5 - 1
    assert tokens_TF.shape == (4, 10)
    expected = (kernel_FCPP * cell_CPP).sum((1, 2, 3))
    np.testing.assert_allclose(tokens_TF[3], expected, rtol=1e-3, atol=1e-3)

    model = LlavaUltra(config, LanguageBranch(config.language)).train()
    inputs = make_inputs()
    inputs["features"]["patch"] = torch.randn(*inputs["features"].pop("sam").shape[:3], 10)
    model(**inputs)["loss"].backward()
    assert model.fusion.projectors["patch"].weight.grad.any()
    assert model.fusion.alpha.grad.any()
    whole = {**load("tiny").model_dump(), "model": config.model_dump()}
    weights = {n: p for n, p in model.named_parameters() if n.startswith(checkpoint.CONNECTOR)}
    base = checkpoint.describe_base(config)
    checkpoint.write(tmp_path, parse(whole), weights, model.language, base)
    frames = random_frames(3)
    (seen,) = checkpoint.load_visual(str(tmp_path)).look([frames])
    mine = VisualBranch(config, FrozenEncoders(config), model.fusion, model.scorer)
    np.testing.assert_allclose(seen.tokens_TD, mine.look([frames])[0].tokens_TD, rtol=1e-5)
