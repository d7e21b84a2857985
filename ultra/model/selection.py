"""Which frame the language model sees, and how that choice learns (Eqs. 3 and 5).

Shapes: B groups, K frames of a group (padded), T visual tokens of a frame, D width of the language
model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultra.config import SelectionConfig

MASKED = -1e4
"""Score of padding. Finite, because 0 * -inf is NaN in a gradient."""


class FrameScorer(nn.Module):
    """The feature score of a frame (Eq. 3): s_i = pool_t(w . LN(h_t))."""

    def __init__(self, width: int, pool: str = "max") -> None:
        super().__init__()
        self.pool = pool
        self.weight = nn.Parameter(torch.randn(width) * 0.02)
        self.query = nn.Parameter(torch.zeros(width)) if pool == "attention" else None

    def forward(self, visual_BKTD: Tensor, mask_BK: Tensor) -> Tensor:
        """Return scores_BK in float32; padding scores MASKED."""
        scores_BKT = self.score_tokens(visual_BKTD)
        if self.query is not None:
            share_BKT = torch.softmax(_normalise(visual_BKTD) @ self.query.float(), dim=-1)
            scores_BK = (share_BKT * scores_BKT).sum(-1)
        elif self.pool == "max":
            scores_BK = scores_BKT.amax(-1)
        else:
            scores_BK = scores_BKT.mean(-1)
        return scores_BK.masked_fill(~mask_BK, MASKED)

    def score_tokens(self, visual_BKTD: Tensor) -> Tensor:
        """Return scores_BKT in float32: w . LN(h_t), before the tokens of a frame are pooled."""
        return _normalise(visual_BKTD) @ self.weight.float()


def _normalise(visual_BKTD: Tensor) -> Tensor:
    return functional.layer_norm(visual_BKTD.float(), visual_BKTD.shape[-1:])


def gate_frames(scores_BK: Tensor, config: SelectionConfig, training: bool) -> Tensor:
    """Return gates_BK that weigh the frames of a group; their forward value is the argmax.

    In training the gradient follows `config.gradient`: a straight-through softmax, the same with
    Gumbel noise, none (`hard`), or the softmax itself, forward as well (`soft`).
    """
    hard = functional.one_hot(scores_BK.argmax(-1), scores_BK.shape[-1]).to(scores_BK.dtype)
    if not training or config.gradient == "hard":
        return hard
    if config.gradient == "gumbel":
        # Padding stays out: noise is far smaller than the distance to MASKED.
        return functional.gumbel_softmax(scores_BK, tau=config.temperature, hard=True)
    soft = torch.softmax(scores_BK / config.temperature, dim=-1)
    return soft if config.gradient == "soft" else hard - soft.detach() + soft


def normalise_teacher(
    teacher_BK: Tensor, mask_BK: Tensor, kind: str, temperature: float = 1.0
) -> Tensor:
    """Return the teacher's scores of a group as probabilities (Norm of Eq. 5); padding gets none.

    `attention` scores are z-scored over the frames of a group first, because their spread is tiny
    and differs between models; `likelihood` scores are in nats already. Then a softmax of
    scores / `temperature`.
    """
    scores = teacher_BK.float()
    if kind == "attention":
        count = mask_BK.sum(-1, keepdim=True)
        kept = scores.masked_fill(~mask_BK, 0)
        mean = kept.sum(-1, keepdim=True) / count
        variance = ((kept - mean).masked_fill(~mask_BK, 0) ** 2).sum(-1, keepdim=True) / count
        scores = (scores - mean) / (variance.sqrt() + 1e-5)
    # Nothing flows back through the teacher, so padding may lie below every score for certain.
    scores = (scores / temperature).masked_fill(~mask_BK, -torch.inf)
    return torch.softmax(scores, dim=-1)


def redundancy_loss(
    scores_BK: Tensor, teacher_BK: Tensor, mask_BK: Tensor, kind: str, temperature: float = 1.0
) -> Tensor:
    """Return L_adr (Eq. 5), the mean over groups of the cross-entropy in nats.

    Between the normalised teacher, detached, and the softmax of the feature scores, in float32;
    zero for a group of one frame. `temperature` is the teacher's.
    """
    target_BK = normalise_teacher(teacher_BK, mask_BK, kind, temperature).detach()
    log_student_BK = torch.log_softmax(scores_BK.float(), dim=-1)
    return -(target_BK * log_student_BK).sum(-1).mean()


def choice_entropy(scores_BK: Tensor) -> Tensor:
    """Return the mean entropy, in nats, of the softmax over the frames of a group."""
    entropy: Tensor = torch.special.entr(torch.softmax(scores_BK.float(), dim=-1)).sum(-1).mean()
    return entropy
