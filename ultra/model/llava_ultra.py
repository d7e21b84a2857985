"""LLaVA-Ultra: frame groups and conversations in, losses out; and the encoder side alone.

Shapes: B groups, K frames of a group (padded), T visual tokens of a frame, S text tokens, D width
of the language model, R rows of text, V all visual tokens of a batch in row order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ultra.config import ModelConfig
from ultra.model.encoders import FrozenEncoders, Pixels
from ultra.model.language import LanguageBranch, conversation_losses, token_losses
from ultra.model.selection import FrameScorer, choice_entropy, gate_frames, redundancy_loss
from ultra.model.splice import splice
from ultra.model.strategies import Groups, find_strategy
from ultra.model.teacher import score_likelihood
from ultra.model.vision import Fusion
from ultra.types import IGNORED, VisualTokens


class LlavaUltra(nn.Module):
    """All that trains: fusion, scorer and language model; the encoders' features come in.

    Raises:
        ConfigError: for an unknown strategy.
    """

    def __init__(self, config: ModelConfig, language: LanguageBranch) -> None:
        super().__init__()
        self.config = config
        self.strategy = find_strategy(config)
        self.fusion = Fusion(config.vision, config.fusion, language.width, language.embedding_std)
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
        conversation_BS: Tensor | None = None,
        teach: bool = False,
        teacher_BK: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return `loss`, the `language` and `redundancy` losses it is made of, and `entropy`.

        Out of training also `nats`, the loss summed over the answers' `tokens`, and `chosen_B`, the
        frames with the highest scores.

        Args:
            features: encoder name -> (B, K, T, F); a composite is a group's only frame.
            frame_mask_BK: True where a frame is real.
            input_ids_BS: text ids with VISUAL places.
            labels_BS: ids on assistant turns, IGNORED elsewhere.
            text_mask_BS: True where a token is real.
            findings_ids_BS: the text the teacher reads.
            findings_mask_BS: True where a findings token is real.
            conversation_BS: of each token, as in `Batch`; None for rows of one conversation.
            teach: whether the redundancy loss counts in this step.
            teacher_BK: the attention teacher's scores, where that is the teacher.
        """
        selection = self.config.selection
        visual_BKTD = self.fusion(features)
        scores_BK = self.scorer(visual_BKTD, frame_mask_BK)
        gates_BK = gate_frames(scores_BK, selection, self.training)
        rows_R, visual_VD = self.strategy.arrange(
            Groups(visual_BKTD, scores_BK, gates_BK, frame_mask_BK)
        )
        ids, labels, mask = input_ids_BS[rows_R], labels_BS[rows_R], text_mask_BS[rows_R]
        number = None if conversation_BS is None else conversation_BS[rows_R]
        logits = self.language(splice(self.language.embedding, ids, visual_VD), mask, number)
        losses_RS = token_losses(logits, labels)
        language = conversation_losses(losses_RS, labels, number).mean()
        redundancy = language.new_zeros(())
        if teach:
            if teacher_BK is None:
                teacher_BK = score_likelihood(
                    self.language, visual_BKTD, frame_mask_BK, findings_ids_BS, findings_mask_BS
                )
            kind, temperature = selection.teacher, selection.teacher_temperature
            redundancy = redundancy_loss(scores_BK, teacher_BK, frame_mask_BK, kind, temperature)
        loss = language + selection.redundancy_weight * redundancy
        # Every trained parameter takes part in every step, whatever the strategy.
        loss = loss + 0 * scores_BK.masked_fill(~frame_mask_BK, 0).sum()
        outputs = {
            "loss": loss,
            "language": language.detach(),
            "redundancy": redundancy.detach(),
            "entropy": choice_entropy(scores_BK.detach()),
        }
        return outputs if self.training else outputs | _measure(losses_RS, labels, scores_BK)


def _measure(losses_RS: Tensor, labels_RS: Tensor, scores_BK: Tensor) -> dict[str, Tensor]:
    count = (labels_RS[:, 1:] != IGNORED).sum()
    return {"nats": losses_RS.sum(), "tokens": count, "chosen_B": scores_BK.argmax(-1)}


@dataclass(frozen=True, slots=True)
class Picture:
    """All that the choice among a group's pictures, and the language model, read of one.

    Attributes:
        visual_TD: float32 H_v.
        score: its feature score.
    """

    visual_TD: NDArray[np.float32]
    score: float


@dataclass(frozen=True, slots=True)
class VisualBranch:
    """The encoder side: frames in, the visual tokens of the chosen frame out.

    It needs no language model: at inference the feature score alone chooses. Without encoders it
    chooses from features only.
    """

    config: ModelConfig
    encoders: FrozenEncoders | None
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
        assert self.encoders is not None, "frames need the encoders"
        features = self.encoders.encode(groups)
        num_pictures = find_strategy(self.config).num_pictures
        results = []
        start = 0
        for group in groups:
            end = start + num_pictures(len(group))
            results.append(self.choose({n: f[None, start:end] for n, f in features.items()}, group))
            start = end
        return results

    def choose(self, features: Mapping[str, Tensor], frames: Sequence[bytes]) -> VisualTokens:
        """Return the visual tokens of one group, given its (1, K, T, F) features."""
        return self.show(self._fuse(features), frames)

    def encode(self, pixels: Sequence[Pixels]) -> list[Picture]:
        """Return what the model knows of pictures, whichever groups they are of."""
        assert self.encoders is not None, "pixels need the encoders"
        features = self.encoders.encode_pixels(pixels)
        return self._fuse({name: tensor[None] for name, tensor in features.items()})

    @torch.inference_mode()
    def show(self, pictures: Sequence[Picture], frames: Sequence[bytes]) -> VisualTokens:
        """Return the visual tokens of one group, given its pictures.

        The frames of a composite share its score.
        """
        visual_1KTD = torch.from_numpy(np.stack([p.visual_TD for p in pictures]))[None]
        scores_1K = torch.tensor([[picture.score for picture in pictures]])
        tokens_VD, chosen = show_group(self.config, visual_1KTD, scores_1K, draw_number(frames))
        scores = scores_1K[0].expand(len(frames)).tolist()
        return VisualTokens(tokens_VD.numpy(), chosen, tuple(scores))

    @torch.inference_mode()
    def _fuse(self, features: Mapping[str, Tensor]) -> list[Picture]:
        visual_1KTD = self.fusion(features)
        scores_1K = self.scorer(visual_1KTD, all_real(visual_1KTD))
        visual_KTD = visual_1KTD[0].float().cpu().numpy()
        # Copies, for a view of one that is kept would keep all of them.
        return list(map(Picture, map(np.copy, visual_KTD), scores_1K[0].tolist()))


def show_group(
    config: ModelConfig, visual_1KTD: Tensor, scores_1K: Tensor, draw: int
) -> tuple[Tensor, int]:
    """Return what inference shows of one group: visual_VD, and the picture the answer rests on.

    Args:
        config: names the strategy.
        visual_1KTD: H_v of every picture.
        scores_1K: their feature scores.
        draw: what `draw_number` gives of the frames.
    """
    gates_1K = gate_frames(scores_1K, config.selection, training=False)
    group = Groups(visual_1KTD, scores_1K, gates_1K, all_real(visual_1KTD))
    return find_strategy(config).show(group, draw)


def all_real(visual_BKTD: Tensor) -> Tensor:
    """Return the mask_BK of groups without padding."""
    return torch.ones(visual_BKTD.shape[:2], dtype=torch.bool, device=visual_BKTD.device)


def draw_number(frames: Sequence[bytes]) -> int:
    """Return the number that strategies draw with: from the frames, so that answers repeat."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(f).digest() for f in frames)).digest()
    return int.from_bytes(digest[:8], "big")
