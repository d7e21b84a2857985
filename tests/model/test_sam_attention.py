"""SAM's attention beside the package's own and beside a sum written out."""

from __future__ import annotations

import math

import pytest
import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention
from torch.nn import functional

from ultra.model import sam_attention
from ultra.model.sam_attention import FusedAttention, attend, fuse_attention


def make_attention(height: int, width: int) -> Attention:
    torch.manual_seed(height)
    attention = Attention(12, num_heads=3, use_rel_pos=True, input_size=(height, width))
    for embedding in (attention.rel_pos_h, attention.rel_pos_w):
        torch.nn.init.normal_(embedding)
    return attention.eval()


@pytest.mark.parametrize("elements", [1, 300, 2**22])
@torch.no_grad()
def test_it_is_the_packages_however_many_rows_go_at_once(
    monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    monkeypatch.setattr(sam_attention, "BIAS_ELEMENTS", elements)
    attention = make_attention(5, 7)
    x = torch.randn(2, 5, 7, 12)
    torch.testing.assert_close(
        FusedAttention(attention, 5, 7)(x), attention(x), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_one_output_written_out() -> None:
    attention = make_attention(2, 3)
    x = torch.randn(1, 2, 3, 12)
    qkv = attention.qkv(x)[0].double()  # (2, 3, 36): q, k, v of 3 heads of 4 channels
    q, k, v = (qkv[..., 12 * part : 12 * part + 12].reshape(2, 3, 3, 4) for part in range(3))
    y0, x0, head = 1, 2, 1
    query = q[y0, x0, head]
    weights, values = [], []
    for y1 in range(2):
        for x1 in range(3):
            score = float(query @ k[y1, x1, head]) / 2  # the square root of 4 channels
            score += float(query @ attention.rel_pos_h[y0 - y1 + 1].double())
            score += float(query @ attention.rel_pos_w[x0 - x1 + 2].double())
            weights.append(math.exp(score))
            values.append(v[y1, x1, head])
    expected = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    fused = FusedAttention(attention, 2, 3)
    fused.proj = torch.nn.Identity()
    torch.testing.assert_close(
        fused(x)[0, y0, x0].reshape(3, 4)[head].double(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_whole_encoder_gives_what_it_gave(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    encoder = ImageEncoderViT(
        img_size=80, patch_size=8, embed_dim=24, depth=4, num_heads=3, out_chans=9,
        use_rel_pos=True, window_size=4, global_attn_indexes=(1, 3),
    ).eval()  # fmt: skip
    for name, parameter in encoder.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    encoder.to(dtype)
    pixels = torch.randn(2, 3, 80, 80, dtype=dtype)
    before = encoder(pixels)
    fuse_attention(encoder)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1  # of values up to about 3
    torch.testing.assert_close(encoder(pixels), before, rtol=0, atol=tolerance)
    assert before.abs().max() > 1


def test_what_a_gpu_and_a_cpu_compute_is_the_same() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    bias = torch.randn(2, 3, 5, 7)
    kernel = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, bias), kernel)
    elsewhere = attend(*(tensor.to("meta") for tensor in (q, k, v, bias)))
    assert elsewhere.shape == kernel.shape
