"""SAM: weights in the formats they come in, read off their shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from tests.model.encoder_weights import (
    GRID,
    SAM_SIZE,
    make_sam_encoder,
    random_pixels,
    sam_config,
)
from ultra.config import ConfigError
from ultra.model.sam import SamEncoder


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
