"""What an answer rests on: tokens that scored, encoders alone and fused, and where it looked.

Shapes: K pictures of a group, T visual tokens of a picture, F channels of an encoder, D width of
the language model, S tokens of a row, V visual tokens among them, P pictures they show, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultra.config import ModelConfig
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import all_real, show_group
from ultra.model.selection import FrameScorer
from ultra.model.splice import splice
from ultra.model.teacher import Gather
from ultra.model.vision import Fusion
from ultra.types import IGNORED, VISUAL

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Understanding:
    """Why one exam's picture was chosen, and what its answer read of it.

    Attributes:
        chosen: index of the picture that the answer rests on.
        token_scores_KT: w . LN(h_t) of every visual token, before Eq. 3 pools them.
        scores_K: the feature scores (Eq. 3) of the fused tokens.
        encoder_scores: encoder name -> scores_K of its projection alone; empty with one encoder.
        alpha: the first encoder's weight (Eq. 2); None with one encoder.
        attention_T: the share of the answer's attention that each visual token of the chosen
            picture gets.
    """

    chosen: int
    token_scores_KT: Array
    scores_K: Array
    encoder_scores: Mapping[str, Array]
    alpha: float | None
    attention_T: Array


@torch.no_grad()
def understand(
    config: ModelConfig,
    fusion: Fusion,
    scorer: FrameScorer,
    language: LanguageBranch,
    features: Mapping[str, Tensor],
    ids: Sequence[int],
    labels: Sequence[int],
    draw: int = 0,
    gather: Gather | None = None,
) -> Understanding:
    """Return what the answer about one exam rests on, as inference shows the exam.

    The model is left as it was, and nothing is drawn at random.

    Args:
        config: of the model.
        fusion: Eq. 2.
        scorer: Eq. 3.
        language: reads the row; LoRA counts.
        features: encoder name -> (1, K, T, F).
        ids: prompt and answer, with a VISUAL place for each visual token that the strategy shows.
        labels: the answer's ids at its places, IGNORED elsewhere.
        draw: what `draw_number` gives of the frames, for strategies that draw.
        gather: makes partitioned parameters whole (ZeRO-3), for all ranks alike.

    Raises:
        ValueError: for a row without an answer, or with other visual tokens than are shown.
    """
    projected, visual_1KTD = fusion.project(features), fusion(features)
    mask_1K = all_real(visual_1KTD)
    scores_1K = scorer(visual_1KTD, mask_1K)
    visual_VD, chosen = show_group(config, visual_1KTD, scores_1K, draw)
    small = [p for p in (fusion.alpha, *scorer.parameters()) if p is not None]
    with gather(small) if gather is not None else nullcontext():
        token_scores_KT = scorer.score_tokens(visual_1KTD)[0]
        alpha = None if fusion.alpha is None else float(fusion.alpha[0])
    row_1S = torch.tensor([list(ids)], device=visual_1KTD.device)
    attention_V = read_attention(language, row_1S, labels, visual_VD)
    attention_PT = attention_V.view(-1, visual_1KTD.shape[2])
    # Where every picture is shown, its own part counts; else what is shown stands for the choice.
    every = len(attention_PT) == visual_1KTD.shape[1]
    return Understanding(
        chosen,
        _numpy(token_scores_KT),
        _numpy(scores_1K[0]),
        {n: _numpy(scorer(h, mask_1K)[0]) for n, h in projected.items() if alpha is not None},
        alpha,
        _numpy(attention_PT[chosen] if every else attention_PT.sum(0)),
    )


def read_attention(
    language: LanguageBranch, row_1S: Tensor, labels: Sequence[int], visual_VD: Tensor
) -> Tensor:
    """Return attention_V: what the answer's tokens give to each visual token, in float32.

    The mean over layers, heads and the places that the answer's tokens are predicted at, of the
    attention after its softmax. So the rest, up to 1, goes to text.

    Raises:
        ValueError: as `understand`.
    """
    places_S = row_1S[0] == VISUAL
    answer_S = torch.tensor([*labels[1:], IGNORED], device=row_1S.device) != IGNORED
    if not answer_S.any():
        raise ValueError("a row without an answer has no attention to read")
    embeds_1SD = splice(language.embedding, row_1S, visual_VD)
    layers: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        weights_HSS = output[1][0]
        layers.append(weights_HSS[:, answer_S][:, :, places_S].float().mean((0, 1)))

    with _watch_attention(language, keep):
        language(embeds_1SD, torch.ones_like(row_1S, dtype=torch.bool))
    return torch.stack(layers).mean(0)


@contextmanager
def _watch_attention(language: LanguageBranch, keep: Callable[..., None]) -> Iterator[None]:
    """Have every layer's attention pass through `keep`, without dropout, for the block."""
    before = language.base.config._attn_implementation
    training = [module for module in language.modules() if module.training]
    layers: Iterable[Any] = language.layers
    hooks = [layer.self_attn.register_forward_hook(keep) for layer in layers]
    language.eval()
    language.base.set_attn_implementation("eager")  # the fused kernels return no weights
    try:
        yield
    finally:
        language.base.set_attn_implementation(before)
        for module in training:
            module.training = True
        for hook in hooks:
            hook.remove()


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array
