"""Visual tokens land on their places, in row order."""

from __future__ import annotations

import pytest
import torch

from ultra.model.splice import splice
from ultra.types import VISUAL

D, VOCABULARY = 3, 11


def make_embedding(dtype: torch.dtype = torch.float32) -> torch.nn.Embedding:
    embedding = torch.nn.Embedding(VOCABULARY, D, dtype=dtype)
    rows = torch.arange(VOCABULARY * D, dtype=dtype).view(VOCABULARY, D)
    embedding.weight.data.copy_(rows)
    return embedding


def test_every_place_gets_its_visual_token() -> None:
    ids = torch.tensor([[1, VISUAL, VISUAL, 4, 0], [VISUAL, 2, 10, VISUAL, VISUAL]])
    visual = torch.tensor([[100.0 + i, 200.0 + i, 300.0 + i] for i in range(5)])
    spliced = splice(make_embedding(), ids, visual)
    expected = [
        [[3, 4, 5], [100, 200, 300], [101, 201, 301], [12, 13, 14], [0, 1, 2]],
        [[102, 202, 302], [6, 7, 8], [30, 31, 32], [103, 203, 303], [104, 204, 304]],
    ]
    assert spliced.tolist() == expected


def test_gradients_reach_the_visual_tokens_and_the_words_shown() -> None:
    embedding = make_embedding()
    visual = torch.zeros(2, D, requires_grad=True)
    upstream = torch.arange(4 * D, dtype=torch.float32).view(1, 4, D)
    splice(embedding, torch.tensor([[5, VISUAL, 5, VISUAL]]), visual).backward(upstream)
    assert visual.grad.tolist() == [[3, 4, 5], [9, 10, 11]]
    assert embedding.weight.grad[5].tolist() == [0 + 6, 1 + 7, 2 + 8]
    assert (embedding.weight.grad[:5] == 0).all()  # id 0 stood in for the places


def test_visual_tokens_take_the_type_of_the_text() -> None:
    visual = torch.ones(1, D, dtype=torch.float32)
    spliced = splice(make_embedding(torch.bfloat16), torch.tensor([[1, VISUAL]]), visual)
    assert spliced.dtype == torch.bfloat16


@pytest.mark.parametrize("num_visual", [1, 3])
def test_numbers_must_agree(num_visual) -> None:
    with pytest.raises(ValueError, match=f"{num_visual} visual tokens for 2 places"):
        splice(make_embedding(), torch.tensor([[1, VISUAL, VISUAL]]), torch.zeros(num_visual, D))
