"""What every frozen vision encoder is.

Shapes: N pictures, C H W pixels, T tokens of the grid (row-major), F channels of an encoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ultra.config import ConfigError, EncoderConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """A frozen encoder that owns its pixels: size, normalisation and weights.

    A subclass sets what stands below, and its `forward` returns (N, T, F) tokens of (N, C, H, W)
    pixels, with T = grid^2 and F = `config.width`.

    Attributes:
        pixel_mean: mean of the red, green and blue it was trained on, of values from 0 to 1.
        pixel_std: their standard deviation.
        options: keys of `EncoderConfig` that change its features; weights and grid always do.
        image_size: side of the square input in pixels.
        digest: sha256 of the weights.
    """

    pixel_mean: ClassVar[Sequence[float]]
    pixel_std: ClassVar[Sequence[float]]
    options: ClassVar[tuple[str, ...]] = ()
    image_size: int
    digest: str
    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        for name, values in (("mean", self.pixel_mean), ("std", self.pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return normalised (C, H, W) pixels.

        The longer side fills the input and the rest is padded below and to the right, for every
        encoder alike, so that a token of one stands for the same place as that of another.
        """
        scale = self.image_size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(self.mean.device) / 255
        pixels = (pixels - self.mean) / self.std
        return functional.pad(pixels, (0, self.image_size - width, 0, self.image_size - height))


def check_width(config: EncoderConfig, width: int) -> None:
    """Return if the weights give as many channels as the configuration says.

    Raises:
        ConfigError: if they do not.
    """
    if width != config.width:
        raise ConfigError(
            f"encoder {config.name}: its weights give {width} channels, width is {config.width}"
        )


def count_layers(config: EncoderConfig, depth: int) -> int:
    """Return how many of `depth` layers lie below the hidden layer that `config.layer` names.

    Raises:
        ConfigError: when the model has no such layer.
    """
    kept = config.layer if config.layer >= 0 else depth + 1 + config.layer
    if not 0 < kept <= depth:
        raise ConfigError(
            f"encoder {config.name}: layer {config.layer} of a model with {depth} layers"
        )
    return kept


def digest_weights(path: Path) -> str:
    """Return the sha256 of a weights file, or of all weights and the config in a folder."""
    suffixes = {".safetensors", ".pth", ".gguf", ".bin"}
    files = [path]
    if path.is_dir():
        files = [
            f for f in sorted(path.iterdir()) if f.suffix in suffixes or f.name == "config.json"
        ]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
