"""The benchmark of SAM's attention, on a small encoder: what it says of outputs, no times."""

from __future__ import annotations

import json

from benchmarks import sam


def test_a_small_encoder_gives_the_packages_outputs(capsys) -> None:
    sam.main(["--quick"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < line["float32_largest_difference"] < 1e-4
    assert 0 < line["bfloat16_largest_difference"] < 0.2
    assert line["float32_ratio"] > 0
    assert line["bfloat16_ratio"] > 0
