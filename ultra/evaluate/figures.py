"""Predictions and training as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ultra.model.drawing import CHOSEN_COLOUR, INSET, VALID_COLOUR, outline


def draw_strip(
    frames: Sequence[bytes],
    scores: Sequence[float] | None,
    chosen: int | None,
    valid: Sequence[bool] | None,
    title: str = "",
) -> Figure:
    """Return the frames of an exam side by side, the score under each.

    The chosen frame has a thick orange border, a frame that truly shows what the report says a
    green one inside it.

    Args:
        frames: encoded frames, one at least.
        scores: feature score of each; None for a model that has none.
        chosen: index of the chosen one; None where none was chosen.
        valid: which are valid; None where nobody knows.
        title: in Latin script, the only one every matplotlib has glyphs for.
    """
    columns = min(len(frames), 8)
    rows = -(-len(frames) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for index, (axis, frame) in enumerate(zip(figure.axes, frames, strict=False)):
        with Image.open(io.BytesIO(frame)) as image:
            pixels = np.asarray(image.convert("RGB"))
        axis.imshow(pixels)
        axis.set_title(f"{scores[index]:.2f}" if scores else "", y=-0.16, fontsize=9)
        height, width = pixels.shape[:2]
        if index == chosen:
            outline(axis, width, height, 0.0, CHOSEN_COLOUR)
        if valid is not None and valid[index]:
            outline(axis, width, height, INSET, VALID_COLOUR)
    figure.suptitle(title or "orange: chosen, green: valid", fontsize=9)
    return figure


def draw_curves(history: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Return one panel for each metric over the training steps.

    Args:
        history: metric -> (step, value) in any order.
    """
    figure = Figure(figsize=(4.2 * max(1, len(history)), 3), layout="constrained")
    panels = figure.subplots(1, max(1, len(history)), squeeze=False)[0]
    for axis, (name, points) in zip(panels, history.items(), strict=False):
        steps, values = zip(*sorted(points), strict=True)
        axis.plot(steps, values, color=VALID_COLOUR)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return figure
