from __future__ import annotations

import pytest

from benchmarks.prepare import flatness


def test_memory_is_compared_between_the_second_and_the_last_quarter() -> None:
    values = [(100.0 + second, 50.0 if second < 10 else 200.0) for second in range(40)]
    grown = [(when, mib * (1.5 if when > 130 else 1.0)) for when, mib in values]
    found = flatness({"1": values, "2": grown, "3": values[:20]}, start=100.0, seconds=40.0)
    assert found == {
        "1": {"early": 200.0, "late": 200.0, "most": 200.0},
        "2": {"early": 200.0, "late": pytest.approx(300.0), "most": 300.0},
    }
