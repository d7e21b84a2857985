from __future__ import annotations

import ast
import hashlib
import hmac
from pathlib import Path
from typing import Any

import pydicom
import pytest
from dicomanonymizer.simpledicomanonymizer import initialize_actions
from pydicom.data import get_testdata_file
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset

from ultra.data.header import PROFILE, find_sites, read_header

ULTRA = Path(__file__).resolve().parents[2] / "ultra"


def header(**tags: Any) -> Dataset:
    dataset = Dataset()
    dataset.StudyInstanceUID = "1.2.3"
    dataset.Modality = "US"
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def keyed(text: str) -> str:
    return hmac.new(b"secret", text.encode(), hashlib.sha256).hexdigest()[:16]


def test_ids_are_keyed_pseudonyms() -> None:
    dataset = header(
        PatientID="P-7", SeriesInstanceUID="1.2.3.4", AccessionNumber="A9", InstanceNumber="12"
    )
    found = read_header(dataset, "secret")
    assert (found.patient, found.study) == (keyed("P-7"), keyed("1.2.3"))
    assert (found.series, found.accession) == (keyed("1.2.3.4"), keyed("A9"))
    assert found.number == 12
    assert dataset.PatientID == "P-7"
    assert read_header(dataset, "other").patient != found.patient


def test_a_study_without_a_patient_is_its_own() -> None:
    found = read_header(header(PatientID=""), "secret")
    assert found.patient == found.study == keyed("1.2.3")
    assert (found.series, found.accession, found.number) == ("", "", 0)


@pytest.mark.parametrize(
    ("tags", "site"),
    [
        ({"BodyPartExamined": "LIVER"}, "肝脏"),
        ({"BodyPartExamined": "THYROID", "StudyDescription": "Breast"}, "甲状腺"),
        ({"StudyDescription": "Echocardiogram"}, "心脏"),
        ({"StudyDescription": "ZHANG SAN abdomen 2024-03-17"}, "腹部"),
        ({"StudyDescription": "张建国 甲状腺 乳腺"}, "甲状腺、乳腺"),
        ({"BodyPartExamined": "ZHANG"}, ""),
        ({}, ""),
    ],
)
def test_of_a_description_only_parts_of_the_body_come_out(tags: dict[str, str], site: str) -> None:
    assert read_header(header(**tags), "secret").site == site


@pytest.mark.parametrize(
    ("model", "machine"),
    [
        ("LOGIQ 700", "LOGIQ 700"), ("EPIQ 7C", "EPIQ 7C"), ("CX50", "CX50"),
        ("SSD-4000", "SSD-4000"), ("ZHANG SAN", ""), ("LOGIQ of Dr. Smith", ""), ("张建国", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_a_machine_is_named_by_its_product(model: str, machine: str) -> None:
    assert read_header(header(ManufacturerModelName=model), "secret").machine == machine


def test_nothing_else_of_a_header_comes_out() -> None:
    canary = "ZHANGSAN"
    dataset = header(PatientID=canary, Modality=canary[:4] + "1")
    for tag in initialize_actions(PROFILE):
        name = keyword_for_tag(pydicom.tag.Tag(tag)) if len(tag) == 2 else ""
        element = pydicom.datadict.dictionary_VR(tag) if name else ""
        if element in {"PN", "LO", "SH", "ST", "LT", "UT", "CS", "UC"} and name not in dataset:
            setattr(dataset, name, canary)
    dataset.private_block(0x0009, canary, create=True).add_new(1, "LO", canary)
    assert len(dataset) > 200
    assert canary in str(dataset)
    assert canary not in repr(read_header(dataset, "secret"))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"StudyInstanceUID": ""}, "no StudyInstanceUID"),
        ({"PatientID": ["A", "B"]}, "PatientID is not one text"),
        ({"StudyInstanceUID": ["1.2", "1.3"]}, "StudyInstanceUID is not one text"),
        ({"Modality": ["US", "CT"]}, "Modality is not one text"),
    ],
)
def test_a_header_that_names_two_of_what_is_one_is_refused(
    tags: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        read_header(header(**tags), "secret")


def test_a_real_header() -> None:
    path = get_testdata_file("gdcm-US-ALOKA-16.dcm", download=False)
    assert path
    found = read_header(pydicom.dcmread(path, stop_before_pixels=True), "secret")
    assert (found.modality, found.machine, found.site) == ("US", "SSD-4000", "")
    assert found.patient == keyed("98279")
    assert find_sites("") == ""


def test_no_other_module_reads_a_tag_of_the_profile() -> None:
    tags = [pydicom.tag.Tag(tag) for tag in initialize_actions(PROFILE) if len(tag) == 2]
    names = {keyword_for_tag(tag) for tag in tags} | {"BodyPartExamined", "ManufacturerModelName"}
    names -= {"", "Date", "Time", "DateTime"}
    assert len(names) > 600
    found = []
    for path in ULTRA.rglob("*.py"):
        if path.name in {"header.py", "dicom_table.py"}:  # this one names columns of a table
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) else getattr(node, "attr", None)
            if isinstance(text, str) and text in names:
                found.append((path.name, text))
    assert found == []
