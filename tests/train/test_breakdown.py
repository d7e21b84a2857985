"""What a profile says, of numbers that are given."""

from __future__ import annotations

import pytest

from ultra.train.breakdown import Breakdown, Operator, draw_breakdown
from ultra.train.loop import Span

LONG = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"


@pytest.fixture
def found() -> Breakdown:
    parts_ms = {Span.DATA: 10.0, Span.LANGUAGE: 110.0, Span.BACKWARD: 79.5, Span.OTHER: 0.5}
    rest = [Operator(f"aten::op{i}", 1, 1.0) for i in range(11)]
    operators = [Operator("aten::mm", 7, 25.0), Operator(LONG, 3, 14.0), *rest]
    return Breakdown("align", 6, 3, parts_ms, operators, "CPU")


def test_the_line_ranks_parts_and_leaves_out_the_small(found: Breakdown) -> None:
    assert found.describe() == (
        "align: of 200 ms a step 55 % language model, 40 % backward, 5 % waiting for data"
    )


def test_the_table_has_all_of_it(found: Breakdown) -> None:
    rows = found.rows()
    assert len(rows) == 4 + 13
    assert rows[1] == {
        "step": 6, "kind": "part", "name": "language model", "calls": None, "ms": 110.0,
        "percent": pytest.approx(55),
    }  # fmt: skip
    assert rows[4] == {
        "step": 6, "kind": "operator", "name": "aten::mm", "calls": 7, "ms": 25.0,
        "percent": pytest.approx(50),
    }  # fmt: skip
    assert {tuple(row) for row in rows} == {tuple(rows[0])}


def test_the_picture_has_every_part_and_ten_operators(found: Breakdown) -> None:
    figure = draw_breakdown(found)
    above, below = figure.axes
    assert [bar.get_width() for bar in above.patches] == [10.0, 110.0, 79.5, 0.5]
    assert [label.get_text() for label in above.get_yticklabels()] == [
        "waiting for data", "language model", "backward", "other",
    ]  # fmt: skip
    texts = [text.get_text() for text in above.texts]
    assert texts[:2] == ["10.0 ms, 5 %", "110.0 ms, 55 %"]
    assert len(below.patches) == 10
    names = [label.get_text() for label in below.get_yticklabels()]
    assert names[0] == "mm"
    assert len(names[1]) < len(LONG)
    assert names[1].endswith("_backward")
    assert below.texts[0].get_text() == "25.0 ms, 50 %, 7 calls"
    # No text is cut off at the border.
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for axis in figure.axes:
        box = axis.get_tightbbox()
        assert box is not None
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height
