"""Answers of an OpenAI-compatible endpoint that takes images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import SecretStr

from ultra.evaluate.predictions import Prediction, Question, answer_question, questions_of
from ultra.page import data_uri
from ultra.types import FrameGroup

MAX_RETRIES = 5
"""Of the client: on a lost connection, 408, 409, 429 and 5xx, waiting twice as long each time up to
8 s, or as long as the server says."""

TIMEOUT_S = 120


class Endpoint:
    """Answers with an endpoint's model; frames go as data URLs.

    Args:
        base_url: up to and including `/v1`.
        model: what the endpoint calls it.
        max_new_tokens: longest answer.
        api_key: the key; None or empty for an endpoint without.
        frames: whether it is shown every frame, as one image each, or the first.
        max_concurrency: requests under way at the same time.
        request: further parameters of every request; an endpoint that does not know
            `max_completion_tokens` is given `max_tokens` here instead.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        max_new_tokens: int,
        *,
        api_key: SecretStr | None = None,
        frames: Literal["all", "first"] = "all",
        max_concurrency: int = 8,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        from openai import OpenAI

        self.client = OpenAI(
            base_url=base_url,
            api_key=(api_key.get_secret_value() if api_key else "") or "none",  # it wants one
            max_retries=MAX_RETRIES,
            timeout=TIMEOUT_S,
        )
        self.request: dict[str, Any] = {"model": model, **(request or {})}
        if "max_tokens" not in self.request:
            self.request.setdefault("max_completion_tokens", max_new_tokens)
        self.num_frames = 1 if frames == "first" else None
        self.max_concurrency = max_concurrency

    def answer(self, groups: Sequence[FrameGroup]) -> list[Prediction]:
        """Return the predictions for every question of every group.

        What the endpoint does not answer, however often the client asks, is kept with the reason.
        """
        asked = [(group, question) for group in groups for question in questions_of(group)]
        with ThreadPoolExecutor(self.max_concurrency) as threads:
            return list(threads.map(lambda each: self._answer(*each), asked))

    def _answer(self, group: FrameGroup, question: Question) -> Prediction:
        from openai import OpenAIError

        messages: Any = [{"role": "user", "content": self._content(group, question)}]
        try:
            completion: Any = self.client.chat.completions.create(messages=messages, **self.request)
        except (OpenAIError, ValueError) as error:  # ValueError: a reply that is no JSON
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return answer_question(group, question, "", unanswered=reason)
        text, reason, why = _read(completion)
        return answer_question(group, question, text, finish_reason=why, unanswered=reason)

    def _content(self, group: FrameGroup, question: Question) -> list[dict[str, Any]]:
        images = [
            {"type": "image_url", "image_url": {"url": data_uri(frame)}}
            for frame in group.frames[: self.num_frames]
        ]
        return [*images, {"type": "text", "text": question.text}]


def _read(completion: Any) -> tuple[str, str, str]:
    """Return the answer of a completion, why it has none, and why it ended."""
    choices: Any = getattr(completion, "choices", None)  # the client takes any JSON for one
    message: Any = getattr(choices[0], "message", None) if choices else None
    if message is None:
        return "", "malformed reply: no message", ""
    ended = str(choices[0].finish_reason)
    text = message.content or ""
    refusal = getattr(message, "refusal", None) or ended
    return text, "" if text.strip() else f"empty answer: {refusal}", ended
