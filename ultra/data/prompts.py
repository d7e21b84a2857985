"""Conversations as token ids: where the visual tokens stand and which tokens are answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ultra.types import IGNORED, VISUAL, Turn


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    bos_token_id: int | None
    eos_token_id: int

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Return the ids of a text."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> str:
        """Return the text of ids."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a language model expects turns to be written; `{}` stands for the content.

    Each piece is tokenized by itself, so the border between question and answer is exact.
    """

    system: str
    user: str
    answer_end: str
    default_system: str = ""
    user_after_system: str = ""
    """How the first user turn is written after a system text, where that differs."""


TEMPLATES = {
    "plain": Template(system="{}\n", user="问：{}\n答：", answer_end="\n"),
    "vicuna": Template(
        system="{} ",
        user="USER: {} ASSISTANT: ",
        answer_end=" ",
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama2": Template(
        system="[INST] <<SYS>>\n{}\n<</SYS>>\n\n",
        user="[INST] {} [/INST] ",
        answer_end=" ",
        user_after_system="{} [/INST] ",
    ),
    "chatml": Template(
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer_end="\n",
    ),
}
"""After an answer comes the end-of-text token, and `answer_end` before the next turn."""


def encode_conversation(
    tokenizer: Tokenizer, template: str, turns: Sequence[Turn], num_visual_tokens: int
) -> tuple[list[int], list[int]]:
    """Return the ids and the labels of a conversation; only assistant turns carry labels.

    The user turn that the frames belong to (see Turn) opens with `num_visual_tokens` VISUAL ids.

    Raises:
        ValueError: for a conversation without an answer, or turns in an impossible order.
    """
    ids: list[int] = []
    labels: list[int] = []
    for piece, is_answer in _pieces(tokenizer, TEMPLATES[template], turns, num_visual_tokens):
        ids += piece
        labels += piece if is_answer else [IGNORED] * len(piece)
    if all(label == IGNORED for label in labels):
        raise ValueError("a conversation needs an assistant turn that is not empty")
    return ids, labels


def encode_prompt(
    tokenizer: Tokenizer, template: str, turns: Sequence[Turn], num_visual_tokens: int
) -> list[int]:
    """Return the ids that end where the next answer begins.

    Raises:
        ValueError: when the last turn is not the user's, or turns come in an impossible order.
    """
    if not turns or turns[-1].role != "user":
        raise ValueError("a prompt must end with a user turn")
    pieces = _pieces(tokenizer, TEMPLATES[template], turns, num_visual_tokens)
    return [token for piece, _ in pieces for token in piece]


def _pieces(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], num_visual_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    bos = tokenizer.bos_token_id
    pieces = _turn_pieces(tokenizer, template, turns, num_visual_tokens)
    for index, (piece, is_answer) in enumerate(pieces):
        # Some models' first token is the one that chatml opens with: once is enough.
        if index == 0 and bos is not None and piece[:1] != [bos]:
            yield [bos], False
        yield piece, is_answer


def _turn_pieces(
    tokenizer: Tokenizer, template: Template, turns: Sequence[Turn], num_visual_tokens: int
) -> Iterator[tuple[list[int], bool]]:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False) if text else []

    turns, user = list(turns), template.user
    system = template.default_system
    if turns and turns[0].role == "system":
        system = turns.pop(0).content
    if system:
        yield encode(template.system.format(system)), False
        user = template.user_after_system or user
    shown_at = max((i for i, turn in enumerate(turns) if turn.has_frames), default=0)
    for index, turn in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if turn.role != expected:
            raise ValueError(f"turn {index} must be the {expected}'s, not the {turn.role}'s")
        if turn.role == "user":
            before, after = (user if index == 0 else template.user).split("{}")
            yield encode(before), False
            if index == shown_at:
                yield [VISUAL] * num_visual_tokens, False
            yield encode(turn.content + after), False
        else:
            if not turn.content:
                raise ValueError(f"turn {index}: an empty answer")
            yield [*encode(turn.content), tokenizer.eos_token_id], True
            if index + 1 < len(turns):
                yield encode(template.answer_end), False
