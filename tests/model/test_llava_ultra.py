"""The whole model against transformers called directly on embeddings spliced by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ultra.data.schema import content_digest
from ultra.model.encoders import FrozenEncoders
from ultra.model.llava_ultra import VisualBranch
from ultra.model.pictures import compose
from ultra.model.selection import gate_frames, redundancy_loss
from ultra.model.strategies import Groups, num_visual_tokens
from ultra.model.teacher import AttentionTeacher, score_likelihood
from ultra.model.trainable import count_parts, select_trainable
from ultra.types import IGNORED, VISUAL

T, D = 4, 24


def shown_by_hand(model, inputs, row: int, frames: list[int], average: bool) -> torch.Tensor:
    """The embeddings of one row, its text around the tokens of the frames or their average."""
    visual_KTD = model.fusion(inputs["features"])[row]
    tokens = [token for frame in frames for token in visual_KTD[frame]]
    if average:
        tokens = [sum(tokens[t::T]) / len(frames) for t in range(T)]
    rest = iter(tokens)
    embedding = model.language.base.get_input_embeddings().weight
    ids = inputs["input_ids_BS"][row][inputs["text_mask_BS"][row]].tolist()
    spliced = torch.stack([next(rest) if i == VISUAL else embedding[i] for i in ids])
    assert next(rest, None) is None
    return spliced


def losses_by_hand(model, inputs, row: int, frames: list[int], average=False) -> np.ndarray:
    """The loss of each answer token of one row."""
    embeds = shown_by_hand(model, inputs, row, frames, average)
    logits = model.language.model(inputs_embeds=embeds[None]).logits[0].detach().double().numpy()
    labels = inputs["labels_BS"][row][inputs["text_mask_BS"][row]].tolist()
    return np.array(
        [
            np.log(np.exp(logits[place - 1]).sum()) - logits[place - 1][label]
            for place, label in enumerate(labels)
            if label != IGNORED
        ]
    )


def mean_of_rows(rows) -> float:
    """What the language loss is: every conversation counts alike, however long its answer."""
    return sum(sum(row) / len(row) for row in rows) / len(rows)


def best_frames(model, inputs) -> list[int]:
    """The frame of each group whose best token scores highest (Eq. 3), in numpy."""
    visual_BKTD = model.fusion(inputs["features"]).detach().double().numpy()
    mean = visual_BKTD.mean(-1, keepdims=True)
    normed = (visual_BKTD - mean) / np.sqrt(visual_BKTD.var(-1, keepdims=True) + 1e-5)
    scores_BK = (normed @ model.scorer.weight.detach().double().numpy()).max(-1)
    scores_BK[~inputs["frame_mask_BK"].numpy()] = -np.inf
    best: list[int] = scores_BK.argmax(-1).tolist()
    return best


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strategy", ["adaptive", "first", "each", "all", "mean"])
def test_the_language_loss_is_that_of_the_frames_the_strategy_shows(
    make_model, make_inputs, strategy, training
) -> None:
    model = make_model(selection={"strategy": strategy, "teacher": "none"}).train(training)
    inputs = make_inputs((3, 2), strategy)
    best = best_frames(model, inputs)
    assert best != [0, 0]  # else `first` and `adaptive` could not be told apart
    shown = {
        "adaptive": [(0, [best[0]]), (1, [best[1]])],
        "first": [(0, [0]), (1, [0])],
        "each": [(0, [0]), (0, [1]), (0, [2]), (1, [0]), (1, [1])],
        "all": [(0, [0, 1, 2]), (1, [0, 1])],
        "mean": [(0, [0, 1, 2]), (1, [0, 1])],
    }[strategy]
    losses = [losses_by_hand(model, inputs, *each, strategy == "mean") for each in shown]
    assert {len(row_losses) for row_losses in losses} == {4, 7}  # the answers' lengths
    expected = mean_of_rows(losses)
    assert expected != pytest.approx(np.concatenate(losses).mean(), rel=3e-4)
    outputs = model(**inputs)
    assert float(outputs["language"]) == pytest.approx(expected, rel=1e-4)
    assert float(outputs["loss"].detach()) == pytest.approx(float(outputs["language"]), rel=1e-6)
    assert outputs["redundancy"] == 0


def test_random_shows_real_frames_only_and_all_of_them(make_model, make_inputs) -> None:
    model = make_model(selection={"strategy": "random", "teacher": "none"}).train()
    inputs = make_inputs((3, 2))
    own = [
        [losses_by_hand(model, inputs, row, [k]) for k in range(n)] for row, n in ((0, 3), (1, 2))
    ]
    possible = [mean_of_rows([own[0][i], own[1][j]]) for i in range(3) for j in range(2)]
    drawn = []
    for seed in range(40):
        torch.manual_seed(seed)
        loss = float(model(**inputs)["language"])
        distances = np.abs(np.array(possible) - loss)
        assert distances.min() < 1e-4
        drawn.append(int(distances.argmin()))
    assert set(drawn) == set(range(6))


@pytest.mark.parametrize("teacher", ["attention", "likelihood"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_loss_is_language_plus_weighted_redundancy(
    make_model, make_inputs, teacher, temperature
) -> None:
    changes = {
        "teacher": teacher,
        "redundancy_weight": 0.37,
        "teacher_temperature": temperature,
    }
    model = make_model(selection=changes).train()
    inputs = make_inputs()
    best = best_frames(model, inputs)
    language = mean_of_rows([losses_by_hand(model, inputs, row, [best[row]]) for row in (0, 1)])
    visual = model.fusion(inputs["features"])
    scores = model.scorer(visual, inputs["frame_mask_BK"])
    findings = (inputs["findings_ids_BS"], inputs["findings_mask_BS"])
    extra = {}
    if teacher == "attention":
        snapshot = AttentionTeacher(model.config, model.language)
        snapshot.copy_from(model.fusion, model.language)
        taught = snapshot(inputs["features"], inputs["frame_mask_BK"], *findings)
        extra = {"teacher_BK": taught}
    else:
        taught = score_likelihood(model.language, visual, inputs["frame_mask_BK"], *findings)
    mask = inputs["frame_mask_BK"]
    redundancy = redundancy_loss(scores, taught, mask, teacher, temperature).detach()
    outputs = model(**inputs, teach=True, **extra)
    assert float(redundancy) > 0.1
    assert float(outputs["redundancy"]) == pytest.approx(float(redundancy), rel=1e-5)
    expected = language + 0.37 * float(redundancy)
    assert float(outputs["loss"].detach()) == pytest.approx(expected, rel=1e-4)
    assert model(**inputs)["redundancy"] == 0  # before its time


@pytest.mark.parametrize("strategy", ["adaptive", "first", "each", "all", "mean"])
def test_a_padded_batch_is_its_groups_one_by_one(
    make_model, make_inputs, take_one, strategy
) -> None:
    model = make_model(selection={"strategy": strategy, "teacher": "likelihood"}).train()
    counts = (3, 1, 2)
    inputs = make_inputs(counts, strategy)
    together = model(**inputs, teach=True)
    alone = [model(**take_one(inputs, row), teach=True) for row in range(3)]
    repeats = counts if strategy == "each" else (1, 1, 1)  # rows of the language model
    language = np.average([float(out["language"]) for out in alone], weights=repeats)
    redundancy = np.mean([float(out["redundancy"]) for out in alone])
    assert alone[1]["redundancy"] == 0  # k = 1
    assert float(together["language"]) == pytest.approx(language, rel=1e-4)
    assert float(together["redundancy"]) == pytest.approx(redundancy, rel=1e-4)


def test_only_answers_are_learned(make_model, make_inputs) -> None:
    model = make_model(selection={"teacher": "none"})
    inputs = make_inputs()
    loss = model(**inputs)["language"]
    last = inputs["text_mask_BS"].sum(-1) - 1
    changed = inputs["labels_BS"].clone()
    changed[0, last[0]] = (changed[0, last[0]] + 1) % 90
    assert model(**{**inputs, "labels_BS": changed})["language"] != loss
    # A label masked in addition takes its token out of its row's mean.
    changed[0, last[0]] = IGNORED
    best = best_frames(model, inputs)
    rows = [losses_by_hand(model, inputs, row, [best[row]]) for row in (0, 1)]
    expected = mean_of_rows([rows[0][:-1], rows[1]])
    masked = float(model(**{**inputs, "labels_BS": changed})["language"])
    assert masked == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("strategy", ["adaptive", "each"])
def test_an_exam_s_loss_is_the_mean_of_its_conversations(make_model, make_inputs, strategy) -> None:
    """Two rows of one exam, joined behind the frame, lose what they lose one by one."""
    model = make_model(selection={"teacher": "none", "strategy": strategy})
    inputs = make_inputs((3, 3))
    inputs["features"] = {n: f[:1].expand_as(f) for n, f in inputs["features"].items()}
    alone = [model(**{**inputs, **only(inputs, row)})["language"] for row in (0, 1)]
    begin = 2 + T
    ids, labels, mask = (inputs[name] for name in ("input_ids_BS", "labels_BS", "text_mask_BS"))
    joined = [torch.cat([x[0][mask[0]], x[1][mask[1]][begin:]])[None] for x in (ids, labels)]
    first = int(mask[0].sum()) - begin
    numbers = torch.tensor([[0] * begin + [1] * first + [2] * (joined[0].shape[1] - begin - first)])
    both = {
        **inputs,
        "features": {n: f[:1] for n, f in inputs["features"].items()},
        "frame_mask_BK": inputs["frame_mask_BK"][:1],
        "input_ids_BS": joined[0],
        "labels_BS": joined[1],
        "text_mask_BS": torch.ones_like(numbers, dtype=torch.bool),
        "conversation_BS": numbers,
        "findings_ids_BS": inputs["findings_ids_BS"][:1],
        "findings_mask_BS": inputs["findings_mask_BS"][:1],
    }
    expected = (float(alone[0]) + float(alone[1])) / 2
    assert abs(float(alone[0]) - float(alone[1])) > 1e-3
    assert float(model(**both)["language"]) == pytest.approx(expected, rel=1e-4)
    missing = {name: value for name, value in both.items() if name != "conversation_BS"}
    assert float(model(**missing)["language"]) != pytest.approx(expected, rel=1e-4)


def only(inputs, row: int):
    """The text of both rows is that of one."""
    names = ("input_ids_BS", "labels_BS", "text_mask_BS")
    return {name: inputs[name][row].expand_as(inputs[name]) for name in names}


PARTS = {
    "align": ("projectors", "alpha", "scorer"),
    "instruct": ("projectors", "alpha", "scorer", "lora"),
    "whole": ("projectors", "alpha", "scorer", "language"),
    "alpha": ("alpha",),
}


@pytest.mark.parametrize("stage", list(PARTS))
@pytest.mark.parametrize("strategy", ["adaptive", "all"])
def test_gradients_reach_exactly_the_declared_parameters(
    make_model, make_inputs, stage, strategy
) -> None:
    changes = {"language": {"lora": None}} if stage == "whole" else {}
    model = make_model(selection={"strategy": strategy}, **changes).train()
    chosen = select_trainable(model, PARTS[stage])
    teacher_BK = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.1, 0.0]])
    outputs = model(**make_inputs((3, 2), strategy), teach=True, teacher_BK=teacher_BK)
    outputs["loss"].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for names in chosen.values() for name in names}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "strategy", ["adaptive", "first", "random", "each", "all", "mean", "composite"]
)
@pytest.mark.parametrize("pool", ["max", "attention"])
def test_every_trained_parameter_has_a_gradient_in_every_step(
    make_model, make_inputs, strategy, pool
) -> None:
    # ZeRO waits for all of them: without a redundancy loss the scorer's is zero, not absent.
    changes = {"strategy": strategy, "gradient": "hard", "pool": pool}
    model = make_model(selection=changes).train()
    select_trainable(model, PARTS["instruct"])
    counts = (1, 1) if strategy == "composite" else (3, 2)
    model(**make_inputs(counts, strategy))["loss"].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


@pytest.mark.parametrize("pool", ["max", "mean", "attention"])
@pytest.mark.parametrize("gradient", ["straight_through", "gumbel", "soft", "hard"])
def test_the_answer_teaches_the_scorer_unless_the_choice_is_hard(
    make_model, make_inputs, pool, gradient
) -> None:
    model = make_model(selection={"pool": pool, "gradient": gradient}).train()
    select_trainable(model, PARTS["align"])
    torch.manual_seed(0)
    outputs = model(**make_inputs())
    outputs["loss"].backward()
    assert torch.isfinite(outputs["loss"])
    for name, parameter in model.scorer.named_parameters():
        assert torch.isfinite(parameter.grad).all()
        assert bool(parameter.grad.any()) == (gradient != "hard"), name
    # The redundancy loss does in any case.
    model.zero_grad()
    teacher_BK = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.1, 0.0]])
    model(**make_inputs(), teach=True, teacher_BK=teacher_BK)["loss"].backward()
    assert all(parameter.grad.any() for parameter in model.scorer.parameters())


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_an_alpha_that_the_stage_does_not_name_stays_as_it_is(
    make_model, make_inputs, projector, alpha
) -> None:
    model = make_model(fusion={"projector": projector, "alpha": alpha}).train()
    select_trainable(model, ("projectors", "scorer", "lora"))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert "fusion.alpha" not in trained
    before = {n: p.detach().clone() for n, p in trained.items()}
    inputs = make_inputs()
    model(**inputs)["loss"].backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
    assert model.fusion.alpha.tolist() == [alpha]
    moved = {n for n, p in trained.items() if not torch.equal(p.detach(), before[n])}
    heard = {"clip": alpha > 0, "sam": alpha < 1}
    for encoder, counts in heard.items():
        names = {n for n in trained if n.startswith(f"fusion.projectors.{encoder}.")}
        assert len(names) == (2 if projector == "linear" else 4)
        assert moved & names == (names if counts else set())
    alone = {
        name: model.fusion.projectors[name](
            torch.nn.functional.layer_norm(features, features.shape[-1:])
        )
        for name, features in inputs["features"].items()
    }
    expected = {0.0: alone["sam"], 0.5: (alone["clip"] + alone["sam"]) / 2, 1.0: alone["clip"]}
    torch.testing.assert_close(model.fusion(inputs["features"]), expected[alpha])


WIDTHS = {"clip": 20, "sam": 36, "dinov2": 28}


@pytest.mark.parametrize(
    "names", [("clip",), ("sam",), ("dinov2",), ("dinov2", "clip"), ("sam", "dinov2")]
)
def test_one_encoder_or_any_two_train(make_model, make_inputs, names) -> None:
    vision = [{"name": name, "weights": "-", "width": WIDTHS[name]} for name in names]
    model = make_model(vision={"encoders": vision}).train()
    inputs = make_inputs()
    inputs["features"]["dinov2"] = torch.randn(2, 3, T, 28)  # those of others are left alone
    parts = PARTS["instruct"] if len(names) == 2 else ("projectors", "scorer", "lora")
    select_trainable(model, parts)
    assert {c.part for c in count_parts(model) if c.trainable} == set(parts)
    assert (model.fusion.alpha is None) == (len(names) == 1)
    model(**inputs)["loss"].backward()
    for name in names:
        assert model.fusion.projectors[name].weight.grad.any()
    assert len(model.fusion.projectors) == len(names)


def make_frame(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (17 + seed, 23, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


GROUPS = [[make_frame(i) for i in range(3)], [make_frame(3)], [make_frame(4), make_frame(5)]]


@pytest.fixture(scope="module")
def encoders(make_config):
    return FrozenEncoders(make_config())


def make_branch(model, encoders) -> VisualBranch:
    return VisualBranch(model.config, encoders, model.fusion, model.scorer)


def test_looking_picks_what_training_would_show(make_model, encoders) -> None:
    model = make_model()
    looked = make_branch(model, encoders).look(GROUPS)
    picks = []
    for group, seen in zip(GROUPS, looked, strict=True):
        features = {n: torch.from_numpy(f)[None] for n, f in encoders([group])[0].items()}
        inputs = {"features": features, "frame_mask_BK": torch.ones(1, len(group)).bool()}
        (best,) = best_frames(model, inputs)
        assert seen.chosen == best == int(np.argmax(seen.scores_K))
        assert len(seen.scores_K) == len(group)
        # What the language model reads in training.
        visual = model.fusion(features)
        scores = model.scorer(visual, inputs["frame_mask_BK"])
        gates = gate_frames(scores, model.config.selection, training=True)
        shown = Groups(visual, scores, gates, inputs["frame_mask_BK"])
        _, trained = model.strategy.arrange(shown)
        assert seen.tokens_TD.dtype == np.float32
        np.testing.assert_allclose(seen.tokens_TD, trained.detach(), rtol=1e-3, atol=1e-4)
        picks.append(best)
    assert max(picks) > 0


def test_looking_at_groups_together_or_one_by_one_is_the_same(make_model, encoders) -> None:
    branch = make_branch(make_model(), encoders)
    for together, group in zip(branch.look(GROUPS), GROUPS, strict=True):
        (alone,) = branch.look([group])
        assert alone.chosen == together.chosen
        np.testing.assert_allclose(alone.scores_K, together.scores_K, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(alone.tokens_TD, together.tokens_TD, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strategy", ["first", "random", "each", "all", "mean", "composite"])
def test_other_strategies_show_their_frames(make_model, encoders, strategy) -> None:
    model = make_model(selection={"strategy": strategy})
    branch = make_branch(model, FrozenEncoders(model.config))
    (seen,) = branch.look(GROUPS[:1])
    visual_KTD = model.fusion({n: torch.from_numpy(f) for n, f in encoders(GROUPS[:1])[0].items()})
    if strategy == "all":
        expected = visual_KTD.reshape(3 * T, D)
        assert seen.chosen == int(np.argmax(seen.scores_K))
    elif strategy == "mean":
        expected = (visual_KTD[0] + visual_KTD[1] + visual_KTD[2]) / 3
        assert seen.chosen == int(np.argmax(seen.scores_K))
    elif strategy == "first":
        expected = visual_KTD[0]
        assert seen.chosen == 0
    elif strategy == "composite":
        file = io.BytesIO()
        compose(GROUPS[0]).save(file, "PNG")
        (picture,) = encoders([[file.getvalue()]])
        (expected,) = model.fusion({n: torch.from_numpy(f) for n, f in picture.items()})
        assert seen.chosen == 0
        assert len(set(seen.scores_K)) == 1  # all frames are in the one picture
    else:
        # Drawn from the frames themselves: the first 8 bytes of their digest.
        number = int(content_digest(GROUPS[0])[:16], 16)
        assert seen.chosen == number % 3
        expected = visual_KTD[seen.chosen]
    assert len(seen.scores_K) == 3
    assert len(seen.tokens_TD) == num_visual_tokens(model.config, 3)
    np.testing.assert_allclose(seen.tokens_TD, expected.detach(), rtol=1e-3, atol=1e-4)
    (again,) = branch.look(GROUPS[:1])
    assert again.chosen == seen.chosen


def test_a_group_without_frames_is_refused(make_model, encoders) -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        make_branch(make_model(), encoders).look([GROUPS[0], []])
