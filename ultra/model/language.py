"""The causal language model, with or without LoRA.

Shapes: B rows, S tokens, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ultra import storage
from ultra.config import ConfigError, LanguageConfig
from ultra.model import llava
from ultra.model.packing import plan_packing
from ultra.model.pretrained import first_line, load_pretrained, split_gguf
from ultra.types import IGNORED


class LanguageBranch(nn.Module):
    """A transformers causal language model that reads embeddings.

    Args:
        config: weights, type and LoRA.
        weights: a local transformers directory to read instead of `config.weights`.
        adapter: a local PEFT directory whose LoRA weights to load; None starts a fresh LoRA.
        opened: a model and its tokenizer, where they are open already; nothing is read then.
    """

    def __init__(
        self,
        config: LanguageConfig,
        weights: Path | None = None,
        adapter: Path | None = None,
        opened: tuple[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        if opened is None:
            path = weights or storage.fetch(config.weights)
            opened = load_language_model(path, getattr(torch, config.dtype))
        base, self.tokenizer = opened
        self.width = int(base.config.get_text_config().hidden_size)
        base.requires_grad_(False)
        self.model: Any = base if config.lora is None else _add_lora(base, config, adapter)

    @property
    def base(self) -> Any:
        """The model below LoRA."""
        return self.model if self.config.lora is None else self.model.get_base_model()

    @property
    def embedding(self) -> Any:
        """The input embedding."""
        return self.base.get_input_embeddings()

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the input embedding; where it has no values, a fresh LLaMA's."""
        weight = self.embedding.weight
        return 0.02 if weight.is_meta else float(weight.float().std())

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last.

        Raises:
            ValueError: for a model that keeps them elsewhere than transformers' decoders do.
        """
        layers = getattr(getattr(self.base, "model", None), "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"{type(self.base).__name__} has no model.layers to read")
        return layers

    def lora_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the names and the parameters of LoRA."""
        return ((n, p) for n, p in self.named_parameters() if ".lora_" in n)

    def skip_idle_lora(self, trains: bool) -> None:
        """Leave LoRA out of the computation where it adds nothing and is not to learn to.

        Args:
            trains: whether it is trained; else it is idle as long as it is fresh.
        """
        if self.config.lora is None:
            return
        # A fresh LoRA's B is zero. One without values is fresh.
        outer = [p for name, p in self.lora_parameters() if ".lora_B." in name]
        if trains or any(not p.is_meta and bool(p.any()) for p in outer):
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()

    def forward(
        self, embeds_BSD: Tensor, mask_BS: Tensor, conversation_BS: Tensor | None = None
    ) -> Tensor:
        """Return logits_BSV of rows with padding on their right, where they mean nothing.

        Rows that fit into the length of another are computed behind it (see `packing`).

        Args:
            embeds_BSD: what is read.
            mask_BS: True where a token is real.
            conversation_BS: of each token, as in `Batch`; None for rows of one conversation.
        """
        packing = plan_packing(mask_BS, conversation_BS)
        seen = packing.seen_PLL
        if seen is not None:
            lowest = torch.finfo(embeds_BSD.dtype).min
            seen = embeds_BSD.new_zeros(seen.shape).masked_fill(~seen, lowest).unsqueeze(1)
        logits: Tensor = self.model(
            inputs_embeds=packing.pack(embeds_BSD),
            position_ids=packing.positions_PL,
            attention_mask=seen,
            use_cache=False,
        ).logits
        return packing.unpack(logits)


def load_language_model(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return model and tokenizer of a transformers directory or a `.gguf` file.

    Raises:
        ConfigError: when there is no such model or no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    if llava.is_llava(path):
        return llava.load_language(path, dtype), load_tokenizer(path)
    return load_pretrained(AutoModelForCausalLM, path, dtype), load_tokenizer(path)


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer of a transformers directory or a `.gguf` file.

    Raises:
        ConfigError: when there is none.
    """
    from transformers import AutoTokenizer

    folder, extra = split_gguf(path)
    try:
        return AutoTokenizer.from_pretrained(folder, **extra)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no tokenizer to read: {first_line(error)}") from error


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Return losses_BS in nats: entry s is the loss of token s given those before it.

    Zero where the label is IGNORED, and for the first token of a row.
    """
    predicted = logits_BSV[:, :-1].float().transpose(1, 2)
    losses = functional.cross_entropy(
        predicted, labels_BS[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return functional.pad(losses, (1, 0))


def conversation_losses(
    losses_BS: Tensor, labels_BS: Tensor, conversation_BS: Tensor | None = None
) -> Tensor:
    """Return losses_B in nats a token: the mean of token losses over each conversation's answers.

    Every conversation counts alike, so a long report does not drown the short answers; and every
    row, whose loss is the mean of its conversations'.

    Args:
        losses_BS: from `token_losses`.
        labels_BS: of the same tokens.
        conversation_BS: of each token, as in `Batch`; None for rows of one conversation.
    """
    counted_BS = functional.pad((labels_BS[:, 1:] != IGNORED).to(losses_BS.dtype), (1, 0))
    if conversation_BS is None:
        return losses_BS.sum(-1) / counted_BS.sum(-1)
    sums_BN = losses_BS.new_zeros(len(losses_BS), int(conversation_BS.max()) + 1)
    counts_BN = sums_BN.scatter_add(1, conversation_BS, counted_BS)
    means_BN = sums_BN.scatter_add(1, conversation_BS, losses_BS) / counts_BN.clamp(min=1)
    return means_BN.sum(-1) / (counts_BN > 0).sum(-1)


def _add_lora(base: Any, config: LanguageConfig, adapter: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    assert config.lora is not None
    if adapter is not None:
        return PeftModel.from_pretrained(base, adapter, is_trainable=True)
    targets = config.lora.targets
    return get_peft_model(
        base,
        LoraConfig(
            r=config.lora.rank,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            task_type="CAUSAL_LM",
        ),
    )
