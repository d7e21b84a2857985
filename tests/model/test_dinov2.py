"""DINOv2: a hidden layer, at any grid, without its class token and registers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Dinov2Model, Dinov2WithRegistersModel

from tests.model.encoder_weights import GRID, dinov2_config, random_pixels
from ultra.config import ConfigError
from ultra.model.dinov2 import Dinov2Encoder

OWN_GRID, PATCH = 5, 6


@pytest.mark.parametrize(
    ("folder", "kind", "num_special"),
    [("dinov2", Dinov2Model, 1), ("dinov2-registers", Dinov2WithRegistersModel, 1 + 3)],
)
@pytest.mark.parametrize(("layer", "index"), [(-2, 2), (-1, 3), (1, 1)])
@torch.no_grad()
def test_it_gives_the_patch_tokens_of_a_hidden_layer(
    weights, folder, kind, num_special, layer, index
) -> None:
    model = kind.from_pretrained(weights / folder).eval()
    pixels = random_pixels(OWN_GRID * PATCH)
    embedded = model.embeddings(pixels)
    assert embedded.shape == (2, num_special + OWN_GRID**2, 28)
    for block in model.encoder.layer[:index]:
        embedded = block(embedded)
    config = dinov2_config(weights, weights=str(weights / folder), layer=layer)
    encoder = Dinov2Encoder(config, OWN_GRID).eval()
    assert encoder.image_size == OWN_GRID * PATCH
    torch.testing.assert_close(encoder(pixels), embedded[:, num_special:])


def cubic_weights(size_in: int, size_out: int) -> np.ndarray:
    """The matrix of cubic convolution (a = -0.75) between cells whose edges coincide."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    matrix = np.zeros((size_out, size_in))
    for row in range(size_out):
        centre = (row + 0.5) * size_in / size_out - 0.5
        for cell in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[row, min(max(cell, 0), size_in - 1)] += kernel(centre - cell)
    return matrix


@torch.no_grad()
def test_positions_are_interpolated_to_the_shared_grid(weights) -> None:
    encoder = Dinov2Encoder(dinov2_config(weights, layer=1), GRID).eval()
    assert encoder.image_size == GRID * PATCH
    model = Dinov2Model.from_pretrained(weights / "dinov2").eval()
    position_PQD = model.embeddings.position_embeddings[0, 1:].view(OWN_GRID, OWN_GRID, -1).numpy()
    weights_GP = cubic_weights(OWN_GRID, GRID)
    position_GHD = np.einsum("gp,hq,pqd->ghd", weights_GP, weights_GP, position_PQD)
    pixels = random_pixels(GRID * PATCH)
    patches_NTD = model.embeddings.patch_embeddings(pixels).numpy()
    patches_NTD = patches_NTD + position_GHD.reshape(1, GRID**2, -1)
    opening = model.embeddings.cls_token + model.embeddings.position_embeddings[:, :1]
    embedded = torch.cat([opening.expand(2, 1, -1), torch.from_numpy(patches_NTD).float()], dim=1)
    expected = model.encoder.layer[0](embedded)[:, 1:]
    torch.testing.assert_close(encoder(pixels), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 29}, "encoder dinov2: its weights give 28 channels, width is 29"),
        ({"layer": 4}, "encoder dinov2: layer 4 of a model with 3 layers"),
        ({"layer": 0}, "encoder dinov2: layer 0 of a model with 3 layers"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Dinov2Encoder(dinov2_config(weights, **changes), GRID)


def test_another_model_is_refused(weights, tmp_path) -> None:
    config = dinov2_config(weights, weights=str(weights / "clip"))
    with pytest.raises(
        ConfigError, match="holds a clip_vision_model, allowed: dinov2, dinov2_with"
    ):
        Dinov2Encoder(config, GRID)
    with pytest.raises(ConfigError, match="not a model to read"):
        Dinov2Encoder(dinov2_config(weights, weights=str(tmp_path)), GRID)
