"""What all encoders share: one way to place a frame, and the digest of weights."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.model.encoder_weights import CLIP_SIZE, GRID, clip_config
from ultra.model.clip import ClipEncoder


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
