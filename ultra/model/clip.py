"""CLIP as a frozen encoder (Radford et al., arXiv 2103.00020), read as LLaVA reads it.

Shapes: N pictures, C H W pixels, T tokens of the grid (row-major), F channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultra import storage
from ultra.config import ConfigError, EncoderConfig
from ultra.model.pretrained import load_pretrained
from ultra.model.vision_encoder import VisionEncoder, check_width, count_layers, digest_weights

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(VisionEncoder):
    """The patch tokens of a CLIP vision transformer, read below its last layer.

    Raises:
        ConfigError: when the weights cannot be read, or give another grid, width or depth.
    """

    pixel_mean, pixel_std = CLIP_MEAN, CLIP_STD
    options = ("layer",)

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__(config, grid)
        from transformers import CLIPVisionModel

        folder = storage.fetch(config.weights)
        self.model: Any = load_pretrained(CLIPVisionModel, folder, torch.float32)
        self.digest = digest_weights(folder)
        settings: Any = self.model.config
        self.image_size = settings.image_size
        own_grid = settings.image_size // settings.patch_size
        if own_grid != grid:
            raise ConfigError(
                f"encoder {config.name}: its weights give a grid of {own_grid}, "
                f"vision.grid is {grid}"
            )
        transformer = getattr(self.model, "vision_model", self.model)
        layers = transformer.encoder.layers
        # What lies above the layer that is read is never computed.
        transformer.encoder.layers = layers[: count_layers(config, len(layers))]
        check_width(config, settings.hidden_size)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return (N, T, F) patch tokens, the class token left out."""
        tokens: Tensor = self.model(pixel_values=pixels_NCHW).last_hidden_state
        return tokens[:, 1:]
