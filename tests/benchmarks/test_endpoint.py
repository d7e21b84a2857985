"""The benchmark of the endpoint, once round."""

from __future__ import annotations

import json

import pytest

from benchmarks import endpoint, stand


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_answers_are_the_same_at_every_level_and_exams_are_remembered(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(stand, "RESULTS", tmp_path)
    endpoint.main(["--rounds", "1"])
    result = json.loads((tmp_path / "endpoint.json").read_text())
    throughput = result["throughput"]
    assert throughput["identical"] == throughput["answers"] == 4 + 4 + 8 + 16 + 32
    assert set(throughput["levels"]) == {"1", "4", "8", "16", "32"}
    assert result["follow_ups"]["frames_not_encoded_again"] == 1
    assert result["follow_ups"]["prompt_tokens_remembered"] >= 16
    assert set(result["short_behind_long"]["behind"]) == {"1", "4", "8"}
