"""Trainings killed and stopped, each kind once: they end where the untouched one does."""

from __future__ import annotations

import itertools
import json
import random

import pytest

from benchmarks import stand, survival

TOLERANCE = 1e-4
"""Nats: one worker adds gradients in another order than two."""


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_whatever_is_killed_the_end_is_the_same(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stand, "RESULTS", tmp_path)
    survival.main(["--kills", "1"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    parts = json.loads((tmp_path / "survival.json").read_text())["trainings"]
    assert parts.keys() == {
        "untouched", "worker", "data", "driver", "elastic", "preempted", "node",
    }  # fmt: skip
    assert (line["seen_twice"], line["missed"]) == (0, 0)
    assert line["largest_loss_difference"] < TOLERANCE
    assert line["kills"] == 8
    assert all(part["checkpoints"] == 2 * (survival.STEPS - 1) for part in parts.values())
    # Ray goes on by itself where the driver lives, a driver that ended is submitted again.
    assert [parts[n]["exit_codes"] for n in ("worker", "data", "node")] == [[0], [0], [0]]
    assert parts["driver"]["exit_codes"] == [-9, 0]
    assert parts["elastic"]["exit_codes"] == [-9, -9, 0]
    assert parts["preempted"]["exit_codes"] == [143, 143, 0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_blows_come_before_and_after_the_warm_up_and_never_at_once(count) -> None:
    for seed in range(50):
        steps = survival.draw_steps(random.Random(seed), count)
        assert len(steps) == count
        assert all(b - a > 1 for a, b in itertools.pairwise(steps))
        assert 1 <= steps[0] <= steps[-1] <= 2 * survival.STEPS - 2
        assert count == 1 or steps[0] < survival.WARMUP < steps[-1]
