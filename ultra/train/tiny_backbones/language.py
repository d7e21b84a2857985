"""The tiny language model: a character-level Llama that reads facts where visual tokens stand.

Shapes: B rows, T visual tokens of a frame, S text tokens, V vocabulary, D width of the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ultra.data.collate import pad
from ultra.data.instructions import parse_report, write_conversations
from ultra.data.prompts import encode_conversation
from ultra.data.synthetic import SIDE_WORDS, report_characters
from ultra.model.language import token_losses
from ultra.model.splice import splice
from ultra.train.tiny_backbones.optimise import SEED, optimise
from ultra.train.tiny_backbones.vision import GRID
from ultra.types import IGNORED, VISUAL, FrameGroup

NUM_VISUAL = GRID**2
TEXTS = 48
"""Rows of text in a step."""
PADDING = -2
"""An id that is neither a token nor VISUAL."""
FACTS = ("site", "side", "kind", "echogenicity", "size", "margin")
EVERYWHERE = ("site", "side")
"""Facts that every frame of an exam shows."""


def train_language(groups: list[FrameGroup], steps: int) -> tuple[Any, Any]:
    """Return a character-level Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(report_characters())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    exams = [Told.of(tokenizer, group) for group in groups]
    rows = [(row, exam) for exam in exams for row in exam.rows]
    rows.sort(key=lambda row: len(row[0][0]))  # neighbours of one length waste no padding
    rng = random.Random(SEED)
    embedding: Any = model.get_input_embeddings()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = int(torch.randint(len(rows) - TEXTS + 1, (), generator=generator))
        picked = rows[start : start + TEXTS]
        words = [_mix(exam, rng.choice(exams), rng, len(tokenizer)) for _, exam in picked]
        ids, _ = pad([row[0] for row, _ in picked], PADDING)
        labels, _ = pad([row[1] for row, _ in picked], IGNORED)
        return torch.stack(words), torch.from_numpy(np.stack([ids, labels]))

    def loss(words_BTV: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS, labels_BS = batch
        visual_BTD = words_BTV @ embedding.weight
        # As much noise as there is signal, or less: a projector begins with nothing else.
        noise = embedding.weight.std().detach() * torch.rand(len(ids_BS), 1, 1)
        visual_BTD = visual_BTD + noise * torch.randn(visual_BTD.shape)
        mask_BS = ids_BS != PADDING
        embeds_BSD = splice(embedding, ids_BS.masked_fill(~mask_BS, 0), visual_BTD.flatten(0, 1))
        logits_BSV = model(inputs_embeds=embeds_BSD, attention_mask=mask_BS.long()).logits
        answers = labels_BS[:, 1:] != IGNORED
        right = logits_BSV[:, :-1].argmax(-1) == labels_BS[:, 1:]
        losses_BS = token_losses(logits_BSV, labels_BS)[:, 1:]
        return losses_BS[answers].mean(), right[answers].float().mean()

    optimise("language", list(model.parameters()), loss, draw, steps)
    return model.half(), tokenizer


@dataclass(frozen=True, slots=True)
class Told:
    """An exam as the language model learns from it.

    Attributes:
        rows: ids and labels of its conversations, and of its findings behind a frame alone.
        facts: the ids of the words for each of FACTS; None where there is no such fact.
    """

    rows: list[tuple[list[int], list[int]]]
    facts: tuple[list[int] | None, ...]

    @classmethod
    def of(cls, tokenizer: Any, group: FrameGroup) -> Told:
        """Return what there is to learn from a group's report."""

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        rows = [
            encode_conversation(tokenizer, "plain", conversation.turns, NUM_VISUAL)
            for conversation in write_conversations(group, SEED)
        ]
        findings = encode(group.findings)
        before = [tokenizer.bos_token_id, *[VISUAL] * NUM_VISUAL]
        # Twice: what the likelihood teacher asks is learnt as well as any question.
        rows += 2 * [(before + findings, [IGNORED] * len(before) + findings)]
        report = parse_report(group.site, group.findings, group.diagnosis)
        side = next(word for word in SIDE_WORDS.values() if word in group.findings)
        echo = report.echogenicity or ""
        # Only what tells one value from another: what all share would drown the difference.
        facts = {
            "site": group.site,
            "side": side,
            "kind": "正常" if report.normal else (report.kind or "").removeprefix(echo),
            "echogenicity": echo.removesuffix("回声"),
            "size": f"{report.size_mm:g}" if report.size_mm else "",
            "margin": (report.margin or "").removeprefix("边界"),
        }
        return cls(rows, tuple(encode(facts[fact]) or None for fact in FACTS))


def _mix(exam: Told, other: Told, rng: random.Random, vocabulary: int) -> Tensor:
    """Return words_TV for an exam: its facts, in most rows diluted with another exam's.

    The share of its own fact has the density 2x, so a fact is right as often as it weighs: the
    model learns to answer by weight, and a projector finds a slope from wherever it starts. Each
    fact has a share of its own, because one encoder tells what another does not. Now and then all
    of the lesion is left out, as in a frame that does not show it.
    """
    words_TV = torch.zeros(NUM_VISUAL, vocabulary)
    hidden = rng.random() < 0.15
    for name, own, another in zip(FACTS, exam.facts, other.facts, strict=True):
        share = 1.0 if rng.random() < 0.3 else rng.random() ** 0.5
        for ids, weight in ((own, share), (another, 1 - share)):
            if ids is not None and (name in EVERYWHERE or not hidden):
                word_V = torch.bincount(torch.tensor(ids), minlength=vocabulary) / len(ids)
                words_TV[_places(name, rng)] += weight * rng.uniform(0.5, 1.5) * word_V
    return words_TV


def _places(fact: str, rng: random.Random) -> list[int]:
    """Return the visual tokens that tell a fact: many of them, or for a lesion few as well."""
    often = rng.uniform(0.3, 1) if fact in EVERYWHERE else rng.choice([1, 2, 4, 16]) / 16
    return [t for t in range(NUM_VISUAL) if rng.random() < often] or [rng.randrange(NUM_VISUAL)]


def build_tokenizer(characters: str) -> Any:
    """Return a tokenizer with one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ascii_characters = "".join(chr(code) for code in range(32, 127))
    known = sorted(set(characters + ascii_characters + "\n"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
