"""Sampled answers beside greedy ones, each request with a temperature and a seed of its own.

The engine takes the token of the largest score, for all requests alike. With Gumbel noise added,
the token of the largest logit / temperature is one drawn from their softmax. The noise of a token
depends on the request's seed and on the token's place in the sequence, on nothing else: an answer
is the same alone, among others, and gone on with from a prompt that ends in its beginning.

Shapes: R rows, one a request; V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_COLDEST = 1e-6
"""Below this temperature the softmax is its maximum, and float32 would divide by zero."""

# The constants of SplitMix64, as the signed integers that torch has.
_STEP, _MIX_1, _MIX_2 = (
    c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


class Sampler:
    """Adds noise to the logits of the requests that came with a temperature, and to no others.

    One of the engine's logits processors; the names are those that it calls.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {
        "temperature": float,
        "top_p": float,
        "seed": int,
    }
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._options: list[tuple[float, float, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the engine's room for arguments, which is not used: seeds do not fit into it."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: Sequence[Any]) -> Tensor:
        """Take note of the rows to come; the engine calls this right before the forward pass."""
        self._rows, self._options = [], []
        for row, request in enumerate(requests_with_new_token):
            if options := request.state.logit_processor_kwargs:
                # Also after a prefix found in the cache, or a prompt read again, it is the place
                # in the whole sequence.
                key = noise_key(options["seed"], request.state.position_offset)
                self._rows.append(row)
                self._options.append((options["temperature"], options["top_p"], key))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores_RV, those of sampled requests with noise."""
        if self._rows:
            temperature_R, top_p_R, keys_R = (
                torch.tensor(column, device=scores.device)
                for column in zip(*self._options, strict=True)
            )
            rows_RV = scores[self._rows]
            scores[self._rows] = perturb(rows_RV, temperature_R, top_p_R, keys_R)
        return scores


def make_processors() -> Any:
    """Return what an engine that has not begun takes as its `logit_processor`."""
    from transformers import LogitsProcessorList
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
        ContinuousBatchingLogitsProcessorList,
    )

    ContinuousBatchingLogitsProcessor.register(Sampler)  # a subclass would import transformers
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))
    processors.tensors_required = 1
    return processors


def perturb(logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor, keys_R: Tensor) -> Tensor:
    """Return scores_RV whose largest entries are draws from softmax(logits / temperature).

    Only the smallest set of most likely tokens that has a probability of `top_p` together takes
    part.
    """
    distance_RV = logits_RV - logits_RV.max(-1, keepdim=True).values
    scores_RV = distance_RV / temperature_R.clamp(min=_COLDEST).unsqueeze(-1)
    if (top_p_R < 1).any():
        scores_RV = _keep_nucleus(scores_RV, top_p_R)
    return scores_RV + gumbel(keys_R, scores_RV.shape[-1])


def _keep_nucleus(scores_RV: Tensor, top_p_R: Tensor) -> Tensor:
    sorted_RV, order_RV = scores_RV.sort(dim=-1, descending=True, stable=True)
    probs_RV = sorted_RV.softmax(-1)
    likelier_RV = probs_RV.cumsum(-1) - probs_RV
    # Rounding must not drop anything where all take part.
    dropped_RV = (likelier_RV >= top_p_R.unsqueeze(-1)) & (top_p_R < 1).unsqueeze(-1)
    dropped_RV[:, 0] = False
    return scores_RV.masked_fill(dropped_RV.scatter(-1, order_RV, dropped_RV), -torch.inf)


def noise_key(seed: int, position: int) -> int:
    """Return a 64-bit integer that seeds the noise of one token, unlike that of any other."""
    place = seed.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
    digest = hashlib.blake2b(place, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def gumbel(keys_R: Tensor, size: int) -> Tensor:
    """Return (R, size) standard Gumbel noise; entry v depends on the row's key and v alone."""
    uniform_RV = (split_mix(keys_R, size) >> 32 & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32)
    # The float nearest to 1 would be 1. Near 0, where noise is large, floats are fine enough.
    exponential_RV = uniform_RV.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
    return exponential_RV.log_().neg_()


def split_mix(keys_R: Tensor, size: int) -> Tensor:
    """Return the first `size` outputs, int64, of the SplitMix64 generators of these states."""
    bits_RV = torch.arange(1, size + 1, device=keys_R.device) * _STEP + keys_R.unsqueeze(-1)
    # torch shifts the sign in from the left, which the masks take away.
    bits_RV ^= bits_RV >> 30 & 2**34 - 1
    bits_RV *= _MIX_1
    bits_RV ^= bits_RV >> 27 & 2**37 - 1
    bits_RV *= _MIX_2
    bits_RV ^= bits_RV >> 31 & 2**33 - 1
    return bits_RV
