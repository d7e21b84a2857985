"""The picture of what an answer rests on, read back from its axes."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ultra.model.drawing import (
    CHOSEN_COLOUR,
    PADDING_COLOUR,
    VALID_COLOUR,
    draw_understanding,
    to_png,
)
from ultra.model.understanding import Understanding


def make(num_pictures: int, chosen: int, alpha: float | None = 0.25) -> Understanding:
    rng = np.random.default_rng(0)
    tokens_KT = rng.normal(size=(num_pictures, 9)).astype(np.float32)
    alone = {name: rng.normal(size=num_pictures) for name in ("clip", "sam")}
    attention_T = rng.uniform(0, 0.04, 9)
    return Understanding(
        chosen, tokens_KT, tokens_KT.max(-1), alone if alpha else {}, alpha, attention_T
    )


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (30, 24), (10 * i, 40, 40)) for i in range(count)]


def borders(axis) -> list[str]:
    return [line.get_color() for line in axis.lines]


def named(figure, start: str):
    (axis,) = [a for a in figure.axes if a.get_title().startswith(start)]
    return axis


def test_frames_carry_their_token_scores_and_their_borders() -> None:
    understanding = make(3, 1)
    figure = draw_understanding(understanding, pictures(3), (False, True, True))
    marks = {0: ["white"], 1: ["white", CHOSEN_COLOUR, VALID_COLOUR], 2: ["white", VALID_COLOUR]}
    scores_KT = understanding.token_scores_KT
    for index, colours in marks.items():
        axis = named(figure, f"frame {index}: {understanding.scores_K[index]:.2f}")
        assert borders(axis) == colours
        picture, veil = axis.images
        assert picture.get_extent() == veil.get_extent() == [0, 30, 30, 0]
        pixels = np.asarray(picture.get_array())
        assert pixels.shape == (30, 30, 3)  # the encoders see padding below
        assert (pixels[:24] == (10 * index, 40, 40)).all()
        assert (pixels[24:] == PADDING_COLOUR).all()
        # The higher a score, the less of the frame is seen.
        opacity = np.asarray(veil.get_array())[..., 3].flatten()
        assert opacity.argsort().tolist() == scores_KT[index].argsort().tolist()
        row, column = divmod(int(scores_KT[index].argmax()), 3)
        x, y = axis.lines[0].get_xdata(), axis.lines[0].get_ydata()
        assert (min(x), max(x), min(y), max(y)) == (
            10 * column, 10 * column + 10, 10 * row, 10 * row + 10,
        )  # fmt: skip


def test_bars_show_each_encoder_alone_and_fused() -> None:
    understanding = make(3, 1)
    figure = draw_understanding(understanding, pictures(3))
    (axis,) = [a for a in figure.axes if a.get_ylabel() == "feature score"]
    labels = ["clip alone", "sam alone", "fused, alpha 0.25"]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == labels
    heights = [[bar.get_height() for bar in bars] for bars in axis.containers]
    series = [*understanding.encoder_scores.values(), understanding.scores_K]
    np.testing.assert_allclose(heights, series)
    bars = [bars[int(s.argmax())] for bars, s in zip(axis.containers, series, strict=True)]
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert [star.xy[0] for star in axis.texts] == pytest.approx(middles)
    assert [t.get_color() == CHOSEN_COLOUR for t in axis.get_xticklabels()] == [False, True, False]


def test_the_chosen_frame_carries_the_attention() -> None:
    understanding = make(3, 2)
    figure = draw_understanding(understanding, pictures(3))
    share = 100 * understanding.attention_T.sum()
    axis = named(figure, f"the answer's attention: {share:.0f} % on frame 2")
    assert borders(axis) == [CHOSEN_COLOUR]
    assert tuple(np.asarray(axis.images[0].get_array())[0, 0][:3]) == (20, 40, 40)
    opacity = np.asarray(axis.images[1].get_array())[..., 3].flatten()
    assert opacity.argsort().tolist() == understanding.attention_T.argsort().tolist()


@pytest.mark.parametrize(("count", "alpha"), [(1, 0.5), (1, None), (11, 0.5), (11, None)])
def test_any_number_of_frames_and_one_encoder(count, alpha) -> None:
    figure = draw_understanding(make(count, count - 1, alpha), pictures(count))
    frames = [a for a in figure.axes if a.get_title().startswith("frame ")]
    assert len(frames) == count
    (axis,) = [a for a in figure.axes if a.get_ylabel() == "feature score"]
    assert len(axis.containers) == (1 if alpha is None else 3)
    with Image.open(io.BytesIO(to_png(figure))) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_a_picture_of_several_frames_is_not_marked_valid() -> None:
    figure = draw_understanding(make(1, 0), pictures(1), (True, True, False))
    assert borders(named(figure, "frame 0")) == ["white", CHOSEN_COLOUR]


def test_scores_that_do_not_differ() -> None:
    same = np.zeros((2, 9), dtype=np.float32)
    understanding = Understanding(0, same, same.max(-1), {}, None, same[0])
    assert to_png(draw_understanding(understanding, pictures(2))).startswith(b"\x89PNG")
