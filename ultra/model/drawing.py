"""What `understanding` computes, as a picture.

Matplotlib is imported where something is drawn: machines that only train or serve need none.

Shapes: K pictures of a group, T visual tokens of a picture (a square grid, row by row).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ultra.model.understanding import Understanding

CHOSEN_COLOUR, VALID_COLOUR = "#d95f02", "#1b9e77"
SERIES_COLOURS = ("#7570b3", "#a6761d", "#333333")
"""Each encoder alone, then both."""
MIN_COLUMNS, MAX_COLUMNS = 4, 8
MAX_PIXELS = 320
"""Side of a picture as it is drawn."""
PADDING_COLOUR = (124, 116, 104)
"""The mean of ImageNet's pixels, which is what zero stands for after normalisation."""
SCORE_COLOURS, ATTENTION_COLOURS = "plasma", "viridis"
INSET = 0.045
"""How far the inner border lies inside the outer one, as a share of the side."""


def draw_understanding(
    understanding: Understanding,
    pictures: Sequence[Image.Image],
    valid: Sequence[bool] | None = None,
) -> Figure:
    """Return one figure of an exam.

    Above, every picture as the encoders see it, with its padding, under the scores of its tokens;
    the best token has a white border, the chosen picture an orange one, and one that truly shows
    what the report says a green one inside it. Below, the feature score of every picture by each
    encoder alone and fused, a star over the best of each; and the chosen picture under the
    attention of the answer.

    Args:
        understanding: of the exam.
        pictures: what the encoders see of it, K in number.
        valid: which frames are valid; None where nobody knows. A picture composed of several has no
            green border.
    """
    from matplotlib.figure import Figure

    if valid is not None and len(valid) != len(pictures):
        valid = None
    columns = min(max(len(pictures), MIN_COLUMNS), MAX_COLUMNS)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(1.9 * columns, 2.15 * rows + 3.3), layout="constrained")
    heights = [2.15 * rows + 0.3, 3.0]
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = above.subplots(rows, columns, squeeze=False)
    _draw_tokens(above, axes, understanding, pictures, valid)
    scores, looked = below.subplots(1, 2, width_ratios=[columns - 1.6, 1.6])
    _draw_scores(scores, understanding)
    _draw_attention(below, looked, understanding, pictures[understanding.chosen])
    return figure


def outline(axis: Axes, width: float, height: float, inset: float, colour: str) -> None:
    """Draw a border of a picture, `inset` times its sides inside."""
    left, top = inset * width, inset * height
    x = [left, width - left, width - left, left, left]
    y = [top, top, height - top, height - top, top]
    axis.plot(x, y, color=colour, linewidth=3, clip_on=False)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_tokens(
    above: Any,
    axes: NDArray[Any],
    understanding: Understanding,
    pictures: Sequence[Image.Image],
    valid: Sequence[bool] | None,
) -> None:
    tokens_KT = understanding.token_scores_KT
    low, high = float(tokens_KT.min()), float(tokens_KT.max())
    for axis in axes.flat:
        axis.set_axis_off()
    for index, picture in enumerate(pictures):
        axis = axes.flat[index]
        side = _draw_under(axis, picture, tokens_KT[index], low, high, SCORE_COLOURS)
        _frame_cell(axis, int(tokens_KT[index].argmax()), side / isqrt(tokens_KT.shape[1]), side)
        if index == understanding.chosen:
            outline(axis, side, side, 0.0, CHOSEN_COLOUR)
        if valid is not None and valid[index]:
            outline(axis, side, side, INSET, VALID_COLOUR)
        axis.set_title(f"frame {index}: {understanding.scores_K[index]:.2f}", y=-0.17, fontsize=9)
    _add_scale(above, list(axes.flat), low, high, SCORE_COLOURS, "score of a token")
    above.suptitle("orange: chosen, green: valid, white: best token", fontsize=10)


def _draw_scores(axis: Axes, understanding: Understanding) -> None:
    alpha = understanding.alpha
    series = {f"{name} alone": s for name, s in understanding.encoder_scores.items()}
    series["score" if alpha is None else f"fused, alpha {alpha:.2f}"] = understanding.scores_K
    places = np.arange(len(understanding.scores_K))
    width = 0.8 / len(series)
    colours = SERIES_COLOURS[-len(series) :]
    for number, ((label, scores_K), colour) in enumerate(zip(series.items(), colours, strict=True)):
        x = places + (number - (len(series) - 1) / 2) * width
        axis.bar(x, scores_K, width, color=colour, label=label)
        best = int(scores_K.argmax())
        top = x[best], max(0.0, float(scores_K[best]))
        axis.annotate("★", top, (0, 1), textcoords="offset points", ha="center", color=colour)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xticks(places, [f"{place}" for place in places])
    axis.get_xticklabels()[understanding.chosen].set(color=CHOSEN_COLOUR, fontweight="bold")
    axis.set_xlabel("frame", fontsize=9)
    axis.set_ylabel("feature score", fontsize=9)
    axis.margins(x=0.02, y=0.1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=len(series), frameon=False, fontsize=9,
        handlelength=1, columnspacing=1,
    )  # fmt: skip


def _draw_attention(
    below: Any, axis: Axes, understanding: Understanding, picture: Image.Image
) -> None:
    percent_T = 100 * understanding.attention_T
    high = float(percent_T.max())
    side = _draw_under(axis, picture, percent_T, 0.0, high, ATTENTION_COLOURS)
    outline(axis, side, side, 0.0, CHOSEN_COLOUR)
    axis.set_axis_off()
    _add_scale(below, [axis], 0.0, high, ATTENTION_COLOURS, "% of the answer's attention")
    share = f"{percent_T.sum():.0f} % on frame {understanding.chosen}"
    axis.set_title(f"the answer's attention: {share}", fontsize=9)


def _draw_under(
    axis: Axes, picture: Image.Image, values_T: NDArray[Any], low: float, high: float, colours: str
) -> int:
    """Draw a picture under a veil that is clear where values are low; return the grid's side."""
    import matplotlib

    side, cells = max(picture.size), isqrt(len(values_T))
    share_T = (values_T - low) / max(high - low, 1e-12)
    veil_T4 = matplotlib.colormaps[colours](share_T)
    veil_T4[:, 3] = 0.1 + 0.55 * share_T
    square = Image.new("RGB", (side, side), PADDING_COLOUR)
    square.paste(picture)
    square.thumbnail((MAX_PIXELS, MAX_PIXELS))
    axis.imshow(square, extent=(0, side, side, 0))
    veil = veil_T4.reshape(cells, cells, 4)
    axis.imshow(veil, extent=(0, side, side, 0), interpolation="nearest")
    return side


def _frame_cell(axis: Axes, token: int, size: float, side: float) -> None:
    row, column = divmod(token, round(side / size))
    left, top, right, bottom = column * size, row * size, (column + 1) * size, (row + 1) * size
    x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
    axis.plot(x, y, color="white", linewidth=1.5)


def _add_scale(
    figure: Any, axes: list[Axes], low: float, high: float, colours: str, label: str
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = figure.colorbar(ScalarMappable(Normalize(low, high), colours), ax=axes, aspect=25)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=8)
