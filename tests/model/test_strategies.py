"""What each strategy shows, against its frames picked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model.encoder_weights import model_config, png
from ultra.config import ConfigError, load, parse
from ultra.model import checkpoint, strategies
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra, VisualBranch
from ultra.model.strategies import STRATEGIES, Groups, find_strategy, num_visual_tokens

B, K, T, D = 2, 3, 4, 5
COUNTS = (3, 2)
NAMES = ["adaptive", "first", "random", "each", "all", "mean", "composite"]


def make_groups() -> tuple[Groups, np.ndarray]:
    rng = np.random.default_rng(0)
    visual_BKTD = rng.normal(size=(B, K, T, D))
    visual_BKTD[1, 2] = np.nan  # padding shows nowhere
    scores_BK = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.4, -1e4]])
    gates_BK = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    mask_BK = torch.tensor([[True, True, True], [True, True, False]])
    return Groups(torch.from_numpy(visual_BKTD), scores_BK, gates_BK, mask_BK), visual_BKTD


def take_one(groups: Groups, row: int) -> Groups:
    """One group without padding, as inference has it."""
    count = COUNTS[row]
    return Groups(
        groups.visual_BKTD[row : row + 1, :count],
        groups.scores_BK[row : row + 1, :count],
        groups.gates_BK[row : row + 1, :count],
        groups.mask_BK[row : row + 1, :count],
    )


def shown_by_hand(name: str, visual_BKTD: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(row of text, its visual tokens) in their order."""
    if name == "adaptive":
        return [(0, visual_BKTD[0, 1]), (1, visual_BKTD[1, 1])]
    if name in {"first", "composite"}:
        return [(0, visual_BKTD[0, 0]), (1, visual_BKTD[1, 0])]
    if name == "each":
        return [(b, visual_BKTD[b, k]) for b in range(B) for k in range(COUNTS[b])]
    if name == "all":
        return [(b, visual_BKTD[b, : COUNTS[b]].reshape(-1, D)) for b in range(B)]
    assert name == "mean"
    return [(b, sum(visual_BKTD[b, k] for k in range(COUNTS[b])) / COUNTS[b]) for b in range(B)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_training_shows_what_the_strategy_says(name) -> None:
    groups, visual_BKTD = make_groups()
    if name in {"adaptive", "mean"}:  # their weights are zero there
        visual_BKTD = np.nan_to_num(visual_BKTD, nan=9e9)
        groups = Groups(
            torch.from_numpy(visual_BKTD), groups.scores_BK, groups.gates_BK, groups.mask_BK
        )
    rows_R, visual_VD = STRATEGIES[name].arrange(groups)
    expected = shown_by_hand(name, visual_BKTD)
    assert rows_R.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(visual_VD, np.concatenate([v for _, v in expected]), rtol=1e-12)


def test_random_shows_each_real_frame_as_often_as_any_other() -> None:
    groups, visual_BKTD = make_groups()
    torch.manual_seed(0)
    seen = np.zeros((B, K))
    for _ in range(600):
        rows_R, visual_VD = STRATEGIES["random"].arrange(groups)
        assert rows_R.tolist() == [0, 1]
        for row in range(B):
            shown = visual_VD[row * T : (row + 1) * T].numpy()
            same = [np.array_equal(shown, frame) for frame in visual_BKTD[row]]
            assert sum(same) == 1
            seen[row, same.index(True)] += 1
    for row, count in enumerate(COUNTS):
        deviation = np.sqrt(600 / count * (1 - 1 / count))
        assert (np.abs(seen[row, :count] - 600 / count) < 4 * deviation).all()
    assert seen[1, 2] == 0


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_inference_shows_what_training_did(name, row) -> None:
    groups, visual_BKTD = make_groups()
    group, draw = take_one(groups, row), 7  # 7 % 3 is 1 and 7 % 2 is 1
    tokens_VD, chosen = STRATEGIES[name].show(group, draw)
    if name in {"random", "each"}:
        expected = visual_BKTD[row, 1]
        assert chosen == 1
    else:
        _, expected = shown_by_hand(name, visual_BKTD)[row]
        _, trained_VD = STRATEGIES[name].arrange(group)
        np.testing.assert_array_equal(tokens_VD, trained_VD)
        assert chosen == (0 if name in {"first", "composite"} else 1)
    np.testing.assert_allclose(tokens_VD, expected, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_prompts_have_a_place_for_every_token_that_is_shown(weights, name, num_frames) -> None:
    config = model_config(weights, name)  # 16 tokens a frame
    strategy = find_strategy(config)
    num_pictures = 1 if name == "composite" else num_frames
    assert strategy.num_pictures(num_frames) == num_pictures
    visual = torch.randn(1, num_pictures, 16, D)
    real = torch.ones(1, num_pictures, dtype=torch.bool)
    group = Groups(visual, real.float(), real.float() / num_pictures, real)
    rows_R, visual_VD = strategy.arrange(group)
    expected = 16 * num_frames if name == "all" else 16
    assert num_visual_tokens(config, num_frames) == len(visual_VD) // len(rows_R) == expected
    assert len(strategy.show(group, 5)[0]) == expected


def test_only_adaptive_has_a_choice_to_teach() -> None:
    assert [name for name, strategy in STRATEGIES.items() if strategy.scored] == ["adaptive"]
    assert list(STRATEGIES) == NAMES


def test_an_unknown_strategy_is_refused_where_a_model_is_built(make_config) -> None:
    config = make_config(selection={"strategy": "frist"})
    for use in (
        find_strategy,
        lambda c: num_visual_tokens(c, 3),
        lambda c: LlavaUltra(c, LanguageBranch(c.language)),
    ):
        with pytest.raises(ConfigError, match="unknown 'frist'; allowed: adaptive, first, "):
            use(config)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_shows_what_the_model_did_in_training(name, make_model, tmp_path) -> None:
    model = make_model(selection={"strategy": name}, vision={"dtype": "float32"})
    run_through(model, tmp_path)


def test_the_recipe_for_a_strategy(read_recipe, make_model, tmp_path, monkeypatch) -> None:
    """What CONTRIBUTING.md says, followed: from an entry to losses, answers and a checkpoint."""
    monkeypatch.setattr(strategies, "STRATEGIES", dict(STRATEGIES))
    exec(read_recipe("_middle"), vars(strategies).copy())
    model = make_model(selection={"strategy": "middle"}, vision={"dtype": "float32"})
    groups, visual_BKTD = make_groups()
    rows_R, visual_VD = model.strategy.arrange(groups)
    assert rows_R.tolist() == [0, 1]
    np.testing.assert_array_equal(visual_VD, visual_BKTD[:, 1].reshape(-1, D))
    assert num_visual_tokens(model.config, 5) == T
    chosen = run_through(model, tmp_path)
    assert chosen == [1, 0, 2]


def run_through(model: LlavaUltra, folder) -> list[int]:
    """Write a model, look with what is read, and compare with `arrange`; return the chosen."""
    rng = np.random.default_rng(4)
    looked_at = [
        [png(rng.integers(0, 256, (17 + i, 23, 3))) for i in range(count)] for count in (3, 1, 5)
    ]
    weights = {n: p for n, p in model.named_parameters() if n.startswith(checkpoint.CONNECTOR)}
    whole = parse({**load("tiny").model_dump(), "model": model.config.model_dump()})
    base = checkpoint.describe_base(model.config)
    checkpoint.write(folder, whole, weights, model.language, base)
    branch = checkpoint.load_visual(str(folder))
    trained = VisualBranch(model.config, branch.encoders, model.fusion, model.scorer)
    seen = branch.look(looked_at)
    for frames, visual in zip(looked_at, seen, strict=True):
        assert len(visual.scores_K) == len(frames)
        assert 0 <= visual.chosen < len(frames)
        assert len(visual.tokens_TD) == num_visual_tokens(model.config, len(frames))
        # From the features of the cache, with the model that was written.
        cached = FrozenEncoders(model.config)([frames])[0]
        features = {name: torch.from_numpy(array)[None] for name, array in cached.items()}
        again = trained.choose(features, frames)
        assert again.chosen == visual.chosen
        np.testing.assert_allclose(again.tokens_TD, visual.tokens_TD, rtol=1e-3, atol=1e-5)
    return [visual.chosen for visual in seen]
