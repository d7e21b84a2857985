"""How a group's frames become what the language model reads: one entry of STRATEGIES each.

Shapes: B groups, K pictures of a group (padded, with a mask), T visual tokens of a picture, D width
of the language model, R rows of text, V the visual tokens of all rows in order. A picture is a
frame, or all that a strategy composes into one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ultra.config import ConfigError, ModelConfig
from ultra.model.pictures import compose, decode


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups as a strategy gets them.

    Attributes:
        visual_BKTD: H_v of every picture (Eq. 2).
        scores_BK: their feature scores (Eq. 3).
        gates_BK: weights by the feature score, as `selection.gradient` has them; the best picture
            outside training.
        mask_BK: True where a picture is real.
    """

    visual_BKTD: Tensor
    scores_BK: Tensor
    gates_BK: Tensor
    mask_BK: Tensor

    @property
    def rows_B(self) -> Tensor:
        """The number of each group, which is that of its row of text."""
        return torch.arange(len(self.mask_BK), device=self.mask_BK.device)


Arrange = Callable[[Groups], tuple[Tensor, Tensor]]
"""Groups -> rows_R, the row of text that goes with each show, and visual_VD, what is shown."""

Show = Callable[[Groups, int], tuple[Tensor, int]]
"""One group and a number drawn from its content -> visual_VD and the picture it rests on."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """How groups are shown to the language model.

    Attributes:
        arrange: in training.
        show: at inference.
        num_shown: pictures of a group -> how many times T visual tokens a row of text has.
        compose: makes one picture of the frames of a group before the encoders see them; None
            leaves every frame a picture of its own.
        scored: whether the feature score chooses, so that there is something to teach it.
    """

    arrange: Arrange
    show: Show
    num_shown: Callable[[int], int] = lambda num_pictures: 1
    compose: Callable[[Sequence[bytes]], Image.Image] | None = None
    scored: bool = False

    def num_pictures(self, num_frames: int) -> int:
        """Return how many pictures the encoders see of a group of so many frames."""
        return 1 if self.compose else num_frames

    def parts(self, frames: Sequence[bytes]) -> list[tuple[bytes, ...]]:
        """Return the encoded frames that each picture of a group is made of."""
        return [tuple(frames)] if self.compose else [(frame,) for frame in frames]

    def picture(self, part: Sequence[bytes]) -> Image.Image:
        """Return the picture that the encoders see of one of `parts`."""
        return self.compose(part) if self.compose else decode(part[0])

    def pictures(self, frames: Sequence[bytes]) -> Iterator[Image.Image]:
        """Yield the pictures that the encoders see of a group's encoded frames."""
        return map(self.picture, self.parts(frames))


def find_strategy(config: ModelConfig) -> Strategy:
    """Return the strategy that a configuration names.

    Raises:
        ConfigError: when there is none of that name.
    """
    name = config.selection.strategy
    if name not in STRATEGIES:
        allowed = ", ".join(STRATEGIES)
        raise ConfigError(f"model.selection.strategy: unknown {name!r}; allowed: {allowed}")
    return STRATEGIES[name]


def num_visual_tokens(config: ModelConfig, num_frames: int) -> int:
    """Return how many visual tokens the language model reads of a group of so many frames.

    Raises:
        ConfigError: as `find_strategy`.
    """
    strategy = find_strategy(config)
    return strategy.num_shown(strategy.num_pictures(num_frames)) * config.tokens_per_frame


def show_one(choose: Callable[[Groups, int], int]) -> Show:
    """Return what shows the picture that `choose` names."""

    def show(group: Groups, draw: int) -> tuple[Tensor, int]:
        chosen = choose(group, draw)
        return group.visual_BKTD[0, chosen], chosen

    return show


def show_arranged(arrange: Arrange) -> Show:
    """Return what shows the same as in training; the answer rests on the best scored picture."""

    def show(group: Groups, draw: int) -> tuple[Tensor, int]:
        return arrange(group)[1], _best(group, draw)

    return show


def _best(group: Groups, draw: int) -> int:
    return int(group.scores_BK[0].argmax())


def _opening(group: Groups, draw: int) -> int:
    return 0


def _drawn(group: Groups, draw: int) -> int:
    return draw % group.mask_BK.shape[1]


def _weigh(groups: Groups, weights_BK: Tensor) -> tuple[Tensor, Tensor]:
    weights_BK = weights_BK.to(groups.visual_BKTD.dtype)
    visual_BTD = torch.einsum("bk,bktd->btd", weights_BK, groups.visual_BKTD)
    return groups.rows_B, visual_BTD.flatten(0, 1)


def _gated(groups: Groups) -> tuple[Tensor, Tensor]:
    return _weigh(groups, groups.gates_BK)


def _mean(groups: Groups) -> tuple[Tensor, Tensor]:
    real_BK = groups.mask_BK.to(groups.visual_BKTD.dtype)
    return _weigh(groups, real_BK / real_BK.sum(-1, keepdim=True))


def _first(groups: Groups) -> tuple[Tensor, Tensor]:
    return groups.rows_B, groups.visual_BKTD[:, 0].flatten(0, 1)


def _random(groups: Groups) -> tuple[Tensor, Tensor]:
    picture_B = torch.multinomial(groups.mask_BK.float(), 1)[:, 0]
    return groups.rows_B, groups.visual_BKTD[groups.rows_B, picture_B].flatten(0, 1)


def _each(groups: Groups) -> tuple[Tensor, Tensor]:
    return groups.mask_BK.nonzero()[:, 0], groups.visual_BKTD[groups.mask_BK].flatten(0, 1)


def _all(groups: Groups) -> tuple[Tensor, Tensor]:
    return groups.rows_B, groups.visual_BKTD[groups.mask_BK].flatten(0, 1)


STRATEGIES: dict[str, Strategy] = {
    # The frame with the best feature score (LLaVA-Ultra, section 3.3).
    "adaptive": Strategy(_gated, show_one(_best), scored=True),
    "first": Strategy(_first, show_one(_opening)),
    # Another frame each time in training; at inference the same exam gives the same answer.
    "random": Strategy(_random, show_one(_drawn)),
    # The text with every frame, one row each, as work before LLaVA-Ultra does.
    "each": Strategy(_each, show_one(_drawn)),
    # All frames in one row (LLaVA-Ultra, section 4.2).
    "all": Strategy(_all, show_arranged(_all), num_shown=lambda num_pictures: num_pictures),
    # The average of the frames' visual tokens.
    "mean": Strategy(_mean, show_arranged(_mean)),
    # Up to four frames as one picture (Qilin-Med-VL).
    "composite": Strategy(_first, show_one(_opening), compose=compose),
}
"""`selection.strategy` -> how it shows a group."""
