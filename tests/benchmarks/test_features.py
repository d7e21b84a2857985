"""The benchmark of features beside pixels, small and in a process of its own: no times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_features_and_pixels_train_alike() -> None:
    command = [sys.executable, "-m", "benchmarks.features", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["largest_difference"] < 5e-3
    assert line["same_random_numbers"]
    # 16 tokens of 96 and 256 channels in two bytes each, and what Parquet puts around them.
    assert 11264 < line["cache_bytes_per_frame"] < 1.05 * 11264
    assert line["features_samples_per_s"] > 0
