"""What an overload comes to: counted by hand, and on a real endpoint for some seconds."""

from __future__ import annotations

import json

import pytest

from benchmarks import overload, stand
from benchmarks.stand import Reply


def test_a_summary_by_hand() -> None:
    after = {"retry-after": "5"}
    replies = [
        Reply(200, total_s=2.0),
        Reply(200, total_s=4.0),
        Reply(200, error="cut short", total_s=9.0),
        Reply(429, headers=after, total_s=0.1),
        Reply(429, total_s=0.3),
        Reply(500, total_s=1.0),
    ]
    memory = [(t, {"a": 100.0 + t}) for t in range(0, 101, 5)]
    result = overload.summarise(replies, memory, 100)
    assert (result["asked"], result["accepted"], result["refused"]) == (6, 2, 2)
    assert result["other"] == {"200 cut short": 1, "500 ": 1}
    assert result["without_retry_after"] == 1
    assert result["accepted_s"]["p50"] == 3.0
    assert result["memory_mib"] == {"a": {"early": 120.0, "late": 187.5}}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whatever_is_not_answered_is_told_when_to_come_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stand, "RESULTS", tmp_path)
    overload.main(["--seconds", "15"])
    result = json.loads((tmp_path / "overload.json").read_text())
    assert result["accepted"] > 0
    assert result["refused"] > 0
    assert result["other"] == {}
    assert result["without_retry_after"] == 0
