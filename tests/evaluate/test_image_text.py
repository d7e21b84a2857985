"""Answers of an image-text-to-text model that never trained."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.evaluate.image_text_weights import write_image_text_model
from ultra.config import ConfigError
from ultra.evaluate.image_text import ImageTextModel
from ultra.evaluate.predictions import questions_of
from ultra.storage import StorageError
from ultra.types import FrameGroup

Exams = list[FrameGroup]


@pytest.fixture(scope="module")
def weights(random_backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_image_text_model(tmp_path_factory.mktemp("llava"), random_backbones / "language")


def test_answers_are_those_of_plain_greedy_decoding(weights: str, exams: Exams) -> None:
    found = ImageTextModel(weights, 6, batch_size=4).answer(exams[:3])
    questions = [(exam, q) for exam in exams[:3] for q in questions_of(exam)]
    assert [(p.exam_id, p.question) for p in found] == [(e.exam_id, q.text) for e, q in questions]
    processor = AutoProcessor.from_pretrained(weights)
    model = LlavaForConditionalGeneration.from_pretrained(weights)
    assert len({p.token_ids for p in found}) == 4
    for (exam, question), p in zip(questions, found, strict=True):
        images = [Image.open(io.BytesIO(frame)).convert("RGB") for frame in exam.frames]
        prompt = "user: " + "<image>\n" * len(images) + question.text + "\nassistant: "
        inputs = processor(text=[prompt], images=[images], return_tensors="pt")
        ids = inputs["input_ids"]
        assert (ids == model.config.image_token_id).sum() == 4 * len(images)
        expected = []
        for _ in range(6):  # one at a time, without a cache and without `generate`
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            token = int(logits.argmax())
            if token == model.generation_config.eos_token_id:
                break
            expected.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
        assert list(p.token_ids) == expected
        text = processor.tokenizer.decode(expected, skip_special_tokens=True)
        assert p.answer == text.strip()
        assert p.finish_reason == ("length" if len(expected) == 6 else "stop")
        assert (p.truth, p.chosen, p.scores, p.unanswered) == (question.truth, None, None, "")


def test_the_first_frame_alone_is_an_option(weights: str, exams: Exams) -> None:
    exam = exams[0]
    alone = replace(exam, frames=exam.frames[:1])
    first = ImageTextModel(weights, 4, frames="first", dtype="bfloat16")
    assert [p.token_ids for p in first.answer([exam])] == [
        p.token_ids for p in ImageTextModel(weights, 4, dtype="bfloat16").answer([alone])
    ]
    seen = first._prompt(exam, questions_of(exam)[0])[0]["content"]
    assert [part["type"] for part in seen] == ["image", "text"]


def test_what_is_no_such_model_is_named(random_backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such file or folder"):
        ImageTextModel(str(tmp_path / "nowhere"), 4)
    with pytest.raises(ConfigError, match="no image-text-to-text model"):
        ImageTextModel(str(random_backbones / "language"), 4)
    bare = write_image_text_model(tmp_path / "bare", random_backbones / "language", template=None)
    with pytest.raises(ConfigError, match="has no chat template"):
        ImageTextModel(bare, 4)
