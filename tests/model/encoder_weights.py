"""Encoders of each family in small, their configurations, and pictures for them.

A grid of 4 x 4 for all; 20 clip, 28 dinov2 and 9 (unshuffled 36) sam channels.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from segment_anything.modeling import ImageEncoderViT

from ultra.config import EncoderConfig, ModelConfig

GRID, CLIP_SIZE, SAM_SIZE = 4, 48, 64
CLIP = {
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": CLIP_SIZE,
    "patch_size": CLIP_SIZE // GRID,
}
DINOV2 = {
    "hidden_size": 28,
    "mlp_ratio": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 30,  # 5 x 5 patches: another grid than the shared one
    "patch_size": 6,
    "layerscale_value": 0.7,
}


def make_sam_encoder(**changes: Any) -> ImageEncoderViT:
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


def write_encoders(folder: Path) -> None:
    """Write clip/, whole-clip/, dinov2/, dinov2-registers/ and sam.pth with random weights."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        CLIPVisionModel,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder / "clip")
    text = CLIPTextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=18,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    whole = CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**CLIP).to_dict())
    CLIPModel(whole).save_pretrained(folder / "whole-clip")
    torch.save(
        {f"image_encoder.{k}": v for k, v in make_sam_encoder().state_dict().items()},
        folder / "sam.pth",
    )
    for name, model in (
        ("dinov2", Dinov2Model(Dinov2Config(**DINOV2))),
        (
            "dinov2-registers",
            Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=3)),
        ),
    ):
        for parameter in model.embeddings.parameters(recurse=False):
            torch.nn.init.normal_(parameter, std=0.5)  # tokens and positions, zero in a fresh one
        model.save_pretrained(folder / name)


def clip_config(folder: Path, **changes: Any) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"name": "clip", "weights": str(folder / "clip"), "width": 20, **changes}
    )


def dinov2_config(folder: Path, **changes: Any) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"name": "dinov2", "weights": str(folder / "dinov2"), "width": 28, **changes}
    )


def sam_config(path: Path, **changes: Any) -> EncoderConfig:
    return EncoderConfig.model_validate(
        {"name": "sam", "weights": str(path), "width": 36, **changes}
    )


def encoder_configs(folder: Path) -> dict[str, EncoderConfig]:
    """One of each family, by name."""
    return {
        "clip": clip_config(folder),
        "dinov2": dinov2_config(folder),
        "sam": sam_config(folder / "sam.pth"),
    }


def model_config(folder: Path, strategy: str = "adaptive", **changes: Any) -> ModelConfig:
    """A model on clip and sam, or what `changes` makes of its section `vision`."""
    encoders = [clip_config(folder), sam_config(folder / "sam.pth")]
    return ModelConfig.model_validate(
        {
            "vision": {"grid": GRID, "encoders": encoders, "dtype": "float32", **changes},
            "selection": {"strategy": strategy},
            "language": {"weights": "-"},
        }
    )


def random_pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
