"""Answers of any image-text-to-text model of transformers."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image

from ultra import storage
from ultra.config import ConfigError
from ultra.evaluate.predictions import Prediction, Question, answer_question, questions_of
from ultra.types import FrameGroup


class ImageTextModel:
    """Answers with a model that `AutoModelForImageTextToText` loads, through its chat template.

    Args:
        weights: address of a transformers directory, processor included.
        max_new_tokens: longest answer.
        frames: whether it is shown every frame, as one image each, or the first.
        batch_size: questions answered at a time.
        dtype: of the weights.
        device: where torch runs, `cpu` or `cuda`.

    Raises:
        ConfigError: when there is no such model, or its processor has no chat template.
    """

    def __init__(
        self,
        weights: str,
        max_new_tokens: int,
        *,
        frames: Literal["all", "first"] = "all",
        batch_size: int = 1,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.max_new_tokens = max_new_tokens
        self.num_frames = 1 if frames == "first" else None
        self.batch_size = batch_size
        folder = storage.fetch(weights)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(folder)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype)
            )
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"evaluate.others: {weights}: no image-text-to-text model: {reason}"
            ) from None
        if not getattr(self.processor, "chat_template", None):
            raise ConfigError(f"evaluate.others: {weights}: its processor has no chat template")
        self.model = model.to(device).eval()
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # an answer follows its prompt
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def answer(self, groups: Sequence[FrameGroup]) -> list[Prediction]:
        """Return the predictions for every question of every group."""
        asked = [(group, question) for group in groups for question in questions_of(group)]
        return [
            prediction
            for start in range(0, len(asked), self.batch_size)
            for prediction in self._answer(asked[start : start + self.batch_size])
        ]

    @torch.inference_mode()
    def _answer(self, asked: Sequence[tuple[FrameGroup, Question]]) -> list[Prediction]:
        inputs = self.processor.apply_chat_template(
            [self._prompt(*each) for each in asked],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device, self.model.dtype)
        given = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        num_prompt_tokens = inputs["input_ids"].shape[1]
        answers = [row[num_prompt_tokens:] for row in given.tolist()]
        return [self._prediction(*each, ids) for each, ids in zip(asked, answers, strict=True)]

    def _prompt(self, group: FrameGroup, question: Question) -> list[dict[str, Any]]:
        images = [{"type": "image", "image": _open(f)} for f in group.frames[: self.num_frames]]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]

    def _prediction(
        self, group: FrameGroup, question: Question, token_ids: Sequence[int]
    ) -> Prediction:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        length = next((i for i, t in enumerate(token_ids) if t in ends), len(token_ids))
        return answer_question(
            group,
            question,
            self.processor.tokenizer.decode(token_ids[:length], skip_special_tokens=True),
            token_ids=tuple(token_ids[:length]),
            finish_reason="stop" if length < len(token_ids) else "length",
        )


def _open(frame: bytes) -> Image.Image:
    with Image.open(io.BytesIO(frame)) as image:
        return image.convert("RGB")
