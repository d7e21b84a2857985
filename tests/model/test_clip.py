"""CLIP: a hidden layer of whatever directory holds one."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPModel, CLIPVisionModel

from tests.model.encoder_weights import CLIP_SIZE, GRID, clip_config, random_pixels
from ultra.config import ConfigError
from ultra.model.clip import ClipEncoder


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
