"""Eqs. 3 and 5 against numpy, and the gradients that gates let through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ultra.config import SelectionConfig
from ultra.model.selection import (
    MASKED,
    FrameScorer,
    choice_entropy,
    gate_frames,
    normalise_teacher,
    redundancy_loss,
)

B, K, T, D = 2, 3, 4, 24
MASK = torch.tensor([[True, True, True], [True, True, False]])


def softmax(x):
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make_scorer(pool: str) -> FrameScorer:
    torch.manual_seed(0)
    scorer = FrameScorer(D, pool)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    return scorer


def make_visual() -> torch.Tensor:
    visual = np.random.default_rng(0).normal(2, 3, (B, K, T, D)).astype(np.float32)
    return torch.from_numpy(visual)


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
def test_the_feature_score_is_eq_3(pool, normalise) -> None:
    scorer, visual = make_scorer(pool), make_visual()
    normed = normalise(visual)
    tokens_BKT = normed @ scorer.weight.detach().numpy().astype(float)
    if pool == "max":
        expected = tokens_BKT.max(-1)
    elif pool == "mean":
        expected = tokens_BKT.mean(-1)
    else:
        share_BKT = softmax(normed @ scorer.query.detach().numpy().astype(float))
        expected = (share_BKT * tokens_BKT).sum(-1)
    scores = scorer(visual, MASK).detach()
    np.testing.assert_allclose(scores[MASK], expected[MASK.numpy()], rtol=1e-4)
    assert scores[1, 2] == MASKED == -1e4


def test_scores_are_float32_whatever_comes_in() -> None:
    scorer = make_scorer("max").bfloat16()
    scores = scorer(make_visual().bfloat16(), MASK)
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
@pytest.mark.parametrize("gradient", ["straight_through", "gumbel", "soft", "hard"])
def test_padding_is_never_chosen_and_gets_no_gradient(pool, gradient) -> None:
    scorer = make_scorer(pool)
    visual = make_visual()
    best = 50 * scorer.weight.detach()  # would beat every real frame
    visual[1, 2] = best
    visual.requires_grad_(True)
    torch.manual_seed(0)
    scores = scorer(visual, MASK)
    gates = gate_frames(scores, SelectionConfig(gradient=gradient), training=True)
    assert gates[1, 2] == 0
    chosen = torch.einsum("bk,bktd->btd", gates, visual)
    upstream = torch.randn(chosen.shape)
    teacher = torch.randn(B, K)
    teacher[1, 2] = 1e6
    loss = (chosen * upstream).sum() + redundancy_loss(scores, teacher, MASK, "attention")
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(visual.grad).all()
    assert (visual.grad[1, 2] == 0).all()
    assert (visual.grad[MASK] != 0).any(-1).any(-1).all()
    for parameter in scorer.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any()


SCORES = np.array([[0.3, -1.2, 1.1], [0.8, 0.2, -1e4]])
UPSTREAM = np.array([[1.5, -0.7, 0.4], [-0.2, 2.0, 0.9]])


def softmax_gradient(temperature: float):
    """J^T g of p = softmax(s / temperature), row by row: J_ij = p_i (d_ij - p_j) / temperature."""
    rows = []
    for scores, upstream in zip(SCORES, UPSTREAM, strict=True):
        p = softmax(scores / temperature)
        jacobian = (np.diag(p) - np.outer(p, p)) / temperature
        rows.append(jacobian.T @ upstream)
    return np.array(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_straight_through_is_one_hot_forward_and_softmax_backward(temperature) -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    config = SelectionConfig(gradient="straight_through", temperature=temperature)
    gates = gate_frames(scores, config, training=True)
    np.testing.assert_allclose(gates.detach(), [[0, 0, 1], [1, 0, 0]], atol=1e-12)
    gates.backward(torch.tensor(UPSTREAM))
    np.testing.assert_allclose(scores.grad, softmax_gradient(temperature), atol=1e-12)


def test_soft_is_the_softmax_both_ways() -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    config = SelectionConfig(gradient="soft", temperature=0.7)
    gates = gate_frames(scores, config, training=True)
    np.testing.assert_allclose(gates.detach(), softmax(SCORES / 0.7), atol=1e-12)
    gates.backward(torch.tensor(UPSTREAM))
    np.testing.assert_allclose(scores.grad, softmax_gradient(0.7), atol=1e-12)


def test_hard_gives_no_gradient() -> None:
    scores = torch.tensor(SCORES, requires_grad=True)
    gates = gate_frames(scores, SelectionConfig(gradient="hard"), training=True)
    assert gates.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert not gates.requires_grad


def test_gumbel_draws_by_the_softmax_and_lets_a_gradient_through() -> None:
    torch.manual_seed(0)
    scores = torch.tensor(SCORES[:1]).repeat(4000, 1).requires_grad_(True)
    gates = gate_frames(scores, SelectionConfig(gradient="gumbel", temperature=0.5), training=True)
    rounded = gates.detach().round()
    np.testing.assert_allclose(gates.detach(), rounded, atol=1e-12)
    assert (rounded.sum(-1) == 1).all()
    p = softmax(SCORES[0])
    deviation = np.sqrt(p * (1 - p) / 4000)
    assert (np.abs(rounded.mean(0).numpy() - p) < 4 * deviation).all()
    gates.backward(torch.tensor(UPSTREAM[:1]).repeat(4000, 1))
    assert (scores.grad.abs().sum(-1) > 0).float().mean() > 0.99
    np.testing.assert_allclose(scores.grad.sum(-1), 0, atol=1e-12)  # a softmax's rows sum to 0


@pytest.mark.parametrize("gradient", ["straight_through", "gumbel", "soft", "hard"])
def test_outside_training_the_gate_is_the_argmax(gradient) -> None:
    gates = gate_frames(torch.tensor(SCORES), SelectionConfig(gradient=gradient), training=False)
    assert gates.tolist() == [[0, 0, 1], [1, 0, 0]]


TEACHER = np.array([[0.011, 0.014, 0.010], [3.0, 1.0, 77.0]])


def teacher_by_hand(row: int, kind: str, temperature: float = 1.0):
    """Only the real frames of a group, in numpy: z-score and softmax, or softmax."""
    real = TEACHER[row][MASK[row].numpy()]
    if kind == "attention":
        real = (real - real.mean()) / (real.std() + 1e-5)
    return softmax(real / temperature)


@pytest.mark.parametrize("kind", ["attention", "likelihood"])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_the_redundancy_loss_is_eq_5(kind, temperature) -> None:
    scores = torch.tensor(SCORES, dtype=torch.float32, requires_grad=True)
    teacher = torch.tensor(TEACHER, dtype=torch.float32, requires_grad=True)
    loss = redundancy_loss(scores, teacher, MASK, kind, temperature)
    losses, gradient = [], np.zeros((B, K))
    for row in range(B):
        real = MASK[row].numpy()
        student, target = softmax(SCORES[row][real]), teacher_by_hand(row, kind, temperature)
        losses.append(-(target * np.log(student)).sum())
        gradient[row, real] = (student - target) / B
    assert float(loss.detach()) == pytest.approx(np.mean(losses), rel=1e-4)
    loss.backward()
    np.testing.assert_allclose(scores.grad, gradient, atol=2e-5)
    assert teacher.grad is None


@pytest.mark.parametrize("kind", ["attention", "likelihood"])
def test_the_teacher_gives_padding_nothing(kind) -> None:
    target = normalise_teacher(torch.tensor(TEACHER), MASK, kind)
    assert target[1, 2] == 0
    np.testing.assert_allclose(target.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(target[1, :2], teacher_by_hand(1, kind), rtol=1e-4)


def test_a_cold_teacher_of_long_findings_gives_padding_nothing() -> None:
    # Log-likelihoods of hundreds of nats, divided by a small temperature, lie below -1e4.
    target = normalise_teacher(torch.tensor([[-900.0, -905.0, 0.0]]), MASK[1:], "likelihood", 0.05)
    np.testing.assert_allclose(target, [[1, 0, 0]], atol=1e-12)


def test_a_teacher_that_sees_no_difference_is_uniform() -> None:
    target = normalise_teacher(torch.full((1, 3), 0.25), MASK[:1], "attention")
    np.testing.assert_allclose(target, [[1 / 3] * 3], rtol=1e-6)


@pytest.mark.parametrize("kind", ["attention", "likelihood"])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_single_frame_has_no_redundancy(kind, padding) -> None:
    scores = torch.tensor([[0.7] + [MASKED] * padding], requires_grad=True)
    mask = torch.tensor([[True] + [False] * padding])
    teacher = torch.tensor([[-31.0] + [5.0] * padding])
    loss = redundancy_loss(scores, teacher, mask, kind)
    loss.backward()
    assert loss == 0
    assert (scores.grad == 0).all()


def test_entropy_counts_real_frames_only() -> None:
    by_hand = []
    for row in range(B):
        p = softmax(SCORES[row][MASK[row].numpy()])
        by_hand.append(-(p * np.log(p)).sum())
    assert float(choice_entropy(torch.tensor(SCORES))) == pytest.approx(np.mean(by_hand), rel=1e-5)
