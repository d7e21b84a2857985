"""Models that answer beside ours: one replica of batch inference, whatever answers in it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa
from pydantic import SecretStr

from ultra import storage
from ultra.config import ConfigError, EvaluateConfig, OtherModel
from ultra.data import parquet, schema
from ultra.evaluate.answers_file import AnswersFile, find_strays
from ultra.evaluate.predictions import Prediction, to_table
from ultra.types import FrameGroup

NUM_NAMED = 10
"""Questions that are named of those without an answer, and of answers without a question."""


class Answerer(Protocol):
    """What answers questions about exams; all it takes to be a row of the tables."""

    def answer(self, groups: Sequence[FrameGroup]) -> list[Prediction]:
        """Return the predictions for every question of every group."""


class OtherPredictor:
    """Answers the questions of exams with another model.

    Args:
        other: the model.
        settings: how long answers may be, and how many questions are answered at a time.
        api_key: of its endpoint; it is kept out of the configuration, which is written to runs.
    """

    def __init__(self, other: OtherModel, settings: EvaluateConfig, api_key: SecretStr) -> None:
        self.answerer = _open(other, settings, api_key)

    def __call__(self, exams: pa.Table) -> pa.Table:
        """Return the PREDICTIONS of a table of EXAMS, in its order."""
        return to_table(self.answerer.answer([schema.from_row(row) for row in exams.to_pylist()]))


def _open(other: OtherModel, settings: EvaluateConfig, api_key: SecretStr) -> Answerer:
    if other.answers_uri:
        return AnswersFile(other.answers_uri)
    if other.weights:
        from ultra.evaluate.image_text import ImageTextModel

        return ImageTextModel(
            other.weights,
            settings.max_new_tokens,
            frames=other.frames,
            batch_size=settings.batch_size,
            dtype=other.dtype,
            device="cuda" if settings.gpus_per_replica else "cpu",
        )
    from ultra.evaluate.endpoint import Endpoint

    return Endpoint(
        other.base_url,
        other.model,
        settings.max_new_tokens,
        api_key=api_key,
        frames=other.frames,
        max_concurrency=other.max_concurrency,
        request=other.request,
    )


def others_uri(settings: EvaluateConfig, other: OtherModel) -> str:
    """Return where the predictions of another model are kept."""
    if other.is_answered:
        return other.answers_uri
    return f"{settings.predictions_uri.rstrip('/')}-{other.name}"


def left_to_ask(settings: EvaluateConfig) -> list[OtherModel]:
    """Return the other models whose predictions are not there already, or are not to be reused."""
    reused = settings.reuse_predictions
    return [
        other
        for other in settings.others
        if not (other.is_answered or (reused and parquet.is_table(others_uri(settings, other))))
    ]


def check(other: OtherModel) -> SecretStr:
    """Return the key of a model's endpoint, empty for none, once all it needs is there.

    Raises:
        ConfigError: when its file of answers, its weights or its key is missing or of no use.
        StorageError: when their address cannot be reached.
    """
    if other.answers_uri:
        AnswersFile(other.answers_uri)
    if other.weights and not storage.exists(storage.join(other.weights, "config.json")):
        raise ConfigError(f"evaluate.others: {other.name}: no model at {other.weights}")
    key = os.environ.get(other.api_key_env, "") if other.api_key_env else ""
    if other.api_key_env and not key:
        raise ConfigError(f"evaluate.others: {other.name}: {other.api_key_env} is not set")
    return SecretStr(key)


def report(other: OtherModel, predictions: Sequence[Prediction]) -> str:
    """Return in a few lines how many questions a model answered, and which not for what reason.

    Raises:
        ConfigError: when answers of a file cannot be matched because two questions have one id.
    """
    reasons = Counter(p.unanswered for p in predictions)
    lines = [f"{other.name}: {reasons.pop('', 0)} of {len(predictions)} questions answered"]
    for reason, count in reasons.most_common():
        ids = [p.question_id or p.exam_id for p in predictions if p.unanswered == reason]
        lines.append(f"  {count} not, {reason}: {_name(ids)}")
    strays = find_strays(other.answers_uri, predictions) if other.answers_uri else []
    if strays:
        lines.append(f"  {len(strays)} answers to questions that were not asked: {_name(strays)}")
    return "\n".join(lines)


def _name(ids: Sequence[str]) -> str:
    return ", ".join(ids[:NUM_NAMED]) + (", …" if len(ids) > NUM_NAMED else "")
