"""What is drawn has the probabilities that were asked for, and depends on seed and place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from ultra.model.sampling import gumbel, noise_key, perturb, split_mix

V = 11
LOGITS_V = np.random.default_rng(0).normal(0, 1.5, V)


def expected_probs(temperature: float, top_p: float) -> np.ndarray:
    """Softmax over the likeliest tokens, taken in until they have `top_p` together."""
    weights = np.exp(LOGITS_V / temperature)
    probs = weights / weights.sum()
    kept, total = [], 0.0
    for token in np.argsort(-probs):
        kept.append(token)
        total += probs[token]
        if total >= top_p:
            break
    restricted = np.zeros(V)
    restricted[kept] = probs[kept] / probs[kept].sum()
    return restricted


def draw(count: int, temperature: float, top_p: float, seed: int = 0) -> np.ndarray:
    """One token at each of `count` places."""
    keys = torch.tensor([noise_key(seed, place) for place in range(count)])
    logits = torch.tensor(LOGITS_V, dtype=torch.float32).expand(count, V)
    options = torch.full((count,), temperature), torch.full((count,), top_p)
    return perturb(logits, *options, keys).argmax(-1).numpy()


@pytest.mark.parametrize(
    ("temperature", "top_p", "num_kept"),
    [(1.0, 1.0, V), (0.5, 1.0, V), (2.0, 0.9, 9), (1.0, 0.7, 4), (0.7, 0.3, 1), (1.0, 1e-30, 1)],
)
def test_frequencies(temperature, top_p, num_kept) -> None:
    probs = expected_probs(temperature, top_p)
    assert np.count_nonzero(probs) == num_kept
    counts = np.bincount(draw(20_000, temperature, top_p), minlength=V)
    assert not counts[probs == 0].any()
    if num_kept > 1:
        assert stats.chisquare(counts[probs > 0], 20_000 * probs[probs > 0]).pvalue > 1e-3


def test_places_and_seeds_are_independent() -> None:
    rows = [draw(4000, 1.0, 1.0, seed) for seed in (0, 1, -1)]
    pairs = [(rows[0], rows[1]), (rows[0], rows[2]), (rows[0][1:], rows[0][:-1])]
    for a, b in pairs:
        table = np.zeros((V, V))
        np.add.at(table, (a, b), 1)
        common = np.bincount(a, minlength=V) > 200  # rare tokens say nothing
        assert stats.chi2_contingency(table[common][:, common]).pvalue > 1e-3


def test_temperature_without_noise() -> None:
    assert set(draw(100, 1e-40, 1.0)) == {LOGITS_V.argmax()}
    assert set(draw(100, 1e-7, 1.0)) == {LOGITS_V.argmax()}


def test_equal_logits_at_the_border_of_the_nucleus() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, -1.0]]).expand(2, 5)
    scores = perturb(logits, torch.ones(2), torch.tensor([1e-3, 0.5]), torch.tensor([1, 2]))
    # The first of equals, as argmax takes it; then as many as are needed.
    assert scores.isfinite().tolist() == [
        [False, True, False, False, False],
        [False, True, True, False, False],
    ]


def test_no_restriction_where_top_p_is_1() -> None:
    logits = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0)) * 8
    one, half = (
        perturb(logits, torch.ones(2), torch.tensor([1.0, p]), torch.tensor([3, 4]))
        for p in (1.0, 0.5)
    )
    assert one.isfinite().all()
    assert torch.equal(half[0], one[0])  # beside a restricted row as well
    assert half[1].isfinite().sum() < 1000


def test_split_mix_is_the_published_generator() -> None:
    def reference(state: int, count: int) -> list[int]:
        out = []
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) % 2**64
            z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
            out.append(z ^ (z >> 31))
        return out

    assert reference(0, 1) == [0xE220A8397B1DCDAF]  # the author's first output for seed 0
    keys = [0, 1, -1, 2**63 - 1, -(2**63), noise_key(5, 6)]
    bits = split_mix(torch.tensor(keys), 7)
    assert [[b % 2**64 for b in row] for row in bits.tolist()] == [
        reference(key % 2**64, 7) for key in keys
    ]


def test_noise_is_gumbel() -> None:
    noise = gumbel(torch.tensor([noise_key(1, p) for p in range(50)]), 2000)
    assert noise.isfinite().all()
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    # A longer vocabulary does not change the noise of the tokens before.
    keys = torch.tensor([noise_key(1, 0)])
    assert torch.equal(gumbel(keys, 10), gumbel(keys, 3000)[:, :10])


def test_keys_differ() -> None:
    keys = {noise_key(s, p) for s in (-(2**63), -1, 0, 1, 2**63 - 1) for p in range(200)}
    assert len(keys) == 1000
