"""What counts as a token."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import get_args

import pytest

from ultra.config import ConfigError, EvaluateConfig
from ultra.evaluate.tokenizers import (
    describe_tokenizer,
    get_tokenizer,
    tokenize_char,
    tokenize_whitespace,
    ultrasound_words,
)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("右肾囊肿，大小12mm×1.5 CM。", [*"右肾囊肿大小", "12", "mm", "×", "1.5", "cm"]),
        ("ＣＤＦＩ：Ⅱ级", ["cdfi", "ii", "级"]),
        ("１２毫米", ["12", "毫", "米"]),
        ("A-B_c", ["a", "b", "c"]),
        (" 。，\n", []),
    ],
)
def test_characters(text: str, tokens: list[str]) -> None:
    assert tokenize_char(text) == tokens


def test_white_space_leaves_a_chinese_answer_whole() -> None:
    assert tokenize_whitespace("Liver  cyst,\n肝囊肿。") == ["liver", "cyst,", "肝囊肿。"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("右肾上极", "右肾 上极"),
        ("不包含", "不 包含"),
        ("扩大的心脏。", "扩大 的 心脏"),
        ("边界清晰，低回声结节", "边界 清晰 低回声 结节"),
        ("轻度三尖瓣、二尖瓣反流", "轻度 三尖瓣 二尖瓣 反流"),
        ("大小约１２mm×1.5CM", "大小 约 12 mm × 1.5 cm"),
        ("", ""),
    ],
)
def test_words(text: str, tokens: str) -> None:
    assert list(get_tokenizer("jieba")(text)) == tokens.split()


def test_words_leave_no_file_behind() -> None:
    get_tokenizer("jieba")("囊肿")
    assert not list(Path(tempfile.gettempdir()).glob("jieba*.cache"))


def test_our_terms_are_words() -> None:
    words = ultrasound_words()
    assert len(words) > 300
    assert len(set(words)) == len(words)
    assert all(len(word) > 1 and all("\u4e00" <= c <= "\u9fff" for c in word) for word in words)
    cut = get_tokenizer("jieba")
    assert [word for word in words if list(cut(word)) != [word]] == []


def test_the_language_model_s_own(random_backbones: Path, tmp_path: Path) -> None:
    tokenize = get_tokenizer("model", str(random_backbones / "language"))
    first, second, *end = tokenize(" 囊肿。 ")
    assert first != second
    assert list(tokenize("肿囊")) == [second, first]  # one token a character, no special tokens
    assert len(end) == 1  # punctuation is one too
    with pytest.raises(ConfigError, match="no tokenizer to read"):
        get_tokenizer("model", str(tmp_path))


def test_no_other() -> None:
    with pytest.raises(ValueError, match="no tokenizer 'bpe'"):
        get_tokenizer("bpe")


def test_every_tokenizer_of_the_configuration_is_described() -> None:
    names = get_args(EvaluateConfig.model_fields["tokenizer"].annotation)
    assert len(names) == 4
    assert all(describe_tokenizer(name).startswith(f"`{name}`: ") for name in names)
