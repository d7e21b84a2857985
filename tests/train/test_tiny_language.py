"""The script behind the shipped backbones: what it writes loads as what is shipped does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ultra.config import load
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch
from ultra.train.tiny_backbones import language
from ultra.train.tiny_backbones.__main__ import make_backbones


@pytest.mark.timeout(600)
def test_it_writes_backbones_of_the_shipped_kind(tmp_path: Path) -> None:
    make_backbones(tmp_path, num_patients=8, steps=2)
    shipped = load("tiny").model
    made = load(
        "tiny",
        [
            f"model.vision.encoders.0.weights={tmp_path}/clip",
            f"model.vision.encoders.1.weights={tmp_path}/sam.safetensors",
            f"model.language.weights={tmp_path}/language",
        ],
    ).model
    for ours, theirs in zip(
        FrozenEncoders(made).encoders.values(), FrozenEncoders(shipped).encoders.values(),
        strict=True,
    ):  # fmt: skip
        assert shapes(ours) == shapes(theirs)
        assert ours.digest != theirs.digest
    ours, theirs = LanguageBranch(made.language), LanguageBranch(shipped.language)
    assert shapes(ours) == shapes(theirs)
    # Every character of the simulator's reports and questions has a token of its own.
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def test_a_mixture_of_facts_weighs_each_exam_by_its_share() -> None:
    class Plain(random.Random):
        """Draws every visual token, scale 1 and the share 0.3 ** 0.5."""

        def random(self) -> float:
            return 0.3

        def uniform(self, a: float, b: float) -> float:
            return 1.0

        def choice(self, seq: Sequence[Any]) -> Any:
            return seq[-1]

    ours = language.Told([], ([3, 4], None, [5], None, [9, 9], None))
    other = language.Told([], ([3, 6], None, [7, 8], None, None, None))
    share = 0.3**0.5
    words = language._mix(ours, other, Plain(), 10)
    expected = torch.zeros(10)
    expected[3] = 0.5  # both exams say it
    expected[4], expected[6] = share / 2, (1 - share) / 2
    expected[5] = share
    expected[7] = expected[8] = (1 - share) / 2
    expected[9] = share  # a word said twice counts twice
    assert torch.allclose(words, expected.expand(language.NUM_VISUAL, -1))


def test_the_hidden_lesion_leaves_what_every_frame_shows() -> None:
    class Hiding(random.Random):
        def random(self) -> float:
            return 0.1

    words = language._mix(
        language.Told([], ([1], [2], [3], [4], [5], [6])),
        language.Told([], ([7], [7], [8], [8], [8], [8])),
        Hiding(),
        9,
    )
    assert set(words.sum(0).nonzero()[:, 0].tolist()) == {1, 2}
