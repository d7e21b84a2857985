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

    Text and image go separately through the first `selection.teacher_layers` layers of a frozen
    snapshot; a live teacher would drift with what it teaches. Queries and keys are read before the
    rotary embedding, so only content counts.
    """

    def __init__(self, config: ModelConfig, language: LanguageBranch) -> None:
        super().__init__()
        from transformers import AutoModel

        settings = copy.deepcopy(language.base.config.get_text_config())
        num_layers = config.selection.teacher_layers
        if num_layers > settings.num_hidden_layers:
            raise ValueError(
                f"selection.teacher_layers is {num_layers}, the language model has "
                f"{settings.num_hidden_layers} layers"
            )
        settings.num_hidden_layers = num_layers
        if getattr(settings, "layer_types", None):
            settings.layer_types = settings.layer_types[:num_layers]
        self.fusion = Fusion(config.vision, config.fusion, language.width)
        self.decoder: Any = AutoModel.from_config(settings, dtype=language.base.dtype)
        self.bos_token_id = language.tokenizer.bos_token_id
        self.head_width = getattr(settings, "head_dim", None) or (
            settings.hidden_size // settings.num_attention_heads
        )
        self.requires_grad_(False)

    def copy_from(
        self, fusion: Fusion, language: LanguageBranch, gather: Gather | None = None
    ) -> None:
        """Take the snapshot: LoRA is merged into the copied layers.

        Args:
            fusion: the trained fusion.
            language: the language model as it stands.
            gather: makes partitioned parameters whole (ZeRO-3), for all ranks alike.
        """
        source = language.layers[: len(self.decoder.layers)]
        embedding = language.embedding
        parameters = [p for m in (fusion, embedding, source) for p in m.parameters()]
        with (gather or _as_they_are)(parameters), torch.no_grad():
            self.fusion.load_state_dict(fusion.state_dict())
            self.decoder.get_input_embeddings().weight.copy_(embedding.weight)
            for mine, theirs in zip(self.decoder.layers, source, strict=True):
                mine.load_state_dict(merged_state(theirs))

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
        query_BSHE, _ = self._read(embedding(findings_ids_BS), findings_mask_BS)
        image_NTD = visual_BKTD[frame_mask_BK].to(query_BSHE.dtype)
        if self.bos_token_id is not None:
            bos = embedding.weight[self.bos_token_id].expand(len(image_NTD), 1, width)
            image_NTD = torch.cat([bos, image_NTD], dim=1)
        _, key_NTHE = self._read(image_NTD, None)
        key_NTHE = key_NTHE[:, -tokens:]
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

    def _read(self, embeds: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        captured: dict[str, Tensor] = {}
        attention = self.decoder.layers[-1].self_attn
        hooks = [
            getattr(attention, name).register_forward_hook(
                lambda _module, _inputs, output, name=name: captured.__setitem__(name, output)
            )
            for name in ("q_proj", "k_proj")
        ]
        try:
            self.decoder(
                inputs_embeds=embeds,
                attention_mask=None if mask is None else mask.long(),
                use_cache=False,
            )
        finally:
            for hook in hooks:
                hook.remove()
        query, key = captured["q_proj"], captured["k_proj"]
        heads = (-1, self.head_width)
        return query.unflatten(-1, heads), key.unflatten(-1, heads)


@torch.no_grad()
def score_likelihood(
    language: LanguageBranch,
    visual_BKTD: Tensor,
    findings_ids_BS: Tensor,
    findings_mask_BS: Tensor,
) -> Tensor:
    """Return teacher_BK: the log-likelihood, in nats, of the findings given each frame.

    Padding frames are scored too, so that every rank of a ZeRO-3 group computes alike; mask them.
    """
    batch, frames, tokens, _ = visual_BKTD.shape
    ids_NS = findings_ids_BS.repeat_interleave(frames, dim=0)
    mask_NS = findings_mask_BS.repeat_interleave(frames, dim=0)
    places = ids_NS.new_full((len(ids_NS), tokens), VISUAL)
    start = int(language.tokenizer.bos_token_id is not None)
    ids = torch.cat([ids_NS[:, :start], places, ids_NS[:, start:]], dim=1)
    seen = torch.ones_like(places, dtype=torch.bool)
    mask = torch.cat([mask_NS[:, :start], seen, mask_NS[:, start:]], dim=1)
    logits = language(splice(language.embedding, ids, visual_BKTD.flatten(0, 2)), mask)
    labels = ids.masked_fill((ids == VISUAL) | ~mask, IGNORED)
    return -token_losses(logits, labels).sum(-1).view(batch, frames)


def merged_state(layer: nn.Module) -> dict[str, Tensor]:
    """Return a decoder layer's state as it would be without LoRA around it, LoRA added in."""
    lora = {name: m for name, m in layer.named_modules() if hasattr(m, "get_delta_weight")}
    state = {
        name: value
        for name, value in layer.state_dict().items()
        if not any(name.startswith(f"{inside}.") for inside in lora)
    }
    for name, module in lora.items():
        base = module.get_base_layer()
        state[f"{name}.weight"] = base.weight + module.get_delta_weight("default").to(base.weight)
        if base.bias is not None:
            state[f"{name}.bias"] = base.bias
    return state


def _as_they_are(_parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    return nullcontext()
