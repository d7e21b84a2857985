"""Teachers of the feature score (Eq. 4): how well each frame goes with the report's findings.

Shapes: B groups, K frames of a group, T visual tokens of a frame, S findings tokens, D width of the
language model, H heads, E width of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ultra.config import ModelConfig
from ultra.model.language import LanguageBranch, token_losses
from ultra.model.splice import splice
from ultra.model.vision import Fusion
from ultra.types import IGNORED, VISUAL

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


class AttentionTeacher(nn.Module):
    """Func. b as the paper has it: attention from findings to image tokens in an early layer.

    Text and image go separately into layer `selection.teacher_layers` of a frozen snapshot; a live
    teacher would drift with what it teaches. Queries and keys are read before the rotary embedding,
    so only content counts. Of that layer nothing else is kept or computed.
    """

    def __init__(self, config: ModelConfig, language: LanguageBranch) -> None:
        super().__init__()
        from transformers import AutoModel

        settings = copy.deepcopy(language.base.config.get_text_config())
        self.layer = config.selection.teacher_layers - 1
        if self.layer >= settings.num_hidden_layers:
            raise ValueError(
                f"selection.teacher_layers is {self.layer + 1}, the language model has "
                f"{settings.num_hidden_layers} layers"
            )
        settings.num_hidden_layers = self.layer
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[: self.layer]
        self.fusion = Fusion(config.vision, config.fusion, language.width)
        # Its last norm is the one that the layer itself begins with.
        self.decoder: Any = AutoModel.from_config(settings, dtype=language.base.dtype)
        last: Any = language.layers[self.layer]
        self.query, self.key = (_like(p) for p in (last.self_attn.q_proj, last.self_attn.k_proj))
        self.bos_token_id = language.tokenizer.bos_token_id
        self.head_width = getattr(settings, "head_dim", None) or (
            settings.hidden_size // settings.num_attention_heads
        )
        self.requires_grad_(False)

    def copy_from(
        self, fusion: Fusion, language: LanguageBranch, gather: Gather | None = None
    ) -> None:
        """Take the snapshot: LoRA is merged into what is copied.

        Args:
            fusion: the trained fusion.
            language: the language model as it stands.
            gather: makes partitioned parameters whole (ZeRO-3), for all ranks alike.
        """
        before, embedding = language.layers[: self.layer], language.embedding
        last: Any = language.layers[self.layer]
        parameters = [p for m in (fusion, embedding, before, last) for p in m.parameters()]
        with (gather or _as_they_are)(parameters), torch.no_grad():
            self.fusion.load_state_dict(fusion.state_dict())
            self.decoder.get_input_embeddings().weight.copy_(embedding.weight)
            for mine, theirs in zip(self.decoder.layers, before, strict=True):
                mine.load_state_dict(merged_state(theirs))
            self.decoder.norm.load_state_dict(last.input_layernorm.state_dict())
            self.query.load_state_dict(merged_state(last.self_attn.q_proj))
            self.key.load_state_dict(merged_state(last.self_attn.k_proj))

    @torch.no_grad()
    def forward(
        self,
        features: Mapping[str, Tensor],
        frame_mask_BK: Tensor,
        findings_ids_BS: Tensor,
        findings_mask_BS: Tensor,
    ) -> Tensor:
        """Return teacher_BK: QK^T / sqrt(E), max over image tokens, mean over heads and text.

        Padding frames get 0; mask them.
        """
        visual_BKTD = self.fusion(features)
        batch, frames, tokens, width = visual_BKTD.shape
        embedding = self.decoder.get_input_embeddings()
        query_BSHE = self._read(self.query, embedding(findings_ids_BS), findings_mask_BS)
        image_NTD = visual_BKTD[frame_mask_BK].to(query_BSHE.dtype)
        if self.bos_token_id is not None:
            bos = embedding.weight[self.bos_token_id].expand(len(image_NTD), 1, width)
            image_NTD = torch.cat([bos, image_NTD], dim=1)
        key_NTHE = self._read(self.key, image_NTD, None)[:, -tokens:]
        group_N = frame_mask_BK.nonzero()[:, 0]
        query_NSHE = query_BSHE[group_N]
        repeats = query_NSHE.shape[2] // key_NTHE.shape[2]
        key_NTHE = key_NTHE.repeat_interleave(repeats, dim=2)
        match_NHST = torch.einsum("nshe,nthe->nhst", query_NSHE.float(), key_NTHE.float())
        best_NHS = match_NHST.amax(-1) / self.head_width**0.5
        weight_BS = self._findings_weight(findings_mask_BS)
        score_N = (best_NHS.mean(1) * weight_BS[group_N]).sum(-1)
        scores_BK = score_N.new_zeros(batch, frames)
        filled: Tensor = scores_BK.masked_scatter(frame_mask_BK, score_N)
        return filled

    def _findings_weight(self, mask_BS: Tensor) -> Tensor:
        weight_BS = mask_BS.float()
        if self.bos_token_id is not None and mask_BS.shape[1] > 1:
            weight_BS[:, 0] = 0  # the first token says nothing about the report
        return weight_BS / weight_BS.sum(-1, keepdim=True).clamp(min=1)

    def _read(self, projection: nn.Module, embeds: Tensor, mask: Tensor | None) -> Tensor:
        """Return a projection of what reaches the layer, by head."""
        states = self.decoder(
            inputs_embeds=embeds,
            attention_mask=None if mask is None else mask.long(),
            use_cache=False,
        ).last_hidden_state
        projected: Tensor = projection(states)
        return projected.view(*projected.shape[:2], -1, self.head_width)


@torch.no_grad()
def score_likelihood(
    language: LanguageBranch,
    visual_BKTD: Tensor,
    frame_mask_BK: Tensor,
    findings_ids_BS: Tensor,
    findings_mask_BS: Tensor,
) -> Tensor:
    """Return teacher_BK: the log-likelihood, in nats, of the findings given each frame.

    Padding frames get 0; mask them.
    """
    batch, frames, tokens, _ = visual_BKTD.shape
    ids_NS = findings_ids_BS.repeat_interleave(frames, dim=0)
    mask_NS = findings_mask_BS.repeat_interleave(frames, dim=0)
    places = ids_NS.new_full((len(ids_NS), tokens), VISUAL)
    start = int(language.tokenizer.bos_token_id is not None)
    ids = torch.cat([ids_NS[:, :start], places, ids_NS[:, start:]], dim=1)
    seen = torch.ones_like(places, dtype=torch.bool)
    mask = torch.cat([mask_NS[:, :start], seen, mask_NS[:, start:]], dim=1)
    mask &= frame_mask_BK.view(-1, 1)  # nothing is computed for padding
    logits = language(splice(language.embedding, ids, visual_BKTD.flatten(0, 2)), mask)
    labels = ids.masked_fill((ids == VISUAL) | ~mask, IGNORED)
    return -token_losses(logits, labels).sum(-1).view(batch, frames)


def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as it would be without LoRA in it, LoRA added in."""
    lora = {name: m for name, m in module.named_modules() if hasattr(m, "get_delta_weight")}
    state = {
        name: value
        for name, value in module.state_dict().items()
        if not any(name.startswith(f"{inside}." if inside else "") for inside in lora)
    }
    for name, layer in lora.items():
        base, prefix = layer.get_base_layer(), f"{name}." if name else ""
        delta = layer.get_delta_weight("default")
        state[f"{prefix}weight"] = base.weight + delta.to(base.weight)
        if base.bias is not None:
            state[f"{prefix}bias"] = base.bias
    return state


def _like(projection: Any) -> nn.Linear:
    """Return a linear layer of the size and type of another one, which LoRA may be around."""
    inner = projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection
    return nn.Linear(
        inner.in_features, inner.out_features, inner.bias is not None, dtype=inner.weight.dtype
    )


def _as_they_are(_parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    return nullcontext()
