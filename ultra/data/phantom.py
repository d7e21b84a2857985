"""A 3-D ultrasound phantom: anatomy, lesions and artefacts as echo strength and sound loss.

Coordinates are millimetres: x to the right of the picture, y down from the probe, z across the
sweep; a frame is the plane z = constant. Echo strength is in dB around the liver's, loss in dB
for every millimetre of depth, beyond what the machine's gain makes good. Anatomy is written for
the right side of the body; the left side is its mirror image.

Shapes: any array of points works, so the same geometry is sampled along beams and at pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
"""float32 throughout, for speed."""
Kind = Literal["cyst", "haemangioma", "stone", "nodule", "normal"]
Side = Literal["left", "right"]
Margin = Literal["clear", "unclear"]
ArtefactKind = Literal["gas", "vessel", "ligament", "shadow"]
Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Lesion:
    """An ellipsoid of another tissue.

    Attributes:
        centre: (x, y, z) in mm.
        radii: half axes in mm; the x axis carries the reported size.
        phases: where an unclear edge bulges.
    """

    kind: Kind
    centre: Vector
    radii: Vector
    margin: Margin
    phases: tuple[float, float] = (0.0, 0.0)

    def section(self, z: float) -> float:
        """Return the radius of the cut at plane z over the largest one: 1 mid-way, 0 outside."""
        return math.sqrt(max(0.0, 1 - ((z - self.centre[2]) / self.radii[2]) ** 2))

    def level(self, x: Array, y: Array, z: float) -> Array:
        """Return 0 in the centre, 1 on the surface and more outside, bulges included."""
        u, v = (x - self.centre[0]) / self.radii[0], (y - self.centre[1]) / self.radii[1]
        w = (z - self.centre[2]) / self.radii[2]
        squared = u * u + v * v
        if self.margin == "unclear":
            angle = np.arctan2(v, u)
            bulge = np.sin(3 * angle + self.phases[0]) + np.sin(5 * angle + self.phases[1])
            squared = squared / np.square(1 + 0.11 * bulge)
        level: Array = np.sqrt(squared + w * w)
        return level


@dataclass(frozen=True, slots=True)
class Artefact:
    """Something of one frame that catches the eye and is no lesion.

    Attributes:
        kind: gas (bright, with reverberation), vessel (dark streak), ligament (bright streak),
            shadow (dark from the skin down, where the probe has lost contact).
        angle: of the streak to the horizontal, in radians.
        fan_mm: radius of the probe, along whose beams a shadow falls; 0 for parallel beams.
    """

    kind: ArtefactKind
    x: float
    y: float
    size_mm: float
    angle: float
    fan_mm: float

    def level(self, x: Array, y: Array) -> Array:
        """Return 0 in the centre and 1 on the outline."""
        if self.kind == "gas":
            across = np.abs(x - self.x) / (0.5 * self.size_mm)
            down = np.abs(y - self.y - 0.6 * self.size_mm) / (0.8 * self.size_mm)
            box: Array = np.maximum(across, down)
            return box
        if self.kind == "shadow":
            spread = (self.fan_mm + self.y) / (self.fan_mm + y) if self.fan_mm else 1 + 0 * y
            return np.abs(x * spread - self.x) / (0.4 * self.size_mm)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        u = (x - self.x) * cos + (y - self.y) * sin
        v = (y - self.y) * cos - (x - self.x) * sin
        long, short = self.size_mm * 0.62, self.size_mm * 0.23
        streak: Array = np.hypot(u / long, v / short)
        return streak


@dataclass(frozen=True, slots=True)
class Phantom:
    """One patient's organ: everything a plane can cut."""

    site: str
    side: Side
    lesion: Lesion | None
    phases: tuple[float, ...]
    """Eight numbers that make this patient's anatomy differ from the next one's, in 0..2 pi."""

    @property
    def mirror(self) -> int:
        """1 on the right side of the body, -1 on the left."""
        return 1 if self.side == "right" else -1


@dataclass(slots=True)
class Tissue:
    """Echo in dB and loss in dB/mm at the points of a plane, painted over step by step."""

    echo: Array
    loss: Array

    def cover(self, weight: Array, echo: Array | float, loss: float = 0.0) -> None:
        """Replace what is there where the weight is 1, and mix where it lies between 0 and 1."""
        self.echo += weight * (echo - self.echo)
        self.loss += weight * (loss - self.loss)


def cut(phantom: Phantom, artefacts: tuple[Artefact, ...], x: Array, y: Array, z: float) -> Tissue:
    """Return the tissue at the points (x, y) of the plane z."""
    tissue = Tissue(np.zeros_like(x), np.zeros_like(x))
    mirrored = x * phantom.mirror
    _PAINTERS[phantom.site](tissue, mirrored, y, z, phantom.phases)
    # Parenchyma is never even: a slow swell that goes through the planes.
    a, b, c, *_ = phantom.phases
    swell = np.sin(mirrored / 7 + a + z / 6) * np.sin(y / 9 + b)
    tissue.echo += 1.5 * (swell + np.sin((mirrored + y) / 5 + c - z / 5))
    for artefact in artefacts:
        _paint_artefact(tissue, artefact, x, y)
    if phantom.lesion is not None and phantom.lesion.section(z) > 0:
        _paint_lesion(tissue, phantom.lesion, x, y, z)
    return tissue


def _edge(distance: Array, width: float) -> Array:
    """Return 0 to 1 across a border `width` wide, 1 where the distance is positive."""
    weight: Array = np.clip(distance / width + 0.5, 0, 1)
    return weight


def _line(distance: Array, width: float) -> Array:
    """Return a ridge `width` wide, 1 where the distance is 0."""
    weight: Array = np.exp(-np.square(distance / width))
    return weight


def _ellipse(x: Array, y: Array, centre: tuple[float, float], radii: tuple[float, float]) -> Array:
    level: Array = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    return level


def _tube(
    tissue: Tissue, x: Array, y: Array, z: float, start: Vector, to: Vector, r: float
) -> None:
    """Paint a vessel with a bright wall; blood echoes little and, here, loses as tissue does."""
    length = math.dist(start, to)
    dx, dy, dz = ((b - a) / length for a, b in zip(start, to, strict=True))
    px, py, pz = x - start[0], y - start[1], z - start[2]
    along = px * dx + py * dy + pz * dz
    squared = px * px + py * py + pz * pz - along * along
    distance = np.sqrt(np.maximum(squared, 0))
    tissue.cover(_line(distance - (r + 0.6), 0.8), 8.0)
    tissue.cover(_edge(r - distance, 0.8), -30.0)


def _layers(tissue: Tissue, x: Array, y: Array, end: float, phase: float) -> None:
    """Paint skin, fat and muscle down to `end` mm."""
    wave = np.sin(x * (2.2 / end) + phase) + 0.6 * np.sin(x * (5 / end) - 2 * phase)
    stripes = -6 + 5 * np.sin((y + 0.05 * end * wave) * (16 / end) + phase) * (1 + 0.4 * wave)
    y = y - 0.03 * end * wave
    tissue.cover(_edge(end - y, 1.0), stripes)
    tissue.cover(_line(y - end, 0.9), 12.0)
    tissue.cover(_edge(end * 0.12 - y, 0.5), 14.0)


def _paint_liver(tissue: Tissue, x: Array, y: Array, z: float, phases: tuple[float, ...]) -> None:
    p = [math.sin(phase) for phase in phases]
    _tube(tissue, x, y, z, (-12 + 6 * p[4], 88, 4 * p[5]), (22, 30 + 6 * p[6], 14 * p[7]), 2.4)
    _tube(tissue, x, y, z, (38, 78 + 5 * p[5], -12), (12 + 5 * p[4], 52, 20 + 6 * p[6]), 3.0)
    _tube(tissue, x, y, z, (2 + 8 * p[7], 24, -10 + 4 * p[6]), (30, 22, 26), 2.0)
    # The dome of the diaphragm closes the right lobe on one side of the picture.
    dome = 68 + 0.85 * x + 0.008 * np.square(x) + 4 * p[3] + 0.12 * z
    tissue.cover(_edge(y - dome, 1.5), -14.0, 0.25)
    tissue.cover(_line(y - dome, 1.6), 19.0)
    _layers(tissue, x, y, 12 + 1.5 * p[4], phases[4])


def _paint_kidney(tissue: Tissue, x: Array, y: Array, z: float, phases: tuple[float, ...]) -> None:
    p = [math.sin(phase) for phase in phases]
    tissue.echo += 4 + 4 * np.sin(y / 2.5 + np.sin(x / 11 + phases[3]))
    # The neighbour (liver or spleen) lies over the upper pole, on one side of the picture.
    neighbour = 46 - 1.1 * (x + 34) + 3 * p[4] - y
    tissue.cover(_edge(neighbour, 2.0), -1.0)
    tissue.cover(_line(neighbour, 1.2), 11.0)
    slope = 0.24 + 0.06 * p[5]
    u, v = x - 3, y - (56 + 2 * p[6]) - slope * x
    shrink = (z / 50) ** 2
    body = np.sqrt(np.square(u / 42) + np.square(v / 22) + shrink)
    tissue.cover(_line((body - 1) * 22, 1.3), 13.0)
    tissue.cover(_edge((1 - body) * 22, 1.2), -6.0)
    pyramids = np.cos(np.arctan2(v * 2, u) * 8 + (phases[7] + z / 10))
    ring = _line((body - 0.66) * 22, 3.0) * np.clip(pyramids, 0, 1)
    tissue.echo -= 6 * ring
    sinus = np.sqrt(np.square(u / 24) + np.square(v / 8) + 2 * shrink)
    tissue.cover(_edge((1 - sinus) * 8, 3.0), 9 + 3 * np.sin(u / 2.2) * np.sin(v / 1.7))
    _layers(tissue, x, y, 13 + 1.5 * p[4], phases[4])


def _paint_thyroid(tissue: Tissue, x: Array, y: Array, z: float, phases: tuple[float, ...]) -> None:
    p = [math.sin(phase) for phase in phases]
    fibres = np.sin(y * 2.6 + 1.4 * np.sin(x / 4 + phases[3]) + z / 8)
    tissue.echo += -9 + 4 * fibres * (1 + 0.6 * np.sin(x / 3 - y / 5 + phases[5]))
    body = _ellipse(x, y, (1.0 + p[4] * 0.6, 19.5), (13.5, 9.8))
    body = np.sqrt(np.square(body) + (z / 30) ** 2)
    tissue.cover(_line((body - 1) * 10, 0.5), 13.0)
    tissue.cover(_edge((1 - body) * 10, 0.5), 5.0)
    artery = _ellipse(x, y, (17.0 + 0.6 * p[5], 19.5 + 1.5 * p[6]), (3.4, 3.4))
    tissue.cover(_line((artery - 1.1) * 3.4, 0.5), 11.0)
    tissue.cover(_edge((1 - artery) * 3.4, 0.4), -30.0)
    # The windpipe: a bright front wall, then rings of reverberation that die away.
    pipe = _ellipse(x, y, (-19.0 + 0.8 * p[7], 22.0), (7.5, 8.5))
    rings = -22 + 16 * np.cos(pipe * 22) * np.clip(pipe, 0, 1)
    tissue.cover(_edge((1 - pipe) * 8, 0.5), rings, 0.6)
    tissue.cover(_line((pipe - 1) * 8, 0.7) * _edge(22 - y, 4.0), 20.0, 1.0)
    _layers(tissue, x, y, 7 + 0.8 * p[4], phases[4])


def _paint_breast(tissue: Tissue, x: Array, y: Array, z: float, phases: tuple[float, ...]) -> None:
    p = [math.sin(phase) for phase in phases]
    wave = np.sin(x / 5 + phases[3] + z / 9)
    bent = 1.6 * np.sin(x / 3.1 + y / 4 + phases[4]) + wave
    lobules = np.sin((x + bent) / 2.9 + y / 3 + phases[5]) * np.sin((y + bent) / 2 - x / 6 + z / 7)
    tissue.echo += -8 + 11 * _line(lobules, 0.14) * (0.6 + 0.4 * wave)
    # The gland thickens towards the nipple, which stands on one side of the picture.
    top, bottom = 8.5 + 0.12 * x + 0.9 * wave, 26.5 - 0.12 * x + 0.8 * wave
    gland = np.minimum(_edge(y - top, 0.8), _edge(bottom - y, 0.8))
    streaks = np.sin(y * 1.7 + 1.5 * np.sin(x / 3.5 + phases[6]) + z / 5)
    tissue.cover(gland, 6 + 3 * streaks)
    chest = y - (30.5 + 0.8 * p[4])
    fibres = np.sin(y * 2.6 + x / 14 + 0.7 * np.sin(x / 3 + phases[6]))
    tissue.cover(_edge(chest, 0.6), -11 + (5 + 3 * wave) * fibres)
    tissue.cover(_line(chest, 0.5), 15.0)
    nipple = x - (-15.5 + 0.8 * p[7])
    tissue.cover(_line(nipple, 2.6) * _edge(7 - y, 2.0), -4.0, 2.6)
    tissue.cover(_edge(1.2 - y, 0.4), 17.0)


_PAINTERS: dict[str, Callable[[Tissue, Array, Array, float, tuple[float, ...]], None]] = {
    "肝脏": _paint_liver,
    "肾脏": _paint_kidney,
    "甲状腺": _paint_thyroid,
    "乳腺": _paint_breast,
}

_CONTRAST: dict[Kind, float] = {"cyst": -40.0, "haemangioma": 13.0, "nodule": -14.0, "stone": 26.0}


def _paint_lesion(tissue: Tissue, lesion: Lesion, x: Array, y: Array, z: float) -> None:
    level, radius = lesion.level(x, y, z), lesion.radii[0]
    clear = lesion.margin == "clear"
    inside = _edge(1 - level, 0.08 if clear else 0.5)
    # The organ's echo at the lesion is taken as even, so contrast does not depend on the place.
    ground = float(np.mean(tissue.echo[level < 1.4])) if np.any(level < 1.4) else 0.0
    ground = float(np.clip(ground, -4, 6))
    contrast, diameter = _CONTRAST[lesion.kind], 2 * lesion.radii[1]
    if lesion.kind == "stone":
        # Sound is turned back at the front: a bright cap, and little left behind it.
        cap = _edge(lesion.centre[1] - y, 0.3 * diameter)
        tissue.cover(inside, ground + contrast * cap, 34 / diameter)
        return
    if clear:
        tissue.cover(_line((level - 1.06) * radius, 0.07 * radius), ground + 11.0)
    loss = -11 / diameter if lesion.kind == "cyst" else 0.0
    tissue.cover(inside, ground + contrast, loss)


def _paint_artefact(tissue: Tissue, artefact: Artefact, x: Array, y: Array) -> None:
    if artefact.kind == "shadow":
        tissue.cover(_edge(1 - artefact.level(x, y), 0.6), -30.0)
    elif artefact.kind == "vessel":
        tissue.cover(_edge(1 - artefact.level(x, y), 0.3), -30.0)
    elif artefact.kind == "ligament":
        tissue.cover(_edge(1 - artefact.level(x, y), 0.6), 15.0)
    else:
        size, below = artefact.size_mm, y - artefact.y
        width = _edge(size * 0.5 - np.abs(x - artefact.x), 0.3 * size)
        tail = width * _edge(below, 0.1 * size)
        bars = 16 * np.cos(below * (2 * np.pi / (0.4 * size)))
        fade = np.exp(-np.maximum(below, 0) / (2 * size))
        tissue.cover(tail * fade, 8 + bars)
        tissue.loss += tail * fade * (12 / (2 * size))
        tissue.cover(width * _line(below, 0.15 * size), 24.0)
