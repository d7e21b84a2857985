"""LLaVA-Ultra: frame groups and conversations in, losses out; and the encoder side alone.

Shapes: B groups, K frames of a group (padded), T visual tokens of a frame, S text tokens, D width
of the language model, V all visual tokens of a batch in row order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ultra.config import ModelConfig
from ultra.model.encoders import FrozenEncoders
from ultra.model.language import LanguageBranch, conversation_losses
from ultra.model.selection import FrameScorer, choice_entropy, gate_frames, redundancy_loss
from ultra.model.splice import splice
from ultra.model.teacher import score_likelihood
from ultra.model.vision import Fusion
from ultra.types import VisualTokens


class LlavaUltra(nn.Module):
    """All that trains: fusion, scorer and language model; the encoders' features come in."""

    def __init__(self, config: ModelConfig, language: LanguageBranch) -> None:
        super().__init__()
        self.config = config
        std = float(language.embedding.weight.float().std())
        self.fusion = Fusion(config.vision, config.fusion, language.width, std)
        self.scorer = FrameScorer(language.width, config.selection.pool)
        self.language = language

    def forward(
        self,
        features: Mapping[str, Tensor],
        frame_mask_BK: Tensor,
        input_ids_BS: Tensor,
        labels_BS: Tensor,
        text_mask_BS: Tensor,
        findings_ids_BS: Tensor,
        findings_mask_BS: Tensor,
        teach: bool = False,
        teacher_BK: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, the `language` and `redundancy` losses it is made of, and `entropy`.

        Args:
            features: encoder name -> (B, K, T, F).
            frame_mask_BK: True where a frame is real.
            input_ids_BS: text ids with VISUAL places.
            labels_BS: ids on assistant turns, IGNORED elsewhere.
            text_mask_BS: True where a token is real.
            findings_ids_BS: the text the teacher reads.
            findings_mask_BS: True where a findings token is real.
            teach: whether the redundancy loss counts in this step.
            teacher_BK: the attention teacher's scores, where that is the teacher.
        """
        selection = self.config.selection
        visual_BKTD = self.fusion(features)
        scores_BK = self.scorer(visual_BKTD, frame_mask_BK)
        rows, visual_VD = self._arrange(visual_BKTD, scores_BK, frame_mask_BK)
        ids, labels, mask = input_ids_BS[rows], labels_BS[rows], text_mask_BS[rows]
        logits = self.language(splice(self.language.embedding, ids, visual_VD), mask)
        language = conversation_losses(logits, labels).mean()
        redundancy = language.new_zeros(())
        if teach:
            if teacher_BK is None:
                teacher_BK = score_likelihood(
                    self.language, visual_BKTD, findings_ids_BS, findings_mask_BS
                )
            redundancy = redundancy_loss(
                scores_BK,
                teacher_BK,
                frame_mask_BK,
                selection.teacher,
                selection.teacher_temperature,
            )
        loss = language + selection.redundancy_weight * redundancy
        # Every trained parameter takes part in every step, whatever the strategy.
        loss = loss + 0 * scores_BK.masked_fill(~frame_mask_BK, 0).sum()
        return {
            "loss": loss,
            "language": language.detach(),
            "redundancy": redundancy.detach(),
            "entropy": choice_entropy(scores_BK.detach()),
        }

    def _arrange(
        self, visual_BKTD: Tensor, scores_BK: Tensor, mask_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return which text row goes with which visual tokens, and those tokens as (V, D)."""
        rows_B = torch.arange(len(mask_BK), device=mask_BK.device)
        strategy = self.config.selection.strategy
        if strategy == "adaptive":
            gates_BK = gate_frames(scores_BK, self.config.selection, self.training)
            visual_BTD = torch.einsum("bk,bktd->btd", gates_BK.to(visual_BKTD.dtype), visual_BKTD)
            return rows_B, visual_BTD.flatten(0, 1)
        if strategy == "each":
            return mask_BK.nonzero()[:, 0], visual_BKTD[mask_BK].flatten(0, 1)
        if strategy == "all":
            return rows_B, visual_BKTD[mask_BK].flatten(0, 1)
        frame_B = torch.zeros_like(rows_B)
        if strategy == "random":
            frame_B = torch.multinomial(mask_BK.float(), 1)[:, 0]
        return rows_B, visual_BKTD[rows_B, frame_B].flatten(0, 1)


@dataclass(frozen=True, slots=True)
class VisualBranch:
    """The encoder side: frames in, the visual tokens of the chosen frame out.

    It needs no language model: at inference the feature score alone chooses.
    """

    config: ModelConfig
    encoders: FrozenEncoders
    fusion: Fusion
    scorer: FrameScorer

    @torch.inference_mode()
    def look(self, groups: Sequence[Sequence[bytes]]) -> list[VisualTokens]:
        """Return the visual tokens of each group of encoded frames.

        All frames of all groups go through the encoders together.

        Raises:
            ValueError: for a group without frames.
        """
        if not all(groups):
            raise ValueError("a frame group needs at least one frame")
        features = self.encoders.encode(groups)
        results = []
        start = 0
        for group in groups:
            part = {name: f[None, start : start + len(group)] for name, f in features.items()}
            start += len(group)
            results.append(self.choose(part, group))
        return results

    @torch.inference_mode()
    def choose(self, features: Mapping[str, Tensor], frames: Sequence[bytes]) -> VisualTokens:
        """Return the visual tokens of one group, given its (1, K, T, F) features."""
        visual_1KTD = self.fusion(features)
        mask_1K = torch.ones(visual_1KTD.shape[:2], dtype=torch.bool, device=visual_1KTD.device)
        scores_K = self.scorer(visual_1KTD, mask_1K)[0]
        strategy = self.config.selection.strategy
        if strategy == "first":
            chosen = 0
        elif strategy in {"random", "each"}:
            # The same exam gives the same answer: the draw comes from the frames themselves.
            digest = hashlib.sha256(b"".join(hashlib.sha256(f).digest() for f in frames)).digest()
            chosen = int.from_bytes(digest[:8], "big") % len(frames)
        else:
            chosen = int(scores_K.argmax())
        tokens = visual_1KTD[0].flatten(0, 1) if strategy == "all" else visual_1KTD[0, chosen]
        scores = tuple(float(s) for s in scores_K)
        return VisualTokens(tokens.float().cpu().numpy(), chosen, scores)
