"""Tokenizers for scores: what counts as one token is part of a metric's name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from ultra import storage

Tokenize = Callable[[str], Sequence[str]]

_TOKENS = {
    "char": "a token is a Chinese character, a run of Latin letters or a number",
    "jieba": "a token is a word by jieba's dictionary and ours of ultrasound terms",
    "model": "a token is one of the language model's own",
    "whitespace": "a token is what stands between white space, often a whole Chinese answer",
}

_PIECE = re.compile(
    r"\d+(?:\.\d+)?"  # a number
    r"|[^\W\d_\u2e80-\U0010ffff]+"  # a run of letters, Chinese characters excepted
    r"|(?:(?=[\u2e80-\U0010ffff])[^\W\d_])+"  # a run of Chinese characters
    r"|[^\s_]"
)
_CACHED_TEXTS = 2**16
_WORDS = "ultrasound_words.txt"


def tokenize_char(text: str) -> list[str]:
    """Return each Chinese character, each run of Latin letters and each number as a token.

    The text is folded by NFKC and lowered first; punctuation is dropped, a decimal point kept.
    `12mm` and `12 mm` give the same tokens.
    """
    return _tokenize_pieces(text, list)


def tokenize_whitespace(text: str) -> list[str]:
    """Return what stands between white space, lowered: a Chinese answer is one token."""
    return text.lower().split()


def get_tokenizer(name: str, weights: str = "") -> Tokenize:
    """Return the tokenizer of that name.

    Args:
        name: `char`, `jieba` (words, by jieba's dictionary and ours of ultrasound terms),
            `model` (the language model's own, special tokens left out; case, width and
            punctuation count) or `whitespace`.
        weights: address of a transformers directory or a `.gguf` file, for `model`.

    Raises:
        ConfigError: for `model`, when there is no tokenizer at `weights`.
        ValueError: for another name.
    """
    if name == "char":
        return tokenize_char
    if name == "whitespace":
        return tokenize_whitespace
    if name == "jieba":
        cut = _load_jieba().cut
        return lru_cache(_CACHED_TEXTS)(lambda text: tuple(_tokenize_pieces(text, cut)))
    if name == "model":
        from ultra.model.language import load_tokenizer

        encode = load_tokenizer(storage.fetch(weights)).encode
        return lru_cache(_CACHED_TEXTS)(
            lambda text: tuple(map(str, encode(text.strip(), add_special_tokens=False)))
        )
    raise ValueError(f"no tokenizer {name!r}")


def describe_tokenizer(name: str) -> str:
    """Return a sentence that names a tokenizer and says what its tokens are."""
    return f"`{name}`: {_TOKENS[name]}."


def ultrasound_words() -> list[str]:
    """Return the ultrasound terms that `jieba` keeps whole."""
    text = (resources.files("ultra.evaluate") / _WORDS).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _tokenize_pieces(text: str, cut: Callable[[str], Iterable[str]]) -> list[str]:
    """Return the pieces of a folded text, with runs of Chinese characters cut further."""
    tokens: list[str] = []
    for piece in _PIECE.findall(unicodedata.normalize("NFKC", text).lower()):
        if piece[0] >= "\u2e80":
            tokens += cut(piece)
        else:
            tokens.append(piece)
    return [t for t in tokens if unicodedata.category(t[0])[0] not in "PZC"]


@cache
def _load_jieba() -> Any:
    import jieba

    # By hand, because `initialize` reads and writes a marshal file in the shared temporary folder.
    tokenizer = jieba.Tokenizer()
    dictionary = (resources.files("jieba") / "dict.txt").open("rb")
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(dictionary)  # closes the file
    tokenizer.initialized = True
    for word in ultrasound_words():
        tokenizer.add_word(word)
    return tokenizer
