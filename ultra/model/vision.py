"""Projectors and fusion (Eq. 2): features of the encoders become visual tokens.

Shapes: ... any leading axes, T visual tokens of a frame, F channels of an encoder, D width of the
language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultra.config import FusionConfig, VisionConfig

GELU_POWER = 0.425
"""Mean square of GELU(z) for a standard normal z."""


class Fusion(nn.Module):
    """H_v = alpha * P1(LN(F1)) + (1 - alpha) * P2(LN(F2)); with one encoder, P1(LN(F1)).

    LN has no weights. Without `config.normalise` it is left out, which makes one encoder and its
    projector what LLaVA computes.

    Args:
        vision: names and widths of the encoders, in the order of the equation.
        config: kind of projector, normalisation and start of alpha.
        width: D.
        embedding_std: standard deviation of the language model's token embeddings, which the
            visual tokens start with.
    """

    def __init__(
        self, vision: VisionConfig, config: FusionConfig, width: int, embedding_std: float = 0.02
    ) -> None:
        super().__init__()
        self.normalise = config.normalise
        self.projectors = nn.ModuleDict(
            {
                encoder.name: _build_projector(
                    config.projector, encoder.width, width, embedding_std
                )
                for encoder in vision.encoders
            }
        )
        self.alpha: nn.Parameter | None = None
        if len(vision.encoders) == 2:
            # Of shape (1,): DeepSpeed cannot partition a scalar.
            self.alpha = nn.Parameter(torch.tensor([config.alpha]))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return (..., T, D) visual tokens of encoder name -> (..., T, F) features."""
        first, *others = self.project(features).values()
        if self.alpha is None:
            return first
        fused: Tensor = self.alpha * first + (1 - self.alpha) * others[0]
        return fused

    def project(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return encoder name -> (..., T, D): what each would give by itself, before the sum."""
        projected: dict[str, Tensor] = {}
        for name, projector in self.projectors.items():
            raw = features[name].to(next(projector.parameters()).dtype)
            read = functional.layer_norm(raw, raw.shape[-1:]) if self.normalise else raw
            projected[name] = projector(read)
        return projected


def _build_projector(kind: str, fan_in: int, width: int, embedding_std: float) -> nn.Module:
    # A layer-normed input has variance 1, so these give outputs of the embeddings' size.
    if kind == "linear":
        return _linear(fan_in, width, embedding_std / math.sqrt(fan_in))
    hidden = _linear(fan_in, width, 1 / math.sqrt(fan_in))
    last = _linear(width, width, embedding_std / math.sqrt(width * GELU_POWER))
    return nn.Sequential(hidden, nn.GELU(), last)


def _linear(fan_in: int, fan_out: int, std: float) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.normal_(layer.weight, std=std)
    nn.init.zeros_(layer.bias)
    return layer
