"""Tables from stored predictions: no model answers again, and no Ray is needed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ultra import storage
from ultra.config import EvaluateConfig, InputError
from ultra.evaluate.baselines import BlindAnswers, count_answers
from ultra.evaluate.comparison import line_up
from ultra.evaluate.others import others_uri
from ultra.evaluate.predictions import Prediction, count_training_answers, read_predictions
from ultra.evaluate.published import to_markdown
from ultra.evaluate.suites import answer_metrics
from ultra.evaluate.tables import TABLES, Summary, summarise

_COLUMNS = ("low95", "high95", "constant", "question_only")
MARKDOWN = "tables.md"


def write_tables(settings: EvaluateConfig, *exams_uris: str) -> Summary:
    """Score the predictions at `settings.predictions_uri` and return what is kept.

    Kept at `settings.results_uri`: a JSON file for each table, `summary.json` with the metrics, and
    `tables.md` with the tables that papers print. No model is loaded, only the tokenizer of ours
    where `settings.tokenizer` is `model`; exams are read for their training answers alone.

    Args:
        settings: what to score, how, and where to keep it; the predictions of `settings.others` are
            scored beside ours.
        exams_uris: exams that may hold training answers; the first that do to such tasks count.

    Raises:
        StorageError: when there is no complete table of predictions or of exams.
        CheckpointError: when the checkpoint whose tokenizer is asked for is missing.
        ConfigError: when its tokenizer cannot be read.
        InputError: when another model answered nothing.
    """
    metrics = answer_metrics(settings.suites, settings.tokenizer, _language_weights(settings))
    predictions = read_predictions(settings.predictions_uri)
    others = {
        other.name: line_up(predictions, read_predictions(others_uri(settings, other)))
        for other in settings.others
    }
    for name, given in others.items():
        _check_answered(name, given)
    blind = _count_blind({p.task for p in predictions}, exams_uris)
    summary = summarise(predictions, blind, metrics, settings.bootstrap_samples, others)
    files = {
        f"{name}.json": json.dumps(content, ensure_ascii=False, indent=1)
        for name, content in {"summary": summary.metrics, **summary.tables}.items()
    }
    files[MARKDOWN] = to_markdown(summary.tables, settings.suites, settings.tokenizer)
    for file, text in files.items():
        storage.write_bytes(storage.join(settings.results_uri, file), text.encode())
    return summary


def _count_blind(tasks: Collection[str], exams_uris: Iterable[str]) -> BlindAnswers | None:
    """Return the blind answers of the first exams whose training split has some to these tasks."""
    for uri in exams_uris:
        counts = count_training_answers(uri)
        known = {asked: count for asked, count in counts.items() if asked[0] in tasks}
        if known:
            return count_answers(known)
    return None


def _check_answered(name: str, given: Sequence[Prediction]) -> None:
    reasons = Counter(p.unanswered for p in given)
    if given and not reasons[""]:
        (reason, count), *_ = reasons.most_common()
        raise InputError(
            f"evaluate.others: {name} answered none of {len(given)} questions; "
            f"of {count} of them: {reason}"
        )


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


def read_markdown(uri: str) -> str:
    """Return the tables that `write_tables` kept at an address, in Markdown.

    Raises:
        StorageError: when they are missing.
    """
    return storage.read_bytes(storage.join(uri, MARKDOWN)).decode()


def format_scores(metrics: dict[str, float], others: Iterable[str] = ()) -> str:
    """Return the model's metrics as lines of text, with intervals and other rows beside them.

    Args:
        metrics: those of a summary.
        others: names of other models.
    """
    columns = (*_COLUMNS, *others)
    lines = [f"{'':40}{'model':>10}" + "".join(f"{column:>15}" for column in columns)]
    for name, value in metrics.items():
        if name.partition("/")[0] not in (*columns, "lesion"):
            beside = (metrics.get(f"{column}/{name}") for column in columns)
            cells = (f"{'':>15}" if v is None else f"{v:15.4g}" for v in beside)
            lines.append(f"{name:40}{value:10.4g}{''.join(cells)}".rstrip())
    return "\n".join(lines)
