"""The benchmark of the engine, small: its answers and what it says, never how fast."""

from __future__ import annotations

import json

import pytest

from benchmarks import engine
from benchmarks.engine import QUICK
from ultra.config import LanguageConfig
from ultra.model.language import LanguageBranch
from ultra.types import VISUAL


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return engine.make_language(tmp_path_factory.mktemp("weights"), QUICK.width, QUICK.layers)


@pytest.fixture(scope="module")
def language(weights):
    config = LanguageConfig(weights=str(weights), lora=None, max_length=QUICK.max_length)
    return LanguageBranch(config).eval()


def test_the_three_ways_give_the_same_tokens(language) -> None:
    requests = engine.make_requests(language, 5, 0, (2, 9))
    assert sorted(r.max_new_tokens for r in requests) == [2, 4, 6, 7, 9]  # 3.75 to 7.25 rounded
    for request in requests:
        assert 40 <= len(request.prompt_ids) <= 100
        assert list(request.prompt_ids).count(VISUAL) == len(request.tokens_VD) == 16
    one, static, ours = (
        answer(language, requests)[0]
        for answer in (engine.answer_in_turn, engine.answer_as_batch, engine.answer_with_engine)
    )
    assert one == static == ours
    assert [len(ids) for ids in one] == [r.max_new_tokens for r in requests]
    assert len(set(map(tuple, one))) == 5


def test_an_answer_that_differs_is_counted(language, monkeypatch) -> None:
    right = engine.answer_as_batch

    def wrong(language, requests):
        answers, seconds = right(language, requests)
        return [*answers[:-1], [*answers[-1][:-1], -1]], seconds

    monkeypatch.setattr(engine, "answer_as_batch", wrong)
    row = engine.compare(language, 3, (4, 4), repeats=2)
    assert (row["identical"], row["of"]) == (4, 6)


def test_only_tokens_to_the_end_count() -> None:
    assert engine._until_end([5, 2, 2, 7], 2) == [5, 2]
    assert engine._until_end([5, 7], 2) == [5, 7]


def test_the_quick_form(monkeypatch, capsys) -> None:
    monkeypatch.setattr(engine, "write_result", None)  # keeps nothing
    engine.main(["--quick"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["tokens_per_s"]) == {"equal", "unequal"}
    for rows in result["tokens_per_s"].values():
        assert {level: row["identical"] for level, row in rows.items()} == {"1": 1, "4": 4}
    assert set(result["latency_s"]) == {"1", "4"}
    fairness = result["short_behind_long"]
    assert fairness["prompt_tokens"] == {"short": 40, "long": 252}
    assert set(fairness["over_alone"]) == {"0", "1", "2"}
    assert fairness["over_alone"]["0"] == 1
