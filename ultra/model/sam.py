"""SAM's image encoder as a frozen encoder (Kirillov et al., arXiv 2304.02643).

Shapes: N pictures, C H W pixels, T tokens of the grid (row-major), F channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ultra import storage
from ultra.config import ConfigError, EncoderConfig
from ultra.model.pretrained import first_line
from ultra.model.sam_attention import fuse_attention
from ultra.model.vision_encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VisionEncoder,
    check_width,
    digest_weights,
)

SAM_MEAN, SAM_STD = IMAGENET_MEAN, IMAGENET_STD


class SamEncoder(VisionEncoder):
    """SAM's image encoder, its finer grid brought to the shared one.

    Raises:
        ConfigError: when the weights cannot be read, or give another grid or width.
    """

    pixel_mean, pixel_std = SAM_MEAN, SAM_STD
    options = ("pool",)

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__(config, grid)
        path = storage.fetch(config.weights)
        try:
            self.model: Any = build_sam_encoder(read_sam_weights(path))
        except ValueError as error:
            raise ConfigError(f"encoder {config.name}: {config.weights}: {error}") from None
        fuse_attention(self.model)
        self.digest = digest_weights(path)
        self.image_size = self.model.img_size
        own_grid = self.model.pos_embed.shape[1]
        if own_grid % grid:
            raise ConfigError(
                f"encoder {config.name}: its grid of {own_grid} is no multiple of {grid}"
            )
        self.factor = own_grid // grid
        channels = self.model.neck[0].out_channels
        width = channels * self.factor**2 if config.pool == "unshuffle" else channels
        check_width(config, width)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return (N, T, F) tokens: `factor` x `factor` cells become one."""
        cells_NCHW: Tensor = self.model(pixels_NCHW)
        if self.config.pool == "unshuffle":
            cells_NCHW = functional.pixel_unshuffle(cells_NCHW, self.factor)
        else:
            cells_NCHW = functional.avg_pool2d(cells_NCHW, self.factor)
        return cells_NCHW.flatten(2).transpose(1, 2)


def build_sam_encoder(state: Mapping[str, Tensor]) -> Any:
    """Return segment-anything's image encoder with the weights, of the size they have.

    Raises:
        ValueError: when the tensors are not those of a SAM image encoder.
    """
    encoder = make_sam_encoder(**read_sam_size(state))
    try:
        encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"not the weights of a SAM image encoder: {detail}") from None
    return encoder


def make_sam_encoder(**size: Any) -> Any:
    """Return segment-anything's image encoder of a size, with fresh weights."""
    from segment_anything.modeling import ImageEncoderViT

    return ImageEncoderViT(
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), use_rel_pos=True, **size
    )


def read_sam_size(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `make_sam_encoder` that fit weights.

    They are read off the shapes, so any SAM loads, not only B, L and H.

    Raises:
        ValueError: when the tensors are not those of a SAM image encoder.
    """
    try:
        patch = state["patch_embed.proj.weight"]
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        grid = state["pos_embed"].shape[1]
        spans = [(state[f"blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
        head_dim = state["blocks.0.attn.rel_pos_h"].shape[1]
        mlp_width = state["blocks.0.mlp.lin1.weight"].shape[0]
        out_chans = state["neck.0.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"not the weights of a SAM image encoder: no {error}") from None
    width, channels, patch_size = patch.shape[0], patch.shape[1], patch.shape[2]
    return {
        "img_size": grid * patch_size,
        "patch_size": patch_size,
        "in_chans": channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": width // head_dim,
        "mlp_ratio": mlp_width / width,
        "out_chans": out_chans,
        "window_size": next((span for span in spans if span != grid), 0),
        "global_attn_indexes": tuple(i for i, span in enumerate(spans) if span == grid),
    }


def read_sam_weights(path: Path) -> dict[str, Tensor]:
    """Return the image encoder's tensors of a `.pth` or `.safetensors` file.

    Raises:
        ValueError: when there are none to read.
    """
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever it leads to
        raise ValueError(f"no weights to read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"no weights by name, but a {type(state).__name__}")
    prefix = "image_encoder."
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return inner or state
