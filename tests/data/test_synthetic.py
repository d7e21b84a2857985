from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from ultra.config import SimulatorConfig
from ultra.data.instructions import questions, write_conversations
from ultra.data.probe import CONVEX
from ultra.data.synthetic import (
    SITES,
    SimulatedExam,
    report_characters,
    simulate,
    simulate_exam,
    simulated_exams,
)

CONFIG = SimulatorConfig(num_patients=80, max_exams_per_patient=2, frame_size=64)


@pytest.fixture(scope="module")
def exams() -> list[SimulatedExam]:
    return [simulate(CONFIG, 7, *pair) for pair in simulated_exams(CONFIG, 7)]


@pytest.fixture(scope="module")
def with_lesion(exams) -> list[SimulatedExam]:
    return [exam for exam in exams if exam.truth.lesion is not None]


def grey(frame: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(frame)), np.float32)


def test_an_exam_follows_from_seed_patient_and_exam_alone():
    group = simulate_exam(CONFIG, 7, 3, 1)
    np.random.seed(99)
    assert simulate_exam(CONFIG, 7, 3, 1) == group
    others = [simulate_exam(CONFIG, *key) for key in [(8, 3, 1), (7, 4, 1), (7, 3, 2)]]
    assert all(other.frames[0] != group.frames[0] for other in others)
    assert group.patient_key == others[2].patient_key == "patient-00003"
    assert (group.exam_id, others[2].exam_id) == ("sim-00003-1", "sim-00003-2")


def test_every_patient_has_one_to_the_allowed_number_of_exams():
    pairs = list(simulated_exams(CONFIG, 7))
    assert pairs == list(simulated_exams(CONFIG, 7)) != list(simulated_exams(CONFIG, 8))
    counts = [sum(p == patient for p, _ in pairs) for patient in range(CONFIG.num_patients)]
    assert set(counts) == {1, 2}
    assert len(set(pairs)) == len(pairs)


def test_groups_have_the_asked_frames(exams):
    counts = {len(exam.group.frames) for exam in exams}
    assert counts == {4, 5, 6}
    for exam in exams:
        group = exam.group
        assert [grey(frame).shape for frame in group.frames] == [(64, 64)] * len(group.frames)
        assert len(group.frame_sizes) == len(group.frame_sources) == len(group.valid)
        assert group.frame_sizes[0] == (64, 64)
        for source, plane in zip(group.frame_sources, exam.truth.planes_mm, strict=True):
            assert source == f"simulated:plane={plane:+.1f}mm"
        assert list(exam.truth.planes_mm) == sorted(exam.truth.planes_mm)


def test_a_config_without_a_possible_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="min_frames 5 exceeds max_frames 3"):
        SimulatorConfig(min_frames=5, max_frames=3)


def test_valid_frames_are_those_whose_plane_cuts_at_least_half_of_the_lesion(with_lesion):
    for exam in with_lesion:
        centre, radii = exam.truth.lesion.centre, exam.truth.lesion.radii
        # Independent geometry: lattice points of the plane inside the ellipsoid.
        u, v = np.meshgrid(np.linspace(-1, 1, 401), np.linspace(-1, 1, 401))
        for plane, valid in zip(exam.truth.planes_mm, exam.group.valid, strict=True):
            inside = u**2 + v**2 + ((plane - centre[2]) / radii[2]) ** 2 <= 1
            radius = math.sqrt(inside.mean() * 4 / math.pi)
            assert valid == (radius >= 0.5)


def test_lesion_masks_have_the_area_of_the_cut(with_lesion):
    seen = 0
    for exam in with_lesion:
        lesion, site = exam.truth.lesion, SITES[exam.truth.site]
        near_edge = site.probe == CONVEX and lesion.radii[0] > 10
        if lesion.margin == "unclear" or near_edge:
            continue
        pixel = (site.probe.width / 64) ** 2
        full = math.pi * lesion.radii[0] * lesion.radii[1]
        for plane, mask in zip(exam.truth.planes_mm, exam.lesion_masks_KHW, strict=True):
            part = max(0.0, 1 - ((plane - lesion.centre[2]) / lesion.radii[2]) ** 2)
            # A disc on a pixel grid is exact up to about a pixel for each four of its outline.
            allowed = 0.5 * 2 * math.pi * lesion.radii[0] * math.sqrt(pixel) + pixel
            assert abs(mask.sum() * pixel - full * part) < allowed
            seen += part > 0
    assert seen > 20


def test_artefacts_keep_clear_of_the_lesion_and_come_with_and_without_it(with_lesion):
    shares: dict[bool, list[bool]] = {True: [], False: []}
    for exam in with_lesion:
        assert not (exam.lesion_masks_KHW & exam.artefact_masks_KHW).any()
        for valid, mask in zip(exam.group.valid, exam.artefact_masks_KHW, strict=True):
            shares[valid].append(bool(mask.any()))
    assert np.mean(shares[True]) == pytest.approx(np.mean(shares[False]), abs=0.12)
    assert 0.5 < np.mean(shares[True]) < 0.9


def test_normal_exams_are_valid_throughout_and_about_one_in_seven(exams):
    normal = [exam for exam in exams if exam.truth.kind == "normal"]
    assert 0.07 < len(normal) / len(exams) < 0.25
    for exam in normal:
        assert all(exam.group.valid)
        assert not exam.lesion_masks_KHW.any()


def test_few_frames_are_valid_and_chance_is_near_three_in_ten(with_lesion):
    shares = [np.mean(exam.group.valid) for exam in with_lesion]
    assert min(shares) > 0
    assert max(shares) <= 0.4
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)


def test_the_darkest_or_brightest_blob_does_not_solve_the_choice(with_lesion):
    hits = {"dark": [], "bright": []}
    for exam in with_lesion:
        smooth = [gaussian_filter(grey(f), 1.5)[17:50, 12:52] for f in exam.group.frames]
        hits["dark"].append(exam.group.valid[int(np.argmin([s.min() for s in smooth]))])
        hits["bright"].append(exam.group.valid[int(np.argmax([s.max() for s in smooth]))])
    assert max(np.mean(hits["dark"]), np.mean(hits["bright"])) < 0.65


def test_the_lesion_looks_as_its_kind_says(with_lesion):
    contrast: dict[str, list[float]] = {}
    for exam in with_lesion:
        for frame, valid, mask in zip(
            exam.group.frames, exam.group.valid, exam.lesion_masks_KHW, strict=True
        ):
            if valid and mask.sum() > 20:
                ring = gaussian_filter(mask.astype(np.float32), 2.5) > 0.1
                picture = grey(frame)
                difference = picture[mask].mean() - picture[ring & ~mask].mean()
                contrast.setdefault(exam.truth.kind, []).append(float(difference))
    median = {kind: np.median(values) for kind, values in contrast.items()}
    assert median["cyst"] < median["nodule"] - 15 < -25
    assert median["haemangioma"] > 15


def test_the_report_states_exactly_the_truth(exams):
    echo = {"cyst": "无回声", "haemangioma": "高回声", "nodule": "低回声", "stone": "强回声"}
    side = {"left": "左", "right": "右"}
    other = {"left": "右", "right": "左"}
    for exam in exams:
        truth, group = exam.truth, exam.group
        text = group.findings + group.diagnosis
        assert group.site == truth.site
        assert text.count(side[truth.side]) == 2
        assert other[truth.side] not in text
        if truth.kind == "normal":
            assert "未见异常" in group.diagnosis
            assert not re.search(r"\d|边界", text)
            continue
        assert re.findall(r"(\d+)mm", text) == [str(truth.size_mm)]
        assert truth.size_mm == pytest.approx(2 * truth.lesion.radii[0])
        assert echo[truth.kind] in group.findings
        assert ("边界清晰" in text) == (truth.margin == "clear")
        assert ("边界欠清" in text) == (truth.margin == "unclear")
        assert ("后方回声增强" in text) == (truth.kind == "cyst")
        assert ("声影" in text) == (truth.kind == "stone")
        assert SITES[truth.site].words[truth.kind] in group.diagnosis


def test_all_sites_sides_kinds_and_margins_come_up(exams):
    truths = [exam.truth for exam in exams]
    assert {t.site for t in truths} == set(SITES)
    assert {t.side for t in truths} == {"left", "right"}
    assert {t.kind for t in truths} == {"cyst", "haemangioma", "nodule", "stone", "normal"}
    assert {t.margin for t in truths} == {"clear", "unclear", None}
    assert {t.size_mm for t in truths} == {5, 8, 13, 12, 20, 32, None}


def test_a_long_sweep_has_at_most_two_valid_frames_in_five():
    config = SimulatorConfig(min_frames=20, max_frames=20, frame_size=32)
    exams = [simulate(config, 0, patient, 1) for patient in range(4)]
    lesions = [exam for exam in exams if exam.truth.lesion is not None]
    assert lesions
    assert all(1 <= sum(exam.group.valid) <= 8 for exam in lesions)


def test_report_characters_cover_everything_that_is_written(exams):
    characters = report_characters()
    assert list(characters) == sorted(set(characters))
    known = set(characters)
    assert set("".join(q for ways in questions().values() for q in ways)) <= known
    for exam in exams:
        group = exam.group
        for text in (group.site, group.history, group.findings, group.diagnosis, "问：答：\n"):
            assert set(text) <= known
        for seed in range(3):
            for conversation in write_conversations(replace(group, frames=()), seed):
                assert set("".join(turn.content for turn in conversation.turns)) <= known
    assert len(characters) < 160
