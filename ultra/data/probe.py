"""An ultrasound probe: from the tissue in a plane to the picture on the screen.

A frame is made as a machine makes it, along beams: echo strength times white noise gives speckle,
the point spread widens away from the focus, loss adds up along the beam (so a stone throws a
shadow and a cyst an enhancement), then log compression and scan conversion.

Shapes: R samples along a beam, L beams, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, map_coordinates

from ultra.data.phantom import Array, Tissue

NUM_SAMPLES, NUM_BEAMS = 288, 144
AXIAL_SAMPLES, LATERAL_BEAMS = 0.8, (1.6, 0.8)
"""Point spread: along the beam, and across it away from the focus and in it."""
LOOKS = 2
"""Independent looks that are averaged, as compounding machines do."""
DYNAMIC_RANGE_DB, BLACK_DB, NOISE_DB = 60.0, -24.0, -30.0


@dataclass(frozen=True, slots=True)
class Probe:
    """Where beams run. A linear probe has radius 0; angles are in radians, lengths in mm."""

    depth: float
    width: float
    radius: float = 0.0
    half_angle: float = 0.0


CONVEX = Probe(depth=100, width=108, radius=45, half_angle=math.radians(25))
LINEAR = Probe(depth=40, width=40)


def receive(tissue: Tissue, speckle: Array, rng: np.random.Generator, step: float) -> Array:
    """Return the echo envelope in dB, (R, L): what comes back along each beam.

    Args:
        tissue: the plane in beam space, (R, L).
        speckle: white noise of unit variance, (2 * looks, R, L), a pair for each look.
        rng: for the receiver's own noise.
        step: millimetres between samples.
    """
    amplitude = np.power(np.float32(10), tissue.echo / 20)
    gain_db = -step * np.cumsum(tissue.loss, axis=0)
    field = _blur(speckle * amplitude)
    power = np.mean(np.square(field), axis=0) * np.power(np.float32(10), gain_db / 10)
    power += 10 ** (NOISE_DB / 10) * rng.standard_exponential(power.shape, dtype=np.float32)
    envelope_db: Array = 10 * np.log10(power)
    return envelope_db


def _blur(field: Array) -> Array:
    """Return the field through the point spread; white noise keeps its power."""
    wide, narrow, focus, scale = _point_spread()
    field = gaussian_filter1d(field, AXIAL_SAMPLES, axis=1, truncate=3)
    near = gaussian_filter1d(field, wide, axis=2, truncate=3)
    sharp = gaussian_filter1d(field, narrow, axis=2, truncate=3)
    blurred: Array = (near + (sharp - near) * focus) * scale
    return blurred


@lru_cache
def _point_spread() -> tuple[float, float, Array, Array]:
    """Return both lateral widths in beams, the share of the narrow one, and the power's inverse."""
    wide, narrow = LATERAL_BEAMS
    rows = np.arange(NUM_SAMPLES) / NUM_SAMPLES
    focus = np.exp(-(((rows - 0.45) / 0.35) ** 2))[:, None]
    impulse = np.zeros(63)
    impulse[31] = 1
    a, b, c = (gaussian_filter1d(impulse, s, truncate=3) for s in (wide, narrow, AXIAL_SAMPLES))
    power = np.square(a + (b - a) * focus).sum(axis=1, keepdims=True) * np.square(c).sum()
    return wide, narrow, focus.astype(np.float32), (1 / np.sqrt(power)).astype(np.float32)


def make_speckle(
    rng: np.random.Generator, planes: Sequence[float], probe: Probe
) -> Iterator[Array]:
    """Yield the noise of each plane; planes nearer than a slice's thickness share some of it."""
    shape = (2 * LOOKS, NUM_SAMPLES, NUM_BEAMS)
    field, before = rng.standard_normal(shape, dtype=np.float32), planes[0]
    for z in planes:
        shared = math.exp(-(((z - before) / (0.015 * probe.depth)) ** 2))
        if z != before:
            fresh = rng.standard_normal(shape, dtype=np.float32)
            field = shared * field + math.sqrt(1 - shared**2) * fresh
        yield field
        before = z


@lru_cache
def beam_points(probe: Probe) -> tuple[Array, Array]:
    """Return x and y in mm of every sample of every beam, (R, L)."""
    along = (np.arange(NUM_SAMPLES, dtype=np.float32)[:, None] + 0.5) * (probe.depth / NUM_SAMPLES)
    across = (np.arange(NUM_BEAMS, dtype=np.float32) + 0.5) / NUM_BEAMS * 2 - 1
    if not probe.radius:
        return np.broadcast_arrays(across * (probe.width / 2), along)  # type: ignore[return-value]
    angle = across * probe.half_angle
    reach = along + probe.radius
    return reach * np.sin(angle), reach * np.cos(angle) - probe.radius


@lru_cache
def pixel_points(probe: Probe, size: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Return x and y in mm of every pixel's centre and whether a beam passes it, (H, W)."""
    step = probe.width / size
    centres = (np.arange(size, dtype=np.float32) + 0.5) * step
    top = probe.radius * (math.cos(probe.half_angle) - 1)
    x, y = np.meshgrid(centres - probe.width / 2, centres + top)
    row, column = _beam_position(probe, x, y)
    inside = (row >= -0.5) & (row < NUM_SAMPLES - 0.5)
    inside &= (column >= -0.5) & (column < NUM_BEAMS - 0.5)
    return x, y, inside


def _beam_position(probe: Probe, x: Array, y: Array) -> tuple[Array, Array]:
    """Return the sample and the beam, with fractions, that look at points in mm."""
    if not probe.radius:
        along, across = y, x / (probe.width / 2)
    else:
        along = np.hypot(x, y + probe.radius) - probe.radius
        across = np.arctan2(x, y + probe.radius) / probe.half_angle
    return along * (NUM_SAMPLES / probe.depth) - 0.5, (across + 1) * (NUM_BEAMS / 2) - 0.5


def display(envelope_db: Array, probe: Probe, size: int) -> NDArray[np.uint8]:
    """Return the picture of a frame, (H, W): compressed, brought from beams to pixels."""
    x, y, inside = pixel_points(probe, size)
    position = np.stack(_beam_position(probe, x, y))
    grey = np.clip((envelope_db - BLACK_DB) * (255 / DYNAMIC_RANGE_DB), 0, 255)
    picture: Array = map_coordinates(grey, position, order=1, mode="nearest") * inside
    return picture.astype(np.uint8)
