"""Attention by request against the dense product under a mask."""

from __future__ import annotations

import pytest
import torch

from ultra.model.attention import attend

H, G, D = 6, 2, 5


def dense(query_HQD, key_GKD, value_GKD, mask_QK, scaling) -> torch.Tensor:
    """Every query against every key, head by head."""
    out = torch.empty_like(query_HQD)
    for head in range(H):
        keys, values = key_GKD[head // (H // G)], value_GKD[head // (H // G)]
        weights = (query_HQD[head] @ keys.T * scaling + mask_QK).softmax(-1)
        out[head] = weights @ values
    return out


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 4)],
        [(1, 4), (1, 9), (1, 1)],  # all decode
        [(3, 3), (4, 11)],  # a prompt, and a later piece of another
        [(1, 7), (5, 5), (1, 3), (2, 8), (1, 12)],
    ],
)
@pytest.mark.parametrize("window", [None, 3])
def test_it_is_the_dense_product_under_the_mask(lengths, window) -> None:
    torch.manual_seed(0)
    num_q, num_k = (sum(column) for column in zip(*lengths, strict=True))
    query, key, value = torch.randn(H, num_q, D), torch.randn(G, num_k, D), torch.randn(G, num_k, D)
    mask = torch.full((num_q, num_k), -torch.inf)
    ends_q, ends_k = [0], [0]
    for new, past in lengths:
        for i in range(new):  # the last new token sees all of its past
            seen = past - new + i + 1
            first = max(0, seen - window) if window else 0
            mask[ends_q[-1] + i, ends_k[-1] + first : ends_k[-1] + seen] = 0
        ends_q.append(ends_q[-1] + new)
        ends_k.append(ends_k[-1] + past)
    expected = dense(query, key, value, mask, 0.3)
    out = attend(query, key, value, mask, ends_q, ends_k, 0.3)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_broken_numbers_stay_with_the_request_that_has_them() -> None:
    query, key, value = torch.randn(H, 2, D), torch.randn(G, 5, D), torch.randn(G, 5, D)
    mask = torch.tensor(
        [[0.0, 0, -torch.inf, -torch.inf, -torch.inf], [-torch.inf] * 2 + [0.0] * 3]
    )
    whole = attend(query, key, value, mask, [0, 1, 2], [0, 2, 5])
    value[:, 3] = torch.nan
    broken = attend(query, key, value, mask, [0, 1, 2], [0, 2, 5])
    assert torch.equal(whole[:, 0], broken[:, 0])
    assert broken[:, 1].isnan().all()
