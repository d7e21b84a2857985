"""Simulated exams: sweeps over a phantom, with exact truth about every frame, and their reports.

Everything about an exam follows from (seed, patient, exam).

Shapes: K frames, H W pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ultra.config import SimulatorConfig
from ultra.data.instructions import CUE, REPORT, questions, write_conversations
from ultra.data.phantom import Artefact, ArtefactKind, Kind, Lesion, Margin, Phantom, Side, cut
from ultra.data.probe import (
    CONVEX,
    LINEAR,
    NUM_SAMPLES,
    Probe,
    beam_points,
    display,
    make_speckle,
    pixel_points,
    receive,
)
from ultra.data.prompts import TEMPLATES
from ultra.types import FrameGroup

NORMAL_FRACTION = 0.15
ARTEFACT_COUNTS = (0.3, 0.45, 0.25)
"""How often a frame has no, one or two artefacts."""
MIN_SECTION = 0.5
"""A frame shows the lesion when its cut is at least this part of the largest cut."""


@dataclass(frozen=True, slots=True)
class Site:
    """What is examined, how, and what can be found there.

    Attributes:
        place: its name in a report, `{}` standing for left or right.
        organ: the tissue the rest of the report speaks of.
        words: the diagnosis of each kind.
        sizes_mm: sizes of lesions.
        field: x0, x1, y0, y1 in mm where lesions lie, on the right side of the body.
    """

    probe: Probe
    place: str
    organ: str
    words: dict[Kind, str]
    sizes_mm: tuple[int, ...]
    field: tuple[float, float, float, float]
    complaints: tuple[str, ...]


SITES: dict[str, Site] = {
    "肝脏": Site(
        CONVEX, "肝{}叶", "肝实质",
        {"cyst": "囊肿", "haemangioma": "血管瘤", "nodule": "低回声结节", "stone": "结石"},
        (12, 20, 32), (-4, 20, 36, 58), ("体检。", "右上腹不适。"),
    ),
    "肾脏": Site(
        CONVEX, "{}肾", "肾实质",
        {"cyst": "囊肿", "haemangioma": "错构瘤", "nodule": "低回声结节", "stone": "结石"},
        (12, 20, 32), (-22, 26, 48, 64), ("体检。", "腰部不适。"),
    ),
    "甲状腺": Site(
        LINEAR, "甲状腺{}叶", "腺体",
        {"cyst": "囊肿", "nodule": "低回声结节", "stone": "钙化"},
        (5, 8, 13), (-4, 6, 17, 22), ("体检。", "颈部不适。"),
    ),
    "乳腺": Site(
        LINEAR, "{}侧乳腺", "腺体",
        {"cyst": "囊肿", "nodule": "低回声结节", "stone": "钙化"},
        (5, 8, 13), (-7, 12, 13, 21), ("体检。", "乳腺不适。"),
    ),
}  # fmt: skip

SIDE_WORDS: dict[Side, str] = {"left": "左", "right": "右"}
ECHO_WORDS: dict[Kind, str] = {
    "cyst": "无回声区", "haemangioma": "高回声结节", "nodule": "低回声结节", "stone": "强回声团",
}  # fmt: skip
MARGIN_WORDS: dict[Margin, str] = {"clear": "边界清晰", "unclear": "边界欠清"}
BEHIND_WORDS: dict[Kind, str] = {"cyst": "，后方回声增强", "stone": "，后方伴声影"}


@dataclass(frozen=True, slots=True)
class Truth:
    """What the phantom holds and where the planes cut it; None where there is no lesion.

    Attributes:
        margin: None for a stone, whose report names none.
        planes_mm: z of each frame.
        shifts_mm: how far the probe had slid sideways at each frame.
    """

    site: str
    side: Side
    kind: Kind
    size_mm: int | None
    margin: Margin | None
    lesion: Lesion | None
    planes_mm: tuple[float, ...]
    shifts_mm: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SimulatedExam:
    """An exam with its truth.

    Attributes:
        lesion_masks_KHW: True on pixels of the lesion's cut.
        artefact_masks_KHW: True on pixels of objects that are no lesion.
    """

    group: FrameGroup
    truth: Truth
    lesion_masks_KHW: NDArray[np.bool_]
    artefact_masks_KHW: NDArray[np.bool_]


def simulated_exams(config: SimulatorConfig, seed: int) -> Iterator[tuple[int, int]]:
    """Yield the (patient, exam) pairs of a simulated data set, exams counted from 1."""
    for patient in range(config.num_patients):
        rng = np.random.default_rng([seed, patient])
        for exam in range(1, int(rng.integers(1, config.max_exams_per_patient + 1)) + 1):
            yield patient, exam


def simulate_exam(config: SimulatorConfig, seed: int, patient: int, exam: int) -> FrameGroup:
    """Return one exam of a simulated patient: JPEG frames in sweep order, and the report."""
    return simulate(config, seed, patient, exam).group


def simulate(config: SimulatorConfig, seed: int, patient: int, exam: int) -> SimulatedExam:
    """Return one exam of a simulated patient with the exact truth about it."""
    rng = np.random.default_rng([seed, patient, exam])
    phantom = _draw_phantom(rng, str(rng.choice(list(SITES))))
    lesion, site = phantom.lesion, SITES[phantom.site]
    num_frames = int(rng.integers(config.min_frames, config.max_frames + 1))
    planes = _draw_planes(rng, lesion, num_frames, site.probe.depth)
    shifts = [float(rng.normal(0, 0.012 * site.probe.width)) for _ in planes]
    truth = _truth(phantom, planes, shifts)
    pictures, lesions, artefacts = _sweep(rng, phantom, truth, config.frame_size)
    findings, diagnosis = write_report(truth)
    group = FrameGroup(
        exam_id=f"sim-{patient:05d}-{exam}",
        patient_key=f"patient-{patient:05d}",
        site=phantom.site,
        history=str(rng.choice(site.complaints)),
        findings=findings,
        diagnosis=diagnosis,
        frames=tuple(_encode(picture) for picture in pictures),
        frame_sizes=((config.frame_size, config.frame_size),) * num_frames,
        frame_sources=tuple(f"simulated:plane={z:+.1f}mm" for z in planes),
        valid=tuple(lesion is None or lesion.section(z) >= MIN_SECTION for z in planes),
    )
    return SimulatedExam(group, truth, lesions, artefacts)


def _sweep(
    rng: np.random.Generator, phantom: Phantom, truth: Truth, size: int
) -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the pictures of a sweep, (H, W) each, and its lesion and artefact masks, (K, H, W)."""
    site, lesion = SITES[phantom.site], phantom.lesion
    gain_db, slope_db = float(rng.normal(0, 1.5)), float(rng.normal(0, 1.5)) / site.probe.depth
    x, y, inside = pixel_points(site.probe, size)
    beams_x, beams_y = beam_points(site.probe)
    pictures, lesions, objects = [], [], []
    speckles = make_speckle(rng, truth.planes_mm, site.probe)
    for z, shift, speckle in zip(truth.planes_mm, truth.shifts_mm, speckles, strict=True):
        artefacts = _draw_artefacts(rng, site, phantom, z)
        tissue = cut(phantom, artefacts, beams_x + shift, beams_y, z)
        tissue.echo += gain_db
        tissue.loss += slope_db
        envelope_db = receive(tissue, speckle, rng, site.probe.depth / NUM_SAMPLES)
        pictures.append(display(envelope_db, site.probe, size))
        shown = lesion is not None and lesion.level(x + shift, y, z) < 1
        lesions.append(inside & shown)
        outlines = [artefact.level(x + shift, y) < 1 for artefact in artefacts]
        objects.append(inside & ~lesions[-1] & np.any([*outlines, np.zeros_like(inside)], axis=0))
    return pictures, np.array(lesions), np.array(objects)


def write_report(truth: Truth) -> tuple[str, str]:
    """Return the findings and the diagnosis that state exactly this truth."""
    site = SITES[truth.site]
    place = site.place.format(SIDE_WORDS[truth.side])
    if truth.kind == "normal":
        return f"{place}大小正常，{site.organ}回声均匀，未见占位。", f"{place}未见异常。"
    margin = f"，{MARGIN_WORDS[truth.margin]}" if truth.margin else ""
    return (
        f"{place}见一{ECHO_WORDS[truth.kind]}，大小约{truth.size_mm}mm{margin}"
        f"{BEHIND_WORDS.get(truth.kind, '')}。余{site.organ}回声均匀。",
        f"{place}{site.words[truth.kind]}。",
    )


def report_characters() -> str:
    """Return every character of the simulator's reports, questions and answers, sorted."""
    plain = TEMPLATES["plain"]
    texts = ["0123456789", CUE, REPORT, plain.system, plain.user, plain.answer_end]
    texts += [question for ways in questions().values() for question in ways]
    for truth in _possible_truths():
        findings, diagnosis = write_report(truth)
        group = FrameGroup("", "", truth.site, findings, diagnosis, (), (), ())
        texts += [turn.content for c in write_conversations(group, 0) for turn in c.turns]
        texts += SITES[truth.site].complaints
    return "".join(sorted(set("".join(texts)) - set("{}")))


def _possible_truths() -> Iterator[Truth]:
    """Yield a truth for every report there can be."""
    for (name, site), side in product(SITES.items(), get_args(Side)):
        yield Truth(name, side, "normal", None, None, None, (), ())
        for kind, size, margin in product(site.words, site.sizes_mm, get_args(Margin)):
            stated = None if kind == "stone" else margin
            yield Truth(name, side, kind, size, stated, None, (), ())


def _encode(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _draw_phantom(rng: np.random.Generator, name: str) -> Phantom:
    site = SITES[name]
    side: Side = "left" if rng.random() < 0.5 else "right"
    phases = tuple(rng.uniform(0, 2 * math.pi, 8).tolist())
    if rng.random() < NORMAL_FRACTION:
        return Phantom(name, side, None, phases)
    kind: Kind = tuple(site.words)[int(rng.integers(len(site.words)))]
    size = float(rng.choice(site.sizes_mm[:2] if kind == "stone" else site.sizes_mm))
    margin: Margin = "unclear" if kind != "stone" and rng.random() < 0.5 else "clear"
    x0, x1, y0, y1 = site.field
    x = float(rng.uniform(x0, x1)) * (1 if side == "right" else -1)
    thickness = min(size * 0.5, 0.1 * site.probe.depth)
    lesion = Lesion(
        kind,
        (x, float(rng.uniform(y0, y1)), float(rng.uniform(-0.04, 0.04)) * site.probe.depth),
        (size / 2, size / 2 * float(rng.uniform(0.75, 1)), thickness * float(rng.uniform(0.8, 1))),
        margin,
        (float(rng.uniform(0, 6.28)), float(rng.uniform(0, 6.28))),
    )
    return Phantom(name, side, lesion, phases)


def _draw_planes(
    rng: np.random.Generator, lesion: Lesion | None, num_frames: int, depth: float
) -> list[float]:
    """Return z of the frames in sweep order; at most 40 percent of them, or one, cut the lesion."""
    if lesion is None:
        return sorted(rng.uniform(-0.2 * depth, 0.2 * depth, num_frames).tolist())
    most = max(1, int(0.4 * num_frames))
    num_valid = int(rng.integers(1, most + 1, 2).max())
    num_before = int(rng.integers(num_frames - num_valid + 1))
    valid = rng.uniform(-0.6, 0.6, num_valid)
    others = rng.uniform(0.95, 2.2, num_frames - num_valid)
    others[:num_before] *= -1
    offsets = np.concatenate([valid, others])
    return sorted((lesion.centre[2] + lesion.radii[2] * offsets).tolist())


def _draw_artefacts(
    rng: np.random.Generator, site: Site, phantom: Phantom, z: float
) -> tuple[Artefact, ...]:
    """Return the artefacts of a frame: as many where the lesion shows as where it does not."""
    kinds = rng.choice(get_args(ArtefactKind), rng.choice(3, p=ARTEFACT_COUNTS))
    return tuple(_draw_artefact(rng, kind, site, phantom, z) for kind in kinds)


def _draw_artefact(
    rng: np.random.Generator, kind: ArtefactKind, site: Site, phantom: Phantom, z: float
) -> Artefact:
    """Return an artefact that stands beside the lesion's cut, as far as there is room."""
    lesion = phantom.lesion
    x0, x1, y0, y1 = site.field
    around = 0.1 * site.probe.width
    for _ in range(20):
        size = float(rng.choice(site.sizes_mm))
        x = float(rng.uniform(x0 - around, x1 + around)) * phantom.mirror
        y = float(rng.uniform(y0, y1))
        if lesion is None or lesion.section(z) == 0:
            break
        down = 0 if kind == "shadow" else y - lesion.centre[1]
        away = math.hypot(x - lesion.centre[0], down)
        if away > lesion.radii[0] + 0.6 * size:
            break
    return Artefact(kind, x, y, size, float(rng.uniform(-0.9, 0.9)), site.probe.radius)


def _truth(phantom: Phantom, planes: list[float], shifts: list[float]) -> Truth:
    lesion = phantom.lesion
    return Truth(
        site=phantom.site,
        side=phantom.side,
        kind=lesion.kind if lesion else "normal",
        size_mm=round(2 * lesion.radii[0]) if lesion else None,
        margin=lesion.margin if lesion and lesion.kind != "stone" else None,
        lesion=lesion,
        planes_mm=tuple(planes),
        shifts_mm=tuple(shifts),
    )
