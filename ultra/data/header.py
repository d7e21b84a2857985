"""What may be kept of a DICOM header, once the confidentiality profile has been through it.

The profile is the Basic Application Level Confidentiality Profile of DICOM PS3.15, table E.1-1, as
`dicom-anonymizer` ships it, with the Clean Descriptors Option for two tags: of these only words for
parts of the body come out, in our own spelling. No other module of ultra reads a tag that describes
a patient, a study, a person or a place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from ultra.data.importers.entry import patient_key

PROFILE = "dicomfields_2026c"

IDENTIFYING = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "AccessionNumber")
DESCRIBING = ("Modality", "ManufacturerModelName", "BodyPartExamined", "StudyDescription")
_CLEANED = DESCRIBING[2:]
NEEDED = (*IDENTIFYING, *DESCRIBING, "SpecificCharacterSet", "InstanceNumber")
"""All that `read_header` looks at; the last one stands last in a file."""

_SITES = {
    "腹部": "ABDOMEN ABDOMINAL ABD 腹部",
    "肝脏": "LIVER HEPATIC 肝脏 肝",
    "胆囊": "GALLBLADDER 胆囊",
    "胰腺": "PANCREAS 胰腺",
    "脾脏": "SPLEEN 脾脏 脾",
    "肾脏": "KIDNEY KIDNEYS RENAL 肾脏 双肾",
    "膀胱": "BLADDER 膀胱",
    "前列腺": "PROSTATE 前列腺",
    "盆腔": "PELVIS PELVIC 盆腔",
    "子宫": "UTERUS 子宫",
    "卵巢": "OVARY OVARIES 卵巢",
    "胎儿": "FETUS FETAL OBSTETRIC OBSTETRICAL OB 胎儿 产科",
    "甲状腺": "THYROID 甲状腺",
    "颈部": "NECK 颈部",
    "乳腺": "BREAST BREASTS 乳腺",
    "心脏": "HEART CARDIAC ECHOCARDIOGRAM ECHOCARDIOGRAPHY 心脏",
    "胸部": "CHEST THORAX 胸部",
    "肺部": "LUNG LUNGS 肺部 肺",
    "阴囊": "TESTIS TESTES SCROTUM 阴囊 睾丸",
    "颈动脉": "CAROTID 颈动脉",
    "腹主动脉": "AORTA 腹主动脉",
    "下肢": "LEG LEGS 下肢",
    "上肢": "ARM ARMS 上肢",
}
"""Our word for a site, and the words of headers for it (DICOM PS3.16, annex L, among others)."""

_SITE_OF_WORD = {word: site for site, words in _SITES.items() for word in words.split()}
_MACHINE = re.compile(
    r"(?:LOGIQ|Vivid|Voluson|Versana|Venue|EPIQ|Affiniti|CX|iU|iE|HD|Sparq|Lumify|ACUSON|Sequoia|"
    r"Aplio|Xario|Viamo|HI VISION|ARIETTA|ProSound|SSD|Turbo|M-Turbo|Edge|Resona|Nuewa|DC|TE|MyLab|"
    r"HS|WS|RS|Aixplorer|SonoScape|VINNO)"
    r"(?:[ -]?(?:[A-Z]{0,2}\d{1,4}[A-Za-z]{0,2}|Pro|Elite|Expert))?",
    re.IGNORECASE,
)
"""Product names; what else stands in the field is not kept, for it may be anything."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says that identifies nobody.

    Attributes:
        patient: keyed pseudonym of the patient's id, or of the study where there is none.
        study: keyed pseudonym of the study's UID.
        series: keyed pseudonym of the series' UID; empty where there is none.
        number: the instance's place in its series, 0 where it says none.
        accession: keyed pseudonym of the accession number; empty where there is none.
        modality: as DICOM has it, e.g. `US`; empty where it is not a code.
        site: our words for the body parts named; empty where none is known.
        machine: the product's name; empty where it is not a known one.
    """

    patient: str
    study: str
    series: str
    number: int
    accession: str
    modality: str
    site: str
    machine: str


def read_header(dataset: Any, secret: str) -> Header:
    """Return what may be kept of a dataset's header.

    Args:
        dataset: as pydicom reads it, with or without pixels; it is not changed.
        secret: the key of the pseudonyms.

    Raises:
        ValueError: for a header without a study, or whose values cannot be read.
    """
    ids = {name: _text(dataset, name) for name in IDENTIFYING}
    if not ids["StudyInstanceUID"]:
        raise ValueError("no StudyInstanceUID in the header")
    keys = {name: patient_key(value, secret) if value else "" for name, value in ids.items()}
    kept = _apply_profile(dataset)
    modality = kept.get("Modality", "")
    machine = _MACHINE.fullmatch(kept.get("ManufacturerModelName", ""))
    return Header(
        patient=keys["PatientID"] or keys["StudyInstanceUID"],
        study=keys["StudyInstanceUID"],
        series=keys["SeriesInstanceUID"],
        number=int(number) if (number := _text(dataset, "InstanceNumber")).isdecimal() else 0,
        accession=keys["AccessionNumber"],
        modality=modality if re.fullmatch(r"[A-Z]{2,4}", modality) else "",
        site=kept.get("BodyPartExamined", "") or kept.get("StudyDescription", ""),
        machine=machine[0] if machine else "",
    )


def find_sites(text: str) -> str:
    """Return the body parts that a text names, in our words; nothing else of the text is kept."""
    words = re.findall(r"[A-Z]+|[\u4e00-\u9fff]+", text.upper())
    return "、".join(dict.fromkeys(_SITE_OF_WORD[word] for word in words if word in _SITE_OF_WORD))


def _apply_profile(dataset: Any) -> dict[str, str]:
    """Return the describing values that the profile lets stand, as text."""
    import pydicom
    from dicomanonymizer.simpledicomanonymizer import anonymize_dataset

    copy = pydicom.Dataset()
    for name in DESCRIBING:
        value = _text(dataset, name)
        if value:
            setattr(copy, name, value)
    anonymize_dataset(copy, base_rules_gen=_rules)
    return {element.keyword: str(element.value) for element in copy}


@cache
def _rules() -> dict[Any, Any]:
    from dicomanonymizer.simpledicomanonymizer import initialize_actions
    from pydicom.tag import Tag

    cleaned = [Tag(name) for name in _CLEANED]
    rules: dict[Any, Any] = initialize_actions(PROFILE)
    return rules | {(tag.group, tag.element): _clean for tag in cleaned}


def _clean(dataset: Any, tag: Any) -> None:
    if tag in dataset:
        dataset[tag].value = find_sites(str(dataset[tag].value))


def _text(dataset: Any, name: str) -> str:
    try:
        value = dataset.get(name)
    except RecursionError:
        raise ValueError("sequences nested too deep") from None
    except Exception:  # a value is converted when it is asked for; pydicom raises many kinds
        raise ValueError(f"{name} cannot be read") from None
    if value is None:
        return ""
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not one text")
    return value.strip("\0 ")
