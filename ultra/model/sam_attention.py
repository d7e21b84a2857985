"""SAM's attention, a few rows of queries at a time.

segment-anything writes the whole attention map of every head, 64 MiB of float32 for one at 1024
pixels, and writes it anew for each term. Here only the bias of some rows is written, and on a CPU
their map, both small enough for its cache; a GPU's fused kernel needs no map. The outputs are the
same but for rounding.

Shapes: B pictures or windows, N heads, H W grid, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BIAS_ELEMENTS = 4 * 2**20
"""Of the bias that is written at once; it should stay in a processor's cache."""


class FusedAttention(nn.Module):
    """Stands in for segment-anything's `Attention`, with its weights.

    The bias is that of Eq. 4 of MViTv2 (Li et al., arXiv 2112.01526), as SAM has it: the query's
    product with an embedding of the vertical distance and with one of the horizontal distance.

    Args:
        attention: the module whose weights it takes over.
        height: rows of the grid it attends over.
        width: columns of it.
    """

    def __init__(self, attention: Any, height: int, width: int) -> None:
        super().__init__()
        self.num_heads: int = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.register_buffer("vertical_HHD", _by_distance(attention.rel_pos_h, height))
        self.register_buffer("horizontal_WWD", _by_distance(attention.rel_pos_w, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, H, W, C) of (B, H, W, C)."""
        num, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(num, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, N, HW, D) each
        grid = q.unflatten(2, (height, width))
        vertical = torch.einsum("bnhwd,hkd->bnhwk", grid, self.vertical_HHD)
        horizontal = torch.einsum("bnhwd,wkd->bnhwk", grid, self.horizontal_WWD)
        rows = max(1, BIAS_ELEMENTS // (num * self.num_heads * width * height * width))
        attended = []
        for start in range(0, height, rows):
            block = slice(start, start + rows)
            bias = vertical[:, :, block, :, :, None] + horizontal[:, :, block, :, None, :]
            attended.append(
                attend(grid[:, :, block].flatten(2, 3), k, v, bias.flatten(4).flatten(2, 3))
            )
        heads = torch.cat(attended, dim=2).transpose(1, 2)
        out: Tensor = self.proj(heads.reshape(num, height, width, -1))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Return softmax(q k' / sqrt(D) + bias) v."""
    if q.device.type != "cpu":
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    # Products of matrices beat torch's fused kernel for CPUs, in bfloat16 by a half.
    scale = q.shape[-1] ** -0.5
    weights = torch.baddbmm(
        bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale
    )
    attended = torch.bmm(weights.softmax(-1), v.flatten(0, 1))
    return attended.view(*q.shape[:-1], -1)


def fuse_attention(encoder: Any) -> None:
    """Put `FusedAttention` into every block of a segment-anything image encoder."""
    own_grid = encoder.pos_embed.shape[1]
    for block in encoder.blocks:
        side = block.window_size or own_grid
        block.attn = FusedAttention(block.attn, side, side)


def _by_distance(embedding: Tensor, size: int) -> Tensor:
    """Return (size, size, D): the embedding of the distance of each query from each key."""
    place = torch.arange(size)
    return embedding.detach()[place[:, None] - place[None] + size - 1]
