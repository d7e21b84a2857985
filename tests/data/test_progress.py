from __future__ import annotations

import pytest

from ultra.data.progress import describe_progress


@pytest.mark.parametrize(
    ("counts", "elapsed_s", "line"),
    [
        (
            {"exams": 1200, "frames": 5820, "in quarantine": 0},
            40.0,
            "prepare: 1,200 of 10,000 exams (30/s), 5,820 frames (146/s), 5 min left",
        ),
        (
            {"exams": 10_000, "bad": 3},
            4000.0,
            "prepare: 10,000 of 10,000 exams (2.5/s), 3 bad (0.0/s)",
        ),
        (
            {"row groups": 20, "frames": 300, "bytes": 3_456_789},
            10.0,
            "prepare: 20 of 10,000 row groups (2.0/s), 300 frames (30/s), "
            "11,523 bytes a frame, 83 min left",
        ),
        ({"exams": 0}, 0.0, "prepare: 0 of 10,000 exams (0.0/s)"),
        ({"exams": 5000}, 10.0, "prepare: 5,000 of 10,000 exams (500/s), 10 s left"),
    ],
)
def test_a_line_tells_counts_rates_and_what_is_left(
    counts: dict[str, int], elapsed_s: float, line: str
) -> None:
    assert describe_progress("prepare", 10_000, counts, elapsed_s) == line
