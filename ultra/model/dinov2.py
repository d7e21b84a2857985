"""DINOv2 as a frozen encoder (Oquab et al., arXiv 2304.07193), with registers or without.

Shapes: N pictures, C H W pixels, T tokens of the grid (row-major), F channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ultra import storage
from ultra.config import ConfigError, EncoderConfig
from ultra.model.pretrained import load_pretrained
from ultra.model.vision_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionEncoder,
    check_width,
    count_layers,
    digest_weights,
)

MODEL_TYPES = ("dinov2", "dinov2_with_registers")


class Dinov2Encoder(VisionEncoder):
    """The patch tokens of a hidden layer of DINOv2, before its last norm.

    It takes any grid: the input is as many patches wide as the grid, and the weights' positions
    are interpolated to it, as in DINOv2 itself.

    Raises:
        ConfigError: when the weights cannot be read, or give another width or depth.
    """

    pixel_mean, pixel_std = IMAGENET_MEAN, IMAGENET_STD
    options = ("layer",)

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__(config, grid)
        from transformers import AutoModel

        folder = storage.fetch(config.weights)
        self.model: Any = load_pretrained(AutoModel, folder, torch.float32)
        settings: Any = self.model.config
        if settings.model_type not in MODEL_TYPES:
            raise ConfigError(
                f"encoder {config.name}: {config.weights} holds a {settings.model_type}, "
                f"allowed: {', '.join(MODEL_TYPES)}"
            )
        self.digest = digest_weights(folder)
        self.image_size = grid * settings.patch_size
        self.num_special = 1 + getattr(settings, "num_register_tokens", 0)
        layers = self.model.encoder.layer
        # What lies above the layer that is read is never computed.
        self.model.encoder.layer = layers[: count_layers(config, len(layers))]
        self.model.layernorm = nn.Identity()
        check_width(config, settings.hidden_size)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return (N, T, F) patch tokens, class token and registers left out."""
        tokens: Tensor = self.model(pixel_values=pixels_NCHW).last_hidden_state
        return tokens[:, self.num_special :]
