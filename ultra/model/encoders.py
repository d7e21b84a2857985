"""The frozen vision encoders together: frame groups in, features on one grid out.

Shapes: N pictures, T tokens of the grid (row-major), F channels of an encoder. A picture is a
frame, or all that the group strategy composes into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ultra import storage
from ultra.config import ConfigError, EncoderConfig, ModelConfig
from ultra.model.clip import ClipEncoder
from ultra.model.dinov2 import Dinov2Encoder
from ultra.model.sam import SamEncoder
from ultra.model.strategies import find_strategy
from ultra.model.vision_encoder import VisionEncoder, digest_weights

ENCODERS: dict[str, type[VisionEncoder]] = {
    "clip": ClipEncoder,
    "dinov2": Dinov2Encoder,
    "sam": SamEncoder,
}
"""`vision.encoders[].name` -> what it builds of its configuration and the grid."""

Pixels = dict[str, Tensor]
"""Encoder name -> (C, H, W) normalised pixels of one picture."""


class FrozenEncoders:
    """All encoders of a model; they never train and stay outside the training engine.

    Args:
        config: the encoders, and the strategy that may compose a group's frames.
        device: where they run, `cpu` or `cuda`.

    Raises:
        ConfigError: for an unknown encoder or strategy, or weights that do not fit.
    """

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self.config = config.vision
        self.strategy = find_strategy(config)
        self.device = torch.device(device)
        # A module draws weights before those of its file replace them. Training from pixels builds
        # its encoders between seeding a step and taking it, and must draw as it does from features.
        with torch.random.fork_rng(devices=[]):
            built = {e.name: find_encoder(e)(e, self.config.grid) for e in self.config.encoders}
        self.encoders = {
            name: encoder.eval().requires_grad_(False).to(self.device)
            for name, encoder in built.items()
        }

    @torch.inference_mode()
    def encode(self, groups: Sequence[Sequence[bytes]], chunk: int = 32) -> dict[str, Tensor]:
        """Return encoder name -> (N, T, F) features of the groups' pictures, in `config.dtype`.

        Args:
            groups: JPEG or PNG bytes of each group's frames; their pictures follow each other.
            chunk: pictures that go through an encoder at a time.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        pictures = chain.from_iterable(map(self.strategy.pictures, groups))
        while images := list(islice(pictures, chunk)):
            for name, tensor in self.encode_pixels(list(map(self.preprocess, images))).items():
                parts[name].append(tensor)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def preprocess(self, image: Image.Image) -> Pixels:
        """Return what each encoder reads of a picture."""
        return {name: encoder.preprocess(image) for name, encoder in self.encoders.items()}

    @torch.inference_mode()
    def encode_pixels(self, pixels: Sequence[Pixels]) -> dict[str, Tensor]:
        """Return encoder name -> (N, T, F) features of pictures, in `config.dtype`."""
        dtype = getattr(torch, self.config.dtype)
        features = {}
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            for name, encoder in self.encoders.items():
                features[name] = encoder(torch.stack([p[name] for p in pixels])).to(dtype)
        return features

    def __call__(
        self, groups: Sequence[Sequence[bytes]]
    ) -> list[dict[str, NDArray[np.floating[Any]]]]:
        """Return the features of each group, as numpy: the form the feature cache keeps."""
        arrays = {name: tensor.cpu().numpy() for name, tensor in self.encode(groups).items()}
        ends = list(accumulate(self.strategy.num_pictures(len(group)) for group in groups))
        return [
            {name: array[start:end] for name, array in arrays.items()}
            for start, end in pairwise([0, *ends])
        ]


def find_encoder(config: EncoderConfig) -> type[VisionEncoder]:
    """Return the class of the encoder that a configuration names.

    Raises:
        ConfigError: when there is none of that name.
    """
    if config.name not in ENCODERS:
        raise ConfigError(
            f"model.vision.encoders: unknown {config.name!r}; allowed: {', '.join(ENCODERS)}"
        )
    return ENCODERS[config.name]


def cache_key(config: ModelConfig, digests: Mapping[str, str] | None = None) -> str:
    """Return what features depend on beside the frames, as a name for a folder.

    Encoders, their weights (which fix the input size), their own options, grid and type; and the
    strategy, where it composes the frames.

    Args:
        config: the encoders and the strategy.
        digests: encoder name -> sha256 of its weights; None takes it of those at their address.

    Raises:
        ConfigError: for an unknown encoder or strategy.
    """
    parts = []
    for e in config.vision.encoders:
        options = (str(getattr(e, option)) for option in find_encoder(e).options)
        digest = digests[e.name] if digests else digest_weights(storage.fetch(e.weights))
        parts.append(
            " ".join([e.name, digest, str(config.vision.grid), *options, config.vision.dtype])
        )
    if find_strategy(config).compose:
        parts.append(config.selection.strategy)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
