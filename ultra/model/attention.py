"""Attention of packed requests, each to its own past alone.

Where there is no flash attention, transformers' continuous batching lays the past of all requests
end to end and has every query attend to all of it under a mask, so that the cost of a token grows
with the number of requests beside it. Here each request has a row of its own: those that decode
share one padded batch, and a piece of a prompt is a call by itself.

Shapes: N requests that decode, Q new tokens of all requests, K tokens of their pasts (new ones
included), P of the longest past, H heads of queries, G of keys, D channels of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@functools.cache
def by_request() -> str:
    """Return the name under which transformers finds this attention.

    It takes the place of the one other that continuous batching lets in without flash attention.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("paged|eager", attend_by_request)
    return "paged|eager"


def attend_by_request(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return (1, Q, H, D) outputs; the arguments are those of transformers' attention functions."""
    key, value = kwargs.pop("cache").update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), kwargs["cu_seq_lens_k"].tolist()
    out = attend(query[0], key[0], value[0], attention_mask[0, 0], ends_q, ends_k, scaling)
    return out.transpose(0, 1).unsqueeze(0), None


def attend(
    query_HQD: Tensor,
    key_GKD: Tensor,
    value_GKD: Tensor,
    mask_QK: Tensor,
    ends_q: list[int],
    ends_k: list[int],
    scaling: float | None = None,
) -> Tensor:
    """Return out_HQD.

    Args:
        query_HQD: of all requests in a row.
        key_GKD: their pasts in a row.
        value_GKD: the same.
        mask_QK: 0 where a query sees a key, the least number or -inf elsewhere.
        ends_q: 0, and where each request's queries end.
        ends_k: the same of their keys.
        scaling: of the products; None for 1 / sqrt(D).
    """
    out_HQD = torch.empty_like(query_HQD)
    requests = list(zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False))
    decoding = [(q, k, end) for q, q_end, k, end in requests if q_end - q == 1]
    for q, q_end, k, k_end in requests:
        if q_end - q > 1:
            out_HQD[:, q:q_end] = functional.scaled_dot_product_attention(
                query_HQD[None, :, q:q_end],
                key_GKD[None, :, k:k_end],
                value_GKD[None, :, k:k_end],
                attn_mask=mask_QK[q:q_end, k:k_end],
                scale=scaling,
                enable_gqa=True,
            )[0]
    if decoding:
        device = query_HQD.device
        rows_N, starts_N, ends_N = torch.tensor(decoding, device=device).T
        longest = max(end - start for _, start, end in decoding)
        places_NP = starts_N[:, None] + torch.arange(longest, device=device)
        is_past_NP = places_NP < ends_N[:, None]
        places_NP = places_NP.where(is_past_NP, starts_N[:, None])
        mask_NP = mask_QK[rows_N[:, None], places_NP].masked_fill(~is_past_NP, -torch.inf)
        out_NH1D = functional.scaled_dot_product_attention(
            query_HQD[:, rows_N].transpose(0, 1).unsqueeze(2),
            key_GKD[:, places_NP].transpose(0, 1),
            value_GKD[:, places_NP].transpose(0, 1),
            attn_mask=mask_NP[:, None, None],
            scale=scaling,
            enable_gqa=True,
        )
        out_HQD[:, rows_N] = out_NH1D[:, :, 0].transpose(0, 1)
    return out_HQD
