"""The encoder's benchmark, small and in a process of its own: equal answers, no times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.encoder import make_groups
from tests.conftest import ROOT


def test_requests_have_4_to_16_frames() -> None:
    groups = make_groups(0, 16)
    counts = [len(group) for group in groups]
    assert (len(counts), min(counts), max(counts), sum(counts)) == (16, 4, 16, 157)
    assert len({frame for group in groups for frame in group}) == 157


@pytest.mark.slow
def test_answers_are_the_same() -> None:
    command = [sys.executable, "-m", "benchmarks.encoder", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["same_choice"] == 2 * 16
    assert line["largest_difference"] < 1e-4
    assert line["batched"] > 0
