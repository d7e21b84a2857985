"""Pictures of frames and of training."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ultra.evaluate.figures import draw_curves, draw_strip


def frame(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 32), grey, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def colours(figure) -> list[set[str]]:
    return [{line.get_color() for line in axis.lines} for axis in figure.axes]


def test_strip_outlines_the_chosen_and_the_valid_frames() -> None:
    frames = [frame(10 * i) for i in range(3)]
    figure = draw_strip(frames, (0.1, 0.25, 0.3), 1, (True, True, False))
    orange, green = "#d95f02", "#1b9e77"
    assert colours(figure) == [{green}, {orange, green}, set()]
    assert [axis.get_title() for axis in figure.axes] == ["0.10", "0.25", "0.30"]
    assert colours(draw_strip(frames, (0.1, 0.2, 0.3), 2, None)) == [set(), set(), {orange}]
    bare = draw_strip(frames, None, None, (True, False, False))
    assert colours(bare) == [{green}, set(), set()]
    assert [axis.get_title() for axis in bare.axes] == ["", "", ""]
    assert len(draw_strip(frames * 4, (0.0,) * 12, 11, None).axes) == 16  # two rows of eight


def test_curves() -> None:
    figure = draw_curves({"loss": [(20, 1.0), (10, 2.0)], "alpha": [(10, 0.5)]})
    loss, alpha = figure.axes
    assert list(loss.lines[0].get_xdata()) == [10, 20]
    assert list(loss.lines[0].get_ydata()) == [2.0, 1.0]
    assert alpha.get_title() == "alpha"
    figure.savefig(io.BytesIO(), format="png")
