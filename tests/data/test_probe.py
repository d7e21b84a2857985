from __future__ import annotations

import math

import numpy as np
import pytest

from ultra.data.phantom import Lesion, Phantom, Tissue, cut
from ultra.data.probe import (
    BLACK_DB,
    CONVEX,
    DYNAMIC_RANGE_DB,
    LINEAR,
    NUM_BEAMS,
    NUM_SAMPLES,
    beam_points,
    display,
    make_speckle,
    pixel_points,
    receive,
)

STEP = LINEAR.depth / NUM_SAMPLES


def noise(looks: int, seed: int = 0) -> np.ndarray:
    shape = (2 * looks, NUM_SAMPLES, NUM_BEAMS)
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def even(echo: float = 0, loss: float = 0) -> Tissue:
    shape = (NUM_SAMPLES, NUM_BEAMS)
    return Tissue(np.full(shape, echo, np.float32), np.full(shape, loss, np.float32))


def test_one_look_of_even_tissue_is_rayleigh_speckle_of_unit_power():
    envelope_db = receive(even(), noise(1), np.random.default_rng(1), STEP)
    envelope = 10 ** (envelope_db / 20)
    # Mean over standard deviation of a Rayleigh variable: sqrt(pi / (4 - pi)) = 1.913.
    assert envelope.mean() / envelope.std() == pytest.approx(1.913, abs=0.06)
    assert np.square(envelope).mean() == pytest.approx(1, abs=0.05)


def test_speckle_keeps_its_power_at_every_depth():
    power = 10 ** (receive(even(), noise(8), np.random.default_rng(1), STEP) / 10)
    for rows in np.split(power, 4):
        assert rows.mean() == pytest.approx(1, abs=0.08)


def test_averaging_looks_smooths_speckle():
    def contrast(looks: int) -> float:
        power = 10 ** (receive(even(), noise(looks), np.random.default_rng(1), STEP) / 10)
        return float(power.std() / power.mean())

    assert contrast(1) == pytest.approx(1, abs=0.06)
    assert contrast(4) == pytest.approx(1 / 2, abs=0.04)


def test_the_beam_is_narrowest_in_the_focus():
    envelope_db = receive(even(), noise(4), np.random.default_rng(1), STEP)

    def likeness(rows: np.ndarray) -> float:
        return float(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1])

    tenth = NUM_SAMPLES // 10
    assert likeness(envelope_db[4 * tenth : 5 * tenth]) < likeness(envelope_db[-tenth:]) - 0.1


def test_loss_adds_up_along_the_beam():
    speckle, rng = noise(1), np.random.default_rng
    lossy = receive(even(loss=0.5), speckle, rng(1), STEP)
    lossless = receive(even(), speckle, rng(1), STEP)
    row = NUM_SAMPLES // 2
    # 0.5 dB/mm over 20 mm is 10 dB; the receiver's noise lies far below.
    assert np.median(lossless[row] - lossy[row]) == pytest.approx(10, abs=0.2)


@pytest.mark.parametrize(("kind", "least", "most"), [("stone", -40, -15), ("cyst", 6, 12)])
def test_a_stone_throws_a_shadow_and_a_cyst_an_enhancement(kind, least, most):
    x, y = beam_points(LINEAR)
    lesion = Lesion(kind, (2, 18, 0), (4, 3.5, 4), "clear")
    phases = (0.3, 1.1, 2.0, 2.9, 3.7, 4.4, 5.2, 6.1)
    pictures = []
    for content in (lesion, None):
        tissue = cut(Phantom("甲状腺", "right", content, phases), (), x, y, 0.0)
        pictures.append(receive(tissue, noise(2), np.random.default_rng(1), STEP))
    change = pictures[0] - pictures[1]
    depth = (y > 25) & (y < 30)
    behind = change[depth & (np.abs(x - 2) < 2)]
    beside = change[depth & (np.abs(x - 2) > 6)]
    assert least < np.median(behind) < most
    assert np.abs(beside).max() < 0.5


def test_planes_close_to_each_other_share_speckle_and_distant_ones_do_not():
    planes = [0.0, 0.3, 9.0]
    first, near, far = make_speckle(np.random.default_rng(0), planes, LINEAR)

    def likeness(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])

    # A slice is 0.6 mm thick: exp(-(0.3 / 0.6)^2).
    assert likeness(first, near) == pytest.approx(math.exp(-0.25), abs=0.01)
    assert abs(likeness(near, far)) < 0.01
    assert near.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("probe", [CONVEX, LINEAR])
def test_the_picture_shows_each_place_where_it_lies(probe):
    beams_x, beams_y = beam_points(probe)
    x, y, inside = pixel_points(probe, 48)
    for wanted, beams in ((x, beams_x), (y, beams_y)):
        spread = 2 * probe.depth
        envelope_db = BLACK_DB + DYNAMIC_RANGE_DB * (beams / spread + 0.5)
        seen = (display(envelope_db, probe, 48) / 255.0 - 0.5) * spread
        # A grey level is spread / 255 mm; at the outermost pixels the last beam is repeated.
        assert np.abs(seen - wanted)[inside].max() < spread / 255 + 0.6


def test_a_convex_probe_sees_a_fan_and_a_linear_probe_everything():
    assert pixel_points(LINEAR, 32)[2].all()
    x, y, inside = pixel_points(CONVEX, 32)
    assert not inside[0, 0]
    angle = np.arctan2(x, y + CONVEX.radius)
    assert np.abs(angle[inside]).max() <= CONVEX.half_angle
    assert (inside == inside[:, ::-1]).all()
    reach = np.hypot(x, y + CONVEX.radius)[inside]
    assert CONVEX.radius <= reach.min() < reach.max() <= CONVEX.radius + CONVEX.depth
