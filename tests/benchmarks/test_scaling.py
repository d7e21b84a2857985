"""Encoder and language model scale apart, on a real cluster."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling, stand


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_part_scales_under_its_own_load_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stand, "RESULTS", tmp_path)
    scaling.main([])
    loads = json.loads((tmp_path / "scaling.json").read_text())["loads"]
    most = {title: load["most_replicas"] for title, load in loads.items()}
    assert most["long answers"] == {"EncoderReplica": 1, "LanguageReplica": 2}
    assert most["many frames"] == {"EncoderReplica": 2, "LanguageReplica": 1}
    assert [load["failed"] for load in loads.values()] == [0, 0]
