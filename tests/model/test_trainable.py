"""A stage trains exactly the parts it names."""

from __future__ import annotations

import pytest
import torch

from ultra.model.trainable import count_parts, part_of, select_trainable

LINEAR_OF_A_LAYER = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_align_trains_projectors_alpha_and_scorer(make_model) -> None:
    model = make_model()
    chosen = select_trainable(model, ["projectors", "alpha", "scorer"])
    assert chosen == {
        "projectors": [
            f"fusion.projectors.{encoder}.{kind}"
            for encoder in ("clip", "sam")
            for kind in ("weight", "bias")
        ],
        "alpha": ["fusion.alpha"],
        "scorer": ["scorer.weight"],
    }
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert training == {name for names in chosen.values() for name in names}


def test_lora_is_every_linear_layer_of_the_decoder_twice(make_model) -> None:
    model = make_model()
    names = select_trainable(model, ["lora"])["lora"]
    assert len(names) == 3 * len(LINEAR_OF_A_LAYER) * 2
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == LINEAR_OF_A_LAYER
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_a_later_stage_takes_back_what_it_does_not_name(make_model) -> None:
    model = make_model()
    select_trainable(model, ["projectors", "lora"])
    select_trainable(model, ["scorer"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["scorer.weight"]


def test_the_whole_language_model(make_model) -> None:
    model = make_model(language={"lora": None})
    names = select_trainable(model, ["language"])["language"]
    assert set(names) == {f"language.model.{n}" for n, _ in model.language.base.named_parameters()}


def test_counts(make_model) -> None:
    model = make_model()
    select_trainable(model, ["alpha", "lora"])
    counts = {c.part: (c.parameters, c.trainable) for c in count_parts(model)}
    widths = {"q_proj": (24, 24), "k_proj": (24, 12), "v_proj": (24, 12), "o_proj": (24, 24)}
    widths |= {"gate_proj": (24, 40), "up_proj": (24, 40), "down_proj": (40, 24)}
    assert counts == {
        "projectors": (20 * 24 + 24 + 36 * 24 + 24, False),
        "alpha": (1, True),
        "scorer": (24, False),
        "lora": (3 * sum(8 * (fan_in + fan_out) for fan_in, fan_out in widths.values()), True),
        "language": (sum(p.numel() for p in base_parameters(model)), False),
    }


def base_parameters(model) -> list[torch.nn.Parameter]:
    return [p for n, p in model.language.named_parameters() if ".lora_" not in n]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"language": {"lora": None}}, "lora"),
        (
            {"vision": {"encoders": [{"name": "clip", "weights": "-", "width": 20}]}},
            "alpha",
        ),
    ],
)
def test_a_part_the_model_lacks_is_refused(make_model, changes, part) -> None:
    with pytest.raises(ValueError, match=f"trainable: this model has no parameters in '{part}'"):
        select_trainable(make_model(**changes), [part])


def test_a_parameter_of_no_part_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter fusion\.gate belongs to no part"):
        part_of("fusion.gate")
