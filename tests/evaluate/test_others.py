"""Other models as replicas of batch inference, and what is said of their answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from tests.evaluate.conftest import make_prediction
from tests.evaluate.image_text_weights import write_image_text_model
from tests.evaluate.vision_server import completion, serve
from ultra.config import ConfigError, EvaluateConfig, OtherModel
from ultra.data import schema
from ultra.evaluate.others import OtherPredictor, check, report
from ultra.evaluate.predictions import PREDICTIONS
from ultra.storage import StorageError
from ultra.types import FrameGroup

Exams = list[FrameGroup]
SETTINGS = EvaluateConfig(max_new_tokens=3, batch_size=2)


def answer(other: OtherModel, exams: Exams) -> list[dict[str, object]]:
    table = pa.Table.from_pylist([schema.to_row(e) for e in exams], schema=schema.EXAMS)
    found = OtherPredictor(other, SETTINGS, check(other))(table)
    assert found.schema == PREDICTIONS
    assert found.column("scores").null_count == found.column("chosen").null_count == len(found)
    rows: list[dict[str, object]] = found.to_pylist()
    return rows


def with_ids(exam: FrameGroup) -> FrameGroup:
    asked = (replace(c, question_id=f"{exam.exam_id}-{c.task}") for c in exam.conversations)
    return replace(exam, conversations=tuple(asked), modality="CT")


def test_each_kind_answers_tables_of_exams(
    exams: Exams, random_backbones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = [with_ids(exam) for exam in exams[:2]]
    lines = [{"question_id": "a-kind", "text": "囊肿"}, {"question_id": "b-kind", "text": "结节"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    read = answer(OtherModel(name="file", answers_uri=str(path)), groups)
    asked = [(row["exam_id"], row["task"], row["modality"], row["question_id"]) for row in read]
    assert asked == [
        ("a", "kind", "CT", "a-kind"), ("a", "normal", "CT", "a-normal"),
        ("b", "kind", "CT", "b-kind"),
    ]  # fmt: skip
    assert [row["answer"] for row in read] == ["囊肿", "", "结节"]

    weights = write_image_text_model(tmp_path / "llava", random_backbones / "language")
    computed = answer(OtherModel(name="llava", weights=weights, frames="first"), groups)
    assert [row["question"] for row in computed] == [row["question"] for row in read]
    assert all(1 <= len(row["token_ids"]) <= 3 for row in computed)  # type: ignore[arg-type]

    monkeypatch.setenv("SOME_KEY", "secret")
    with serve(lambda question, _: completion(question)) as server:
        gpt = OtherModel(name="gpt", base_url=server.url, model="v", api_key_env="SOME_KEY")
        heard = answer(gpt, groups)
    assert [row["answer"] for row in heard] == [row["question"] for row in read]
    assert set(server.keys) == {"Bearer secret"}
    assert {r["max_completion_tokens"] for r in server.requests} == {3}


def test_what_is_missing_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match=r"nowhere.jsonl"):
        check(OtherModel(name="x", answers_uri=f"{tmp_path}/nowhere.jsonl"))
    with pytest.raises(ConfigError, match=r"x: no model at .*nowhere"):
        check(OtherModel(name="x", weights=f"{tmp_path}/nowhere"))
    monkeypatch.delenv("SOME_KEY", raising=False)
    keyed = OtherModel(name="x", base_url="http://localhost/v1", model="m", api_key_env="SOME_KEY")
    with pytest.raises(ConfigError, match="x: SOME_KEY is not set"):
        check(keyed)
    monkeypatch.setenv("SOME_KEY", "secret")
    key = check(keyed)
    assert key.get_secret_value() == "secret"
    assert "secret" not in f"{key} {key!r}"


def test_what_is_not_answered_is_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    lines = [{"question_id": i, "text": "?"} for i in (0, 1, *range(50, 62))]
    path.write_text("\n".join(map(json.dumps, lines)))
    given = [
        make_prediction(question_id=str(i), question=str(i), unanswered="" if i < 2 else "gone")
        for i in range(13)
    ]
    gone = ", ".join(str(i) for i in range(2, 12))
    strays = ", ".join(str(i) for i in range(50, 60))
    assert report(OtherModel(name="gpt", answers_uri=str(path)), given).splitlines() == [
        "gpt: 2 of 13 questions answered",
        f"  11 not, gone: {gone}, …",
        f"  12 answers to questions that were not asked: {strays}, …",
    ]
    other = OtherModel(name="llava", weights="anywhere")
    assert report(other, given[:2]) == "llava: 2 of 2 questions answered"
