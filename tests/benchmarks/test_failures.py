"""Replicas killed and replaced under load, small: nothing lost, nothing changed."""

from __future__ import annotations

import json

import pytest

from benchmarks import failures, stand


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_answer_is_lost_or_changed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stand, "RESULTS", tmp_path)
    failures.main(["--requests", "40", "--kills", "2"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = json.loads((tmp_path / "failures.json").read_text())["parts"]
    assert [part["disturbance"] for part in parts] == [
        "kill Ingress", "kill EncoderReplica", "kill LanguageReplica", "update",
    ]  # fmt: skip
    for part in parts:
        assert part["requests"] >= 40
        assert (part["lost"], part["lost_how"]) == (0, {}), part
        assert (part["changed"], part["changed_how"]) == (0, []), part
        assert line[part["disturbance"]]["kills"] == part["kills"] >= 2
    assert sum(part["resumed"] for part in parts) > 0
