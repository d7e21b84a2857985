"""Tables from stored predictions: no model answers again, and no Ray is needed."""

from __future__ import annotations

import json
from typing import Any

from ultra import storage
from ultra.config import EvaluateConfig
from ultra.evaluate.baselines import count_answers
from ultra.evaluate.predictions import count_training_answers, read_predictions
from ultra.evaluate.suites import answer_metrics
from ultra.evaluate.tables import TABLES, Summary, summarise

_COLUMNS = ("low95", "high95", "constant", "question_only")


def write_tables(settings: EvaluateConfig, exams_uri: str) -> Summary:
    """Score the predictions at `settings.predictions_uri` and return what is kept.

    Kept at `settings.results_uri`: a JSON file for each table, and `summary.json` with the metrics.
    The model is not loaded, only its tokenizer where `settings.tokenizer` is `model`; exams are
    read for their training answers alone.

    Args:
        settings: what to score, how, and where to keep it.
        exams_uri: the exams the predictions are about.

    Raises:
        StorageError: when there is no complete table of predictions or of exams.
        CheckpointError: when the checkpoint whose tokenizer is asked for is missing.
        ConfigError: when its tokenizer cannot be read.
    """
    metrics = answer_metrics(settings.suites, settings.tokenizer, _language_weights(settings))
    predictions = read_predictions(settings.predictions_uri)
    blind = count_answers(count_training_answers(exams_uri))
    summary = summarise(predictions, blind, metrics, settings.bootstrap_samples)
    for name, content in {"summary": summary.metrics, **summary.tables}.items():
        text = json.dumps(content, ensure_ascii=False, indent=1)
        storage.write_bytes(storage.join(settings.results_uri, f"{name}.json"), text.encode())
    return summary


def _language_weights(settings: EvaluateConfig) -> str:
    if settings.tokenizer != "model":
        return ""
    from ultra.model import checkpoint

    return checkpoint.read(settings.checkpoint_uri).config.model.language.weights


def read_summary(uri: str) -> Summary:
    """Return what `write_tables` kept at an address.

    Raises:
        StorageError: when a file of it is missing.
    """

    def read(name: str) -> Any:
        return json.loads(storage.read_bytes(storage.join(uri, f"{name}.json")))

    return Summary(read("summary"), {name: read(name) for name in TABLES})


def format_scores(metrics: dict[str, float]) -> str:
    """Return the model's metrics as lines of text, with intervals and blind answers beside them.

    Args:
        metrics: those of a summary.
    """
    prefixes = (*_COLUMNS, "lesion")
    lines = [f"{'':40}{'model':>10}" + "".join(f"{column:>15}" for column in _COLUMNS)]
    for name, value in metrics.items():
        if name.partition("/")[0] not in prefixes:
            beside = (metrics.get(f"{column}/{name}") for column in _COLUMNS)
            cells = (f"{'':>15}" if v is None else f"{v:15.4g}" for v in beside)
            lines.append(f"{name:40}{value:10.4g}{''.join(cells)}".rstrip())
    return "\n".join(lines)
