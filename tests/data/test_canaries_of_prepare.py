"""Made-up identities in pixels, headers, files, names and texts: none may come out of `prepare`.

Every search that must find nothing in the tables is first shown to find the same thing in what went
in, so that it can fail.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faker import Faker
from PIL import Image, PngImagePlugin

from tests.data.exam_folders import exam_line, picture, write_folder
from tests.data.letters import CHARACTERS, write
from tests.data.test_dicom import dicom_bytes, region, tissue
from tests.data.test_prepare import config_at
from ultra.config import DataConfig
from ultra.data import ocr, parquet
from ultra.data.card import describe
from ultra.data.prepare import PrepareCounts, list_entries, publish, write_tables

REGION = region(20, 30, 279, 189)
OUTSIDE, IN_THE_DARK, OVER_TISSUE = (40, 8), (90, 42), (90, 120)
NUM_FRAMES = 12
READABLE = 0.6
"""Of a name's characters, read in their order."""


@dataclass(frozen=True)
class Canary:
    """Somebody who does not exist."""

    name: str
    latin: str
    number: str
    phone: str
    birthday: str
    hospital: str
    doctor: str

    @property
    def secrets(self) -> tuple[str, ...]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)


def make_canaries(count: int) -> list[Canary]:
    chinese, english = Faker("zh_CN"), Faker("en_US")
    chinese.seed_instance(7)
    english.seed_instance(7)
    found: list[Canary] = []
    while len(found) < count:
        name, doctor = chinese.name(), chinese.name()
        if not set(name) <= set(CHARACTERS) or len(name) < 3 or len(doctor) < 3:
            continue  # the sheet of letters has the commonest ones
        latin = f"{english.last_name()} {english.first_name()}".upper()
        found.append(
            Canary(
                name, latin, chinese.ssn(), chinese.phone_number(),
                chinese.date_of_birth(minimum_age=20).strftime("%Y-%m-%d"),
                f"{chinese.city_name()}第一人民医院", doctor,
            )
        )  # fmt: skip
    return found


@dataclass
class Folder:
    """An exam folder with canaries, and what stands in it."""

    lines: list[dict[str, Any] | str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    burned: dict[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    """Exam -> the text in its pixels, and a whole frame with it."""

    def add(self, exam_id: str, canary: Canary, name: str, data: bytes) -> None:
        self.files[name] = data
        line = exam_line(
            exam_id, [name], patient_id=canary.number,
            history=f"患者{canary.name}，男，52岁，电话{canary.phone}，身份证号{canary.number}。",
            findings=f"肝右叶见囊肿，大小约12mm。检查日期：{canary.birthday}。姓名：{canary.name}。",
            diagnosis=f"肝囊肿。{canary.hospital} 报告医师：{canary.doctor}",
        )  # fmt: skip
        self.lines.append(line)

    def read(self, root: Path, **changes: Any) -> tuple[DataConfig, PrepareCounts]:
        config = config_at(
            root,
            format="folder",
            source_uri=write_folder(root / "in", self.lines, self.files),
            assume_deidentified="Dr. No, 2026-11-25",
            max_frames=3,
            **changes,
        )
        return config, publish([write_tables(list(list_entries(config)), 0, config)], config)


def tags_of(canary: Canary) -> dict[str, Any]:
    return {
        "SpecificCharacterSet": "ISO_IR 192",
        "PatientName": canary.name,
        "OtherPatientNames": canary.latin,
        "PatientID": canary.number,
        "PatientTelephoneNumbers": canary.phone,
        "ReferringPhysicianName": canary.doctor,
        "OperatorsName": canary.doctor,
        "InstitutionName": canary.hospital,
        "StudyDescription": f"肝脏 {canary.name}",
        "ImageComments": f"{canary.latin} {canary.birthday}",
        "StudyInstanceUID": f"1.2.840.113619.2.5.{int(canary.number[:17])}",
    }


def as_dicom(frames: np.ndarray, canary: Canary) -> bytes:
    return dicom_bytes(frames, REGION, **tags_of(canary))


def burned_folder() -> Folder:
    folder = Folder()
    canaries = make_canaries(16)
    places = [
        (OUTSIDE, 14, 220),
        (IN_THE_DARK, 11, 200),
        (IN_THE_DARK, 20, 60),
        (OVER_TISSUE, 14, 220),
    ]
    for number, canary in enumerate(canaries):
        at, size, level = places[number % 4]
        text = canary.name if number % 8 < 4 else canary.latin
        frames = tissue(NUM_FRAMES if number >= 8 else 1, seed=number)
        frames = np.stack([write(frame, text, at, size, level) for frame in frames])
        folder.add(f"B{number}", canary, f"{number}.dcm", as_dicom(frames, canary))
        folder.burned[f"B{number}"] = (text, frames[0])
    return folder


def clean_folder() -> Folder:
    folder = Folder()
    for number, canary in enumerate(make_canaries(6)):
        frames = tissue(NUM_FRAMES if number >= 4 else 1, seed=100 + number)
        folder.add(
            f"C{number}", canary, f"{canary.name}/{canary.latin}.dcm", as_dicom(frames, canary)
        )
    return folder


def image_folder() -> Folder:
    folder = Folder()
    first, second = make_canaries(2)
    image = Image.open(io.BytesIO(picture(1, "PNG")))
    exif = Image.Exif()
    exif[0x010E], exif[0x013B] = first.latin, first.name
    jpeg, png = io.BytesIO(), io.BytesIO()
    image.save(jpeg, "JPEG", exif=exif, comment=f"{first.name} {first.number}".encode())
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Patient", f"{second.latin} {second.phone}")
    notes.add_itxt("Name", f"{second.name} {second.hospital}")
    image.save(png, "PNG", pnginfo=notes)
    folder.add("J", first, f"{first.name}.jpg", jpeg.getvalue() + first.number.encode())
    folder.add("P", second, f"{second.latin}.png", png.getvalue())
    return folder


def everything(config: DataConfig, *tables: str) -> Iterator[bytes]:
    """Every value of the tables: texts as they are, frames as their bytes."""
    for table in tables:
        for part in parquet.part_uris(getattr(config, f"{table}_uri")):
            for row in parquet.read_rows(part):
                yield from row.get("frames", ())
                yield repr({k: v for k, v in row.items() if k != "frames"}).encode()


def holds(data: bytes, secret: str) -> bool:
    """Whether a text stands somewhere in bytes, in any of the ways it may be written."""
    plain = [secret.encode(code) for code in ("utf-8", "gb18030", "utf-16-le", "utf-16-be")]
    forms = [*plain, *(form.hex().encode() for form in plain), *map(base64.b64encode, plain)]
    return any(form in data for form in forms)


def secrets_of(folder: Folder) -> list[str]:
    canaries = make_canaries(16)
    texts = json.dumps(folder.lines, ensure_ascii=False)
    return [s for canary in canaries if canary.number in texts for s in canary.secrets]


@pytest.mark.parametrize("make", [clean_folder, image_folder])
@pytest.mark.parametrize("reading", ["auto", "off"])
def test_what_stands_in_headers_files_names_and_texts_stays_behind(
    tmp_path: Path, make: Any, reading: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make()
    secrets = secrets_of(folder)
    went_in = [json.dumps(folder.lines, ensure_ascii=False).encode(), *folder.files.values()]
    went_in += [name.encode() for name in folder.files]
    assert [s for s in secrets if not any(holds(data, s) for data in went_in)] == []
    config, counts = folder.read(tmp_path, ocr=reading)
    assert counts.exams == len(folder.lines)  # nothing in their pixels, so all are let in
    card = describe(config, counts).to_json()
    told = "".join(capfd.readouterr()) + json.dumps(counts.as_dict()) + card + counts.summary()
    came_out = [*everything(config, "exams", "audit", "quarantine"), told.encode()]
    assert len(came_out) > 3 * len(folder.lines)
    found = [(s, data[:80]) for s in secrets for data in came_out if holds(data, s)]
    assert found == []
    assert counts.scrubbed["姓名"] >= 2 * counts.exams


def test_a_folder_of_dicom_files_gives_pseudonyms_alone(tmp_path: Path) -> None:
    folder = clean_folder()
    write_folder(tmp_path / "in", [], folder.files)
    (tmp_path / "in" / "exams.jsonl").unlink()
    config = config_at(tmp_path, format="dicom", source_uri=str(tmp_path / "in"), max_frames=3)
    counts = publish([write_tables(list(list_entries(config)), 0, config)], config)
    assert (counts.exams, counts.splits) == (6, {"test": 6})  # without a report, there to be asked
    uids = [tags_of(canary)["StudyInstanceUID"] for canary in make_canaries(6)]
    secrets = [*secrets_of(folder), *uids]
    assert [s for s in uids if not any(holds(data, s) for data in folder.files.values())] == []
    came_out = list(everything(config, "exams", "audit", "quarantine"))
    assert [s for s in secrets if any(holds(data, s) for data in came_out)] == []


def test_without_letters_read_no_burned_in_name_comes_out(tmp_path: Path) -> None:
    folder = burned_folder()
    config, counts = folder.read(tmp_path, ocr="off")
    rows = [r for part in parquet.part_uris(config.exams_uri) for r in parquet.read_rows(part)]
    let_in = {row["exam_id"] for row in rows}
    # Stills whose text lies in the region are refused; those with it outside lose it by the crop.
    inside = {f"B{n}" for n in range(8) if n % 4 != 0}
    assert let_in.isdisjoint(inside)
    assert {"B0", "B4"} <= let_in
    assert counts.exams + counts.quarantined == 16


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["require", "off"])
def test_no_burned_in_name_can_be_read_in_any_frame(tmp_path: Path, reading: str) -> None:
    folder = burned_folder()
    readable = [exam for exam, (text, frame) in folder.burned.items() if is_read(text, frame)]
    assert len(readable) >= 13  # of 16: so the search can find what it looks for
    config, counts = folder.read(tmp_path, ocr=reading)
    assert counts.exams >= (12 if reading == "require" else 6)
    survived = []
    for part in parquet.part_uris(config.exams_uri):
        for row in parquet.read_rows(part):
            text, _ = folder.burned[row["exam_id"]]
            frames = [np.asarray(Image.open(io.BytesIO(frame))) for frame in row["frames"]]
            survived += [row["exam_id"] for frame in frames if is_read(text, frame)]
    assert survived == []


def is_read(text: str, pixels: np.ndarray) -> bool:
    """Whether OCR reads most of a text in a picture, at its size or enlarged."""
    wanted = text.replace(" ", "")
    for factor in (1, 3):
        large = np.kron(pixels, np.ones((factor, factor), np.uint8))
        found = ocr._engine()(np.repeat(large[..., None], 3, axis=2))
        for line in found.txts or ():
            blocks = SequenceMatcher(None, wanted, line.upper()).get_matching_blocks()
            if sum(block.size for block in blocks) >= READABLE * len(wanted):
                return True
    return False
