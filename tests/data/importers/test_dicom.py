from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_dicom import dicom_bytes, region, tissue
from ultra import storage
from ultra.config import DataConfig
from ultra.data.importers.dicom import list_exams
from ultra.data.importers.entry import ExamEntry, patient_key
from ultra.data.importers.reader import read_exam

REGION = region(20, 30, 279, 189)


def file_of(study: str, patient: str = "P1", seed: int = 0, **tags: Any) -> bytes:
    pixels: np.ndarray = tissue(1, seed=seed)
    return dicom_bytes(pixels, REGION, StudyInstanceUID=study, PatientID=patient, **tags)


def config_of(folder: Path, files: Mapping[str, bytes]) -> DataConfig:
    for name, data in files.items():
        storage.write_bytes(f"{folder}/{name}", data)
    return DataConfig(format="dicom", source_uri=str(folder), patient_key_secret="key")


def test_the_files_of_a_study_are_an_exam_in_the_order_of_their_series(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        {
            "a/late.dcm": file_of("1.2.7", InstanceNumber="12", BodyPartExamined="LIVER"),
            "a/early.dcm": file_of("1.2.7", seed=1, InstanceNumber="3"),
            "b/other": file_of("1.2.8", "P2", seed=2),
            "DICOMDIR": b"passed over",
            ".hidden": b"passed over",
        },
    )
    first, second = list_exams(config)
    assert first == ExamEntry(
        source="study of a/early.dcm",
        exam_id=patient_key("1.2.7", "key"),
        patient_id=patient_key("P1", "key"),
        site="肝脏",
        frames=("a/early.dcm", "a/late.dcm"),
        needs_report=False,
    )
    assert second.exam_id == patient_key("1.2.8", "key")
    group = read_exam(first, config).group
    assert (len(group.frames), group.findings, group.modality) == (2, "", "US")
    assert "P1" not in group.patient_key


def test_what_is_no_ultrasound_or_no_dicom_says_so(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        {
            "ct.dcm": file_of("1.2.9", Modality="CT"),
            "notes.txt": b"hello",
            "us.dcm": file_of("1.2.7"),
        },
    )
    reasons = {entry.source: entry.reason for entry in list_exams(config)}
    assert reasons.pop("study of us.dcm") == ""
    assert reasons["ct.dcm"] == "not ultrasound: modality CT"
    assert reasons["notes.txt"].startswith("unreadable DICOM header: ")


def test_two_patients_in_one_study_are_an_error_of_the_set(tmp_path: Path) -> None:
    files = {"a": file_of("1.2.7", "P1"), "b": file_of("1.2.7", "P2")}
    (entry,) = list_exams(config_of(tmp_path, files))
    assert entry.reason == "several patients: in the files of one study"


def test_headers_that_disagree_on_the_site_give_none(tmp_path: Path) -> None:
    files = {
        "a": file_of("1.2.7", BodyPartExamined="LIVER"),
        "b": file_of("1.2.7", BodyPartExamined="THYROID"),
    }
    (entry,) = list_exams(config_of(tmp_path, files))
    assert entry.site == ""


@pytest.mark.parametrize("secret", ["one", "two"])
def test_pseudonyms_follow_the_key(tmp_path: Path, secret: str) -> None:
    config = config_of(tmp_path, {"a": file_of("1.2.7")})
    (entry,) = list_exams(config.model_copy(update={"patient_key_secret": secret}))
    assert entry.exam_id == patient_key("1.2.7", secret)
