from __future__ import annotations

import numpy as np
import pytest

from ultra.data.phantom import Artefact, Lesion, Phantom, cut

PHASES = (0.3, 1.1, 2.0, 2.9, 3.7, 4.4, 5.2, 6.1)


def points(width: int = 31, height: int = 23) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.linspace(-18, 18, width), np.linspace(1, 38, height))
    return x.astype(np.float32), y.astype(np.float32)


def test_section_is_the_radius_of_a_circle_cut_from_a_sphere():
    sphere = Lesion("cyst", (0, 0, 2), (5, 5, 5), "clear")
    # A 3-4-5 triangle: 3 from the centre of a sphere of radius 5, the cut has radius 4.
    assert sphere.section(5) == pytest.approx(4 / 5)
    assert sphere.section(2) == 1
    assert sphere.section(7) == 0
    assert sphere.section(99) == 0


def test_level_is_one_on_the_surface_of_the_ellipsoid():
    lesion = Lesion("nodule", (1, 2, 3), (4, 3, 2), "clear")
    x, y = np.float32([[1, 5, 1, 9]]), np.float32([[2, 2, 5, 2]])
    assert lesion.level(x, y, 3)[0] == pytest.approx([0, 1, 1, 2])
    assert lesion.level(x, y, 5)[0, 0] == pytest.approx(1)


def test_an_unclear_margin_is_blurred_and_irregular():
    x, y = points(201, 201)
    steep = {}
    for margin in ("clear", "unclear"):
        lesion = Lesion("nodule", (0, 19, 0), (6, 6, 6), margin)
        outline = lesion.level(x, y, 0) < 1
        distance = np.hypot(x - 0, y - 19)
        steep[margin] = distance[outline].max() - distance[~outline].min()
    assert steep["clear"] < 0.4 < 1 < steep["unclear"]


@pytest.mark.parametrize("site", ["肝脏", "肾脏", "甲状腺", "乳腺"])
def test_left_is_the_mirror_image_of_right_and_differs_from_it(site):
    x, y = points()
    right = cut(Phantom(site, "right", None, PHASES), (), x, y, 1.5)
    left = cut(Phantom(site, "left", None, PHASES), (), x, y, 1.5)
    assert np.allclose(left.echo, right.echo[:, ::-1], atol=1e-3)
    assert np.abs(left.echo - right.echo).mean() > 1


def test_anatomy_changes_slowly_from_plane_to_plane():
    x, y = points()
    phantom = Phantom("肝脏", "right", None, PHASES)
    here, near, far = (cut(phantom, (), x, y, z).echo for z in (0.0, 0.1, 12.0))
    assert 0 < np.abs(here - near).mean() < 0.2 * np.abs(here - far).mean()


def test_echo_of_each_kind_of_lesion_against_its_surroundings():
    x, y = np.float32([[0.0]]), np.float32([[19.0]])
    plain = cut(Phantom("甲状腺", "right", None, PHASES), (), x, y, 0).echo.item()
    echo = {}
    for kind in ("cyst", "haemangioma", "nodule"):
        lesion = Lesion(kind, (0, 19, 0), (4, 4, 4), "clear")
        echo[kind] = cut(Phantom("甲状腺", "right", lesion, PHASES), (), x, y, 0).echo.item()
    assert echo["cyst"] < echo["nodule"] - 10 < plain - 15
    assert echo["haemangioma"] > plain + 5


def test_a_shadow_follows_the_beams_of_a_convex_probe():
    straight = Artefact("shadow", 4, 20, 5, 0, fan_mm=0)
    fanned = Artefact("shadow", 4, 20, 5, 0, fan_mm=40)
    # The beam through (4, 20) starts at (0, -40), so at y = 50 it has come to x = 6.
    x, y = np.float32([4, 6]), np.float32([50, 50])
    assert straight.level(x, y) == pytest.approx([0, 1])
    assert fanned.level(x, y) == pytest.approx([2 / 3, 0], abs=1e-6)
