"""The frozen encoders: weights in the formats they come in, one grid, one place per token."""

from __future__ import annotations

import io
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel

from ultra.config import ConfigError, EncoderConfig, VisionConfig
from ultra.model.encoders import ClipEncoder, FrozenEncoders, SamEncoder, cache_key

GRID, CLIP_SIZE, SAM_SIZE = 4, 48, 64
VISION = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": CLIP_SIZE,
    "patch_size": CLIP_SIZE // GRID,
}


def make_sam_encoder(**changes) -> ImageEncoderViT:
    """ViT-B in small: windows, relative positions, some global layers."""
    arguments = {
        "img_size": SAM_SIZE,
        "patch_size": 8,
        "embed_dim": 12,
        "depth": 4,
        "num_heads": 3,
        "mlp_ratio": 3,
        "out_chans": 9,
        "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
        "use_rel_pos": True,
        "window_size": 3,
        "global_attn_indexes": (1, 3),
    }
    encoder = ImageEncoderViT(**{**arguments, **changes})
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)  # zero in a fresh one
    return encoder.eval()


def make_whole_sam() -> Sam:
    return Sam(
        make_sam_encoder(),
        PromptEncoder(
            embed_dim=8, image_embedding_size=(8, 8), input_image_size=(64, 64), mask_in_chans=4
        ),
        MaskDecoder(
            transformer_dim=8,
            transformer=TwoWayTransformer(depth=1, embedding_dim=8, num_heads=2, mlp_dim=16),
        ),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """clip/, whole-clip/, sam.pth: the two encoders with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "clip")
    text = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=18,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    whole = CLIPConfig(
        text_config=text.to_dict(), vision_config=CLIPVisionConfig(**VISION).to_dict()
    )
    CLIPModel(whole).save_pretrained(folder / "whole-clip")
    torch.save(
        {f"image_encoder.{k}": v for k, v in make_sam_encoder().state_dict().items()},
        folder / "sam.pth",
    )
    return folder


def clip_config(folder, **changes) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"name": "clip", "weights": str(folder / "clip"), "width": 20, **changes}
    )


def sam_config(path, **changes) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"name": "sam", "weights": str(path), "width": 36, **changes}
    )


def vision_config(folder, **changes) -> VisionConfig:
    encoders = (clip_config(folder), sam_config(folder / "sam.pth"))
    return VisionConfig.model_validate(
        {"grid": GRID, "encoders": encoders, "dtype": "float32", **changes}
    )


def random_pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["clip", "whole-clip"])
@pytest.mark.parametrize(("layer", "index"), [(-2, 2), (-1, 3), (1, 1)])
@torch.no_grad()
def test_clip_gives_the_patch_tokens_of_a_hidden_layer(weights, name, layer, index) -> None:
    kind = {"clip": CLIPVisionModel, "whole-clip": CLIPModel}[name]
    model = kind.from_pretrained(weights / name).eval()
    pixels = random_pixels(CLIP_SIZE)
    vision = model.vision_model if name == "whole-clip" else model
    hidden = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    config = clip_config(weights, weights=str(weights / name), layer=layer)
    encoder = ClipEncoder(config, GRID).eval()
    assert encoder.image_size == CLIP_SIZE
    torch.testing.assert_close(encoder(pixels), hidden[index][:, 1:])


@pytest.mark.parametrize("form", ["whole.pth", "prefixed.pth", "bare.pth", "bare.safetensors"])
@torch.no_grad()
def test_sam_gives_the_packages_output_in_the_shared_grid(tmp_path, form) -> None:
    torch.manual_seed(1)
    sam = make_whole_sam().eval()
    bare = sam.image_encoder.state_dict()
    state = {
        "whole": sam.state_dict(),
        "prefixed": {f"image_encoder.{k}": v for k, v in bare.items()},
        "bare": bare,
    }[form.split(".")[0]]
    path = tmp_path / form
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    encoder = SamEncoder(sam_config(path), GRID).eval()
    assert encoder.image_size == SAM_SIZE
    pixels = random_pixels(SAM_SIZE)
    cells_NCHW = sam.image_encoder(pixels).numpy()  # (2, 9, 8, 8)
    expected = np.zeros((2, 16, 36))
    for row in range(4):
        for column in range(4):
            block = cells_NCHW[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            expected[:, 4 * row + column] = block.reshape(2, 36)
    np.testing.assert_allclose(encoder(pixels), expected, rtol=1e-4, atol=1e-5)
    averaged = SamEncoder(sam_config(path, pool="avgpool", width=9), GRID).eval()
    expected = expected.reshape(2, 16, 9, 4).mean(-1)
    np.testing.assert_allclose(averaged(pixels), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": 5, "depth": 2, "global_attn_indexes": (1,)},
        {"window_size": 0, "global_attn_indexes": ()},  # every layer global
        {"global_attn_indexes": ()},  # none
        {"window_size": 14, "global_attn_indexes": (1,)},  # windows larger than the grid
        {"window_size": 8},  # windows as large as the grid
        {"depth": 12, "mlp_ratio": 4, "global_attn_indexes": (2, 5, 8, 11)},
    ],
)
@torch.no_grad()
def test_sam_of_any_size_is_read_off_its_shapes(tmp_path, changes) -> None:
    torch.manual_seed(1)
    package = make_sam_encoder(**changes)
    torch.save(package.state_dict(), tmp_path / "sam.pth")
    encoder = SamEncoder(sam_config(tmp_path / "sam.pth"), GRID).eval()
    pixels = random_pixels(SAM_SIZE)
    torch.testing.assert_close(encoder.model(pixels), package(pixels))


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def brighten(height: int, width: int, row: int, column: int) -> tuple[bytes, bytes]:
    """A dark frame, and the same with one of the 4 x 4 grid's cells bright."""
    cell = max(height, width) // GRID
    frame = np.full((height, width, 3), 40)
    bright = frame.copy()
    bright[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = 220
    return png(frame), png(bright)


@pytest.mark.parametrize("pool", ["unshuffle", "avgpool"])
@pytest.mark.parametrize(
    ("height", "width", "row", "column"),
    [(96, 96, 0, 1), (96, 96, 2, 3), (96, 96, 3, 0), (48, 96, 1, 3), (96, 48, 3, 1)],
)
def test_a_token_stands_for_the_same_place_in_both(
    weights, pool, height, width, row, column
) -> None:
    encoders = (
        clip_config(weights, layer=1),
        sam_config(weights / "sam.pth", pool=pool, width=36 if pool == "unshuffle" else 9),
    )
    frozen = FrozenEncoders(vision_config(weights, encoders=encoders))
    features = frozen.encode(brighten(height, width, row, column))
    for name, (dark_TF, bright_TF) in features.items():
        moved_T = (bright_TF - dark_TF).norm(dim=-1)
        assert int(moved_T.argmax()) == GRID * row + column, name


def test_pixels_are_scaled_normalised_and_letterboxed(weights) -> None:
    encoder = ClipEncoder(clip_config(weights), GRID)
    wide = Image.new("RGB", (80, 40), (255, 51, 0))
    pixels = encoder.preprocess(wide).numpy()
    assert pixels.shape == (3, CLIP_SIZE, CLIP_SIZE)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for channel, value in enumerate((1.0, 0.2, 0.0)):
        expected = (value - mean[channel]) / std[channel]
        np.testing.assert_allclose(pixels[channel, : CLIP_SIZE // 2], expected, rtol=1e-5)
    assert (pixels[:, CLIP_SIZE // 2 :] == 0).all()
    tall = encoder.preprocess(wide.rotate(90, expand=True)).numpy()
    assert (tall[:, :, CLIP_SIZE // 2 :] == 0).all()
    assert (tall[:, :, : CLIP_SIZE // 2] != 0).all()


def random_frames(count: int) -> list[bytes]:
    rng = np.random.default_rng(5)
    return [png(rng.integers(0, 256, (30 + 7 * i, 50, 3))) for i in range(count)]


def test_features_do_not_depend_on_the_chunks(weights) -> None:
    frozen = FrozenEncoders(vision_config(weights))
    frames = random_frames(5)
    whole = frozen.encode(frames)
    assert {n: tuple(f.shape) for n, f in whole.items()} == {
        "clip": (5, 16, 20),
        "sam": (5, 16, 36),
    }
    for chunk in (1, 2, 5):
        parts = frozen.encode(frames, chunk=chunk)
        for name, features in whole.items():
            torch.testing.assert_close(parts[name], features, rtol=1e-4, atol=1e-5)


def test_features_have_the_type_of_the_config(weights) -> None:
    frozen = FrozenEncoders(vision_config(weights, dtype="float16"))
    as_numpy = frozen(random_frames(2))
    assert {f.dtype for f in as_numpy.values()} == {np.dtype("float16")}
    assert not any(p.requires_grad for e in frozen.encoders.values() for p in e.parameters())


def test_grey_and_palette_frames_are_read_as_rgb(weights) -> None:
    frozen = FrozenEncoders(vision_config(weights))
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    frames = []
    for mode in ("L", "RGB", "P"):
        file = io.BytesIO()
        grey.convert(mode).save(file, "PNG")
        frames.append(file.getvalue())
    first, second, third = frozen.encode(frames)["clip"]
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(third, first)


def test_the_cache_key_follows_all_that_features_depend_on(weights, tmp_path) -> None:
    base = vision_config(weights)
    clip, sam = base.encoders
    torch.manual_seed(9)
    torch.save(make_sam_encoder().state_dict(), tmp_path / "other.pth")
    keys = [
        cache_key(config)
        for config in (
            base,
            vision_config(weights, dtype="float16"),
            vision_config(weights, encoders=(clip_config(weights, layer=-1), sam)),
            vision_config(
                weights, encoders=(clip, sam_config(weights / "sam.pth", pool="avgpool"))
            ),
            vision_config(weights, encoders=(clip, sam_config(tmp_path / "other.pth"))),
            vision_config(
                weights, encoders=(clip_config(weights, weights=str(weights / "whole-clip")), sam)
            ),
            vision_config(weights, encoders=(clip,)),
            vision_config(weights, grid=2),
        )
    ]
    assert len(set(keys)) == len(keys)
    # Where the weights lie is no part of what they are.
    (tmp_path / "moved.pth").write_bytes((weights / "sam.pth").read_bytes())
    moved = vision_config(weights, encoders=(clip, sam_config(tmp_path / "moved.pth")))
    assert cache_key(moved) == keys[0]


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"width": 21}, 4, "encoder clip: its weights give 20 channels, width is 21"),
        ({}, 3, "encoder clip: its weights give a grid of 4, vision.grid is 3"),
        ({"layer": -4}, 4, "encoder clip: layer -4 of a model with 3 layers"),
        ({"layer": 4}, 4, "encoder clip: layer 4 of a model with 3 layers"),
    ],
)
def test_a_clip_that_does_not_fit_is_refused(weights, changes, grid, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipEncoder(clip_config(weights, **changes), grid)


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({"width": 35}, 4, "encoder sam: its weights give 36 channels, width is 35"),
        ({"width": 36, "pool": "avgpool"}, 4, "give 9 channels, width is 36"),
        ({}, 3, "encoder sam: its grid of 8 is no multiple of 3"),
    ],
)
def test_a_sam_that_does_not_fit_is_refused(weights, changes, grid, message) -> None:
    with pytest.raises(ConfigError, match=message):
        SamEncoder(sam_config(weights / "sam.pth", **changes), grid)


class Payload:
    def __reduce__(self):
        return (print, ("a pickle ran",))


def write_garbage(kind: str, path) -> None:
    if kind == "noise":
        path.write_bytes(b"these are no weights" * 9)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        torch.save({"a": Payload()}, path)
    elif kind == "tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "other":
        torch.save({"fc.weight": torch.zeros(3)}, path)
    else:
        state = make_sam_encoder().state_dict()
        del state["blocks.2.attn.qkv.bias"]
        torch.save(state, path)


@pytest.mark.parametrize(
    ("kind", "suffix", "message"),
    [
        ("noise", ".pth", "no weights to read"),
        ("noise", ".safetensors", "no weights to read"),
        ("empty", ".pth", "no weights to read"),
        ("pickle", ".pth", "no weights to read"),
        ("tensor", ".pth", "no weights by name, but a Tensor"),
        ("other", ".pth", "not the weights of a SAM image encoder: no 'patch_embed"),
        ("incomplete", ".pth", r"not the weights of a SAM image encoder: .*blocks\.2\.attn"),
    ],
)
def test_a_file_that_is_no_sam_is_refused_in_one_line(
    tmp_path, capsys, kind, suffix, message
) -> None:
    path = tmp_path / f"weights{suffix}"
    write_garbage(kind, path)
    with pytest.raises(ConfigError, match=message) as caught:
        SamEncoder(sam_config(path), GRID)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "a pickle ran" not in capsys.readouterr().out


def test_a_folder_that_is_no_clip_is_refused_in_one_line(
    weights, random_backbones, tmp_path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (
        (tmp_path / "empty", "not a model to read"),
        (random_backbones / "language", "its weights are missing"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            ClipEncoder(clip_config(weights, weights=str(folder)), GRID)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
