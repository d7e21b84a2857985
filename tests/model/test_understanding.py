"""Scores and attention worked out in numpy, from a Llama into which PEFT itself merged LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ultra.model.llava_ultra import draw_number
from ultra.model.understanding import Understanding, understand
from ultra.types import IGNORED, VISUAL

K, T, HEADS, KEY_HEADS, WIDTH = 3, 4, 4, 2, 6
STRATEGIES = ("adaptive", "first", "random", "each", "all", "mean", "composite")


def explain(model, inputs, draw: int = 0) -> Understanding:
    ids, labels = inputs["input_ids_BS"][0].tolist(), inputs["labels_BS"][0].tolist()
    parts = (model.config, model.fusion, model.scorer, model.language)
    return understand(*parts, inputs["features"], ids, labels, draw)


def inputs_for(make_inputs, strategy: str):
    counts = (1,) if strategy == "composite" else (K,)
    return make_inputs(counts, strategy)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotate(x_SHE: np.ndarray) -> np.ndarray:
    """The rotary embedding: channel e and e + half turn by position / 10000^(2e / width)."""
    half = WIDTH // 2
    angle_S1E = np.arange(len(x_SHE))[:, None, None] / 10_000 ** (np.arange(half) / half)
    first, second = x_SHE[..., :half], x_SHE[..., half:]
    cos, sin = np.cos(angle_S1E), np.sin(angle_S1E)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def attention_by_hand(model, embeds_SD: torch.Tensor, answer: list[int]) -> np.ndarray:
    """attention_S: the mean over layers, heads and the places before those of the answer."""
    llama = copy.deepcopy(model.language.model).merge_and_unload().eval()
    hidden = llama.model(inputs_embeds=embeds_SD[None], output_hidden_states=True).hidden_states
    seen = []
    for layer, states in zip(llama.model.layers, hidden, strict=False):
        normed = layer.input_layernorm(states)[0]
        query = layer.self_attn.q_proj(normed).double().numpy().reshape(-1, HEADS, WIDTH)
        key = layer.self_attn.k_proj(normed).double().numpy().reshape(-1, KEY_HEADS, WIDTH)
        query, key = rotate(query), rotate(key)
        for head in range(HEADS):
            logits = query[:, head] @ key[:, head // (HEADS // KEY_HEADS)].T / WIDTH**0.5
            later = np.triu(np.ones_like(logits, dtype=bool), 1)
            weights = softmax(np.where(later, -np.inf, logits))
            seen += [weights[place - 1] for place in answer]
    return np.mean(seen, axis=0)


def shown(model, inputs, chosen: int) -> list[np.ndarray]:
    """The visual tokens of each picture shown, and which of them stand for the chosen one."""
    h_KTD = model.fusion(inputs["features"])[0]
    strategy = model.config.selection.strategy
    if strategy == "all":
        return list(h_KTD)
    return [h_KTD.mean(0)] if strategy == "mean" else [h_KTD[chosen]]


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_attention_is_that_of_the_language_model(make_model, make_inputs, strategy) -> None:
    model, inputs = make_model(selection={"strategy": strategy}), inputs_for(make_inputs, strategy)
    found = explain(model, inputs, draw=7)
    ids, labels = inputs["input_ids_BS"][0], inputs["labels_BS"][0]
    embeds_SD = model.language.embedding(ids.clamp(min=0)).clone()
    pictures = shown(model, inputs, found.chosen)
    embeds_SD[ids == VISUAL] = torch.cat(pictures)
    answer = (labels != IGNORED).nonzero()[:, 0].tolist()
    attention_S = attention_by_hand(model, embeds_SD, answer)
    attention_PT = attention_S[(ids == VISUAL).numpy()].reshape(-1, T)
    mine = attention_PT[found.chosen if strategy == "all" else 0]
    np.testing.assert_allclose(found.attention_T, mine, rtol=1e-4, atol=1e-7)
    assert np.ptp(mine) > 1e-3
    assert 0 < attention_S[(ids == VISUAL).numpy()].sum() < attention_S.sum() < 1 + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_choice_is_that_of_inference(make_model, make_inputs, strategy) -> None:
    model, inputs = make_model(selection={"strategy": strategy}), inputs_for(make_inputs, strategy)
    scores = model.scorer(model.fusion(inputs["features"]), inputs["frame_mask_BK"])[0]
    best = int(scores.argmax())
    expected = {"first": 0, "composite": 0, "random": 7 % K, "each": 7 % K}.get(strategy, best)
    assert explain(model, inputs, draw=7).chosen == expected


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
def test_the_scores_are_eq_3_for_each_encoder_and_fused(
    make_model, make_inputs, normalise, pool
) -> None:
    model = make_model(selection={"pool": pool}, fusion={"alpha": 0.3})
    inputs = make_inputs((K,))
    found = explain(model, inputs)
    weight = model.scorer.weight.detach().double().numpy()
    projected = {}
    for name, features in inputs["features"].items():
        layer = model.fusion.projectors[name]
        raw = normalise(features[0].numpy()) @ layer.weight.detach().double().numpy().T
        projected[name] = raw + layer.bias.detach().double().numpy()
    fused = 0.3 * projected["clip"] + 0.7 * projected["sam"]

    def pooled(visual_KTD: np.ndarray) -> np.ndarray:
        tokens_KT = normalise(visual_KTD) @ weight
        if pool != "attention":
            return tokens_KT.max(-1) if pool == "max" else tokens_KT.mean(-1)
        share_KT = softmax(normalise(visual_KTD) @ model.scorer.query.detach().double().numpy())
        return (share_KT * tokens_KT).sum(-1)

    assert found.alpha == pytest.approx(0.3)
    np.testing.assert_allclose(found.token_scores_KT, normalise(fused) @ weight, rtol=1e-3)
    np.testing.assert_allclose(found.scores_K, pooled(fused), rtol=1e-3)
    assert list(found.encoder_scores) == ["clip", "sam"]
    for name, scores_K in found.encoder_scores.items():
        np.testing.assert_allclose(scores_K, pooled(projected[name]), rtol=1e-3)
    assert np.ptp(found.scores_K) > 0.05


def test_a_single_encoder_has_no_alpha(make_model, make_config, make_inputs) -> None:
    (clip, _) = make_config().model_dump()["vision"]["encoders"]
    found = explain(make_model(vision={"encoders": [clip]}), make_inputs((K,)))
    assert (found.alpha, found.encoder_scores) == (None, {})
    assert found.token_scores_KT.shape == (K, T)
    assert found.scores_K.tolist() == found.token_scores_KT.max(-1).tolist()


def test_the_model_is_left_as_it_was_and_nothing_is_drawn(make_model, make_inputs) -> None:
    model = make_model(language={"lora": {"rank": 2, "dropout": 0.5}})
    inputs = make_inputs((K,))
    calm = explain(model, inputs)
    model.train()
    model.fusion.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = explain(model, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(found.attention_T, calm.attention_T)  # dropout was off
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.language.base.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks for m in model.language.layers.modules())
    assert all(p.grad is None for p in model.parameters())


def test_a_row_that_does_not_fit_is_an_error_and_leaves_the_model(make_model, make_inputs) -> None:
    model, inputs = make_model().train(), make_inputs((K,))
    row = inputs["input_ids_BS"]
    with pytest.raises(ValueError, match="without an answer"):
        explain(model, {**inputs, "labels_BS": torch.full_like(row, IGNORED)})
    short = row.clone()
    short[0, 2] = 5
    with pytest.raises(ValueError, match="4 visual tokens for 3 places"):
        explain(model, {**inputs, "input_ids_BS": short})
    assert model.language.training
    assert model.language.base.config._attn_implementation == "sdpa"


def test_the_draw_follows_from_the_frames() -> None:
    assert draw_number([b"a", b"b"]) == draw_number((b"a", b"b"))
    assert len({draw_number(f) for f in ([b"a", b"b"], [b"b", b"a"], [b"ab"], [b"a"])}) == 4
