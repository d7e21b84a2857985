"""Tables regenerate from stored predictions, without a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.config import EvaluateConfig
from ultra.data import parquet
from ultra.evaluate.predictions import PREDICTIONS, to_table
from ultra.evaluate.results import format_scores, read_summary, write_tables
from ultra.evaluate.tables import TABLES
from ultra.model.checkpoint import CheckpointError
from ultra.storage import StorageError

GIVEN = [
    make_prediction("囊肿", "囊肿", exam_id="a"),
    make_prediction("结石", "结节", exam_id="b", valid=(True, False), scores=(1.0, 0.0)),
]


@pytest.fixture
def settings(tmp_path: Path, write_exams: Callable[[str], None]) -> EvaluateConfig:
    write_exams(str(tmp_path / "exams"))
    uri = str(tmp_path / "predictions")
    rows = to_table(GIVEN).to_pylist()
    part = parquet.write_part(rows, uri, PREDICTIONS, position=0, row_group_bytes=2**20)
    parquet.publish_parts(uri, [part] if part else [])
    return EvaluateConfig(
        predictions_uri=uri,
        results_uri=str(tmp_path / "results"),
        checkpoint_uri=str(tmp_path / "nowhere"),
        bootstrap_samples=50,
    )


def test_tables_from_predictions_alone(settings: EvaluateConfig, tmp_path: Path) -> None:
    summary = write_tables(settings, str(tmp_path / "exams"))
    assert summary.metrics["strict/em"] == 0.5
    assert summary.metrics["constant/strict/em"] == 0.5  # 囊肿, the training exams' answer
    assert summary.metrics["selection/accuracy"] == 1
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"tables.md", *(f"{name}.json" for name in ("summary", *TABLES))}
    kept = read_summary(settings.results_uri)
    assert kept.metrics == pytest.approx(summary.metrics)
    assert kept.tables["intervals"] == json.loads(json.dumps(summary.tables["intervals"]))
    again = write_tables(settings, str(tmp_path / "exams"))
    assert again == summary


def test_tokenizer_and_suites_are_chosen(
    settings: EvaluateConfig, tmp_path: Path, random_checkpoint: str
) -> None:
    jieba = settings.model_copy(update={"tokenizer": "jieba", "suites": ("llava_med",)})
    metrics = write_tables(jieba, str(tmp_path / "exams")).metrics
    assert metrics["llava_med/em-jieba"] == 0.5
    assert not [name for name in metrics if "strict/" in name]
    own = settings.model_copy(update={"tokenizer": "model", "checkpoint_uri": random_checkpoint})
    metrics = write_tables(own, str(tmp_path / "exams")).metrics
    assert metrics["strict/f1-model"] == 0.75  # one character of two


def test_what_is_missing_is_named(settings: EvaluateConfig, tmp_path: Path) -> None:
    own = settings.model_copy(update={"tokenizer": "model"})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        write_tables(own, str(tmp_path / "exams"))
    with pytest.raises(StorageError, match="no complete table"):
        write_tables(settings, str(tmp_path / "other"))
    with pytest.raises(StorageError):
        read_summary(str(tmp_path / "other"))


def test_scores_as_text() -> None:
    text = format_scores(
        {
            "num_exams": 7,
            "strict/em": 0.5,
            "constant/strict/em": 0.25,
            "lesion/strict/em": 0.1,
            "low95/strict/em": 0.375,
            "high95/strict/em": 0.625,
        }
    )
    head, exams, em = text.splitlines()
    assert head.split() == ["model", "low95", "high95", "constant", "question_only"]
    assert exams.split() == ["num_exams", "7"]
    assert em.split() == ["strict/em", "0.5", "0.375", "0.625", "0.25"]
