"""No input, however broken, stops `prepare`: it is in quarantine with a true reason."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.data.importers.importing import (
    Imported,
    config_of,
    import_set,
    json_lines,
    read_tables,
)
from tests.data.importers.malformed import (
    FILES,
    ITEMS,
    LINES,
    MAX_BYTES,
    PATHS,
    TABLE_ROWS,
    VALUES,
    Row,
    as_json,
    write_images,
)
from tests.data.test_dicom import REGION, dicom_bytes, region, tissue
from tests.data.videos import film
from ultra import storage
from ultra.config import ConfigError, DataConfig
from ultra.data import parquet
from ultra.data.on_ray import prepare

HUMAN, GPT = {"from": "human", "value": "<image>问"}, {"from": "gpt", "value": "答"}
USER, ASSISTANT = {"role": "user", "content": "<image>问"}, {"role": "assistant", "content": "答"}
CHOICES = {"Choice A": "A:x", "Choice B": "B:y", "Choice C": "C:z", "Choice D": "D:w"}


@dataclass(frozen=True)
class Case:
    """One line or item of a set, as a row or raw, and how its reason begins; '' is good."""

    line: Any
    reason: str = ""


@dataclass(frozen=True)
class Set:
    """How a format writes a good row, and what it says of a bad one.

    Attributes:
        text: the key of a text that must be there.
        path: the key of the image, where the row itself refuses control characters in it.
    """

    format: str
    file: str
    row: Row
    text: str
    path: str = ""
    unique: bool = True

    def cases(self) -> list[Case]:
        kind = self.file.rsplit(".", 1)[-1]
        cases = [Case(self.row(f"good-{i}", "good.png")) for i in range(3)]
        for name, (_, reason, detail) in FILES.items():
            image = f"{name}.png"
            cases.append(Case(self.row(name, image), f"{reason}: {image}: {detail}"))
        for name, (image, reason) in PATHS.items():
            refused = f"wrong values: {self.path}: control" if self.path else "path of no file: "
            cases.append(Case(self.row(name, image), reason or refused))
        raw = {"jsonl": LINES, "json": ITEMS, "csv": TABLE_ROWS}[kind]
        cases += [Case(line, reason) for line, reason in raw.values()]
        cases.append(Case(self.row("good-3", "good.png")))
        wrong = f"wrong values: {self.text}"
        values = {"empty": "", "control": "a\0b"} if kind == "csv" else VALUES
        for name, value in values.items():
            cases.append(Case(self.row(f"value-{name}", "good.png") | {self.text: value}, wrong))
        if kind == "jsonl":
            half = self.row("half-a-character", "good.png") | {self.text: "\ud800"}
            cases.append(Case(json.dumps(half).encode(), wrong))
        if self.unique:
            cases.append(Case(self.row("good-1", "good.png"), "duplicate exam_id: also at "))
        return [*cases, Case(self.row("good-4", "good.png"))]

    def write(self, cases: list[Case]) -> bytes:
        lines = [case.line if isinstance(case.line, bytes) else None for case in cases]
        if self.file.endswith(".csv"):
            return b"\n".join([_csv_line(list(cases[0].line)), *map(_csv_row, cases)])
        texts = [raw or as_json(case.line) for raw, case in zip(lines, cases, strict=True)]
        if self.file.endswith(".jsonl"):
            return b"\n".join(texts)
        body = b"[" + b",\n".join(texts) + b"]"
        return b'{"annotations": ' + body + b"}" if self.format == "openi-zh" else body

    def place(self, index: int) -> str:
        """Where the case at an index, counted from 0, stands."""
        if self.file.endswith(".json"):
            return f"{self.file} item {index + 1}"
        return f"{self.file} line {index + (2 if self.file.endswith('.csv') else 1)}"


def _csv_row(case: Case) -> bytes:
    return case.line if isinstance(case.line, bytes) else _csv_line(list(case.line.values()))


def _csv_line(values: list[Any]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow(values)
    return buffer.getvalue().encode()


def slake_row(name: str, image: str) -> dict[str, Any]:
    return {
        "img_id": name, "img_name": image, "question": "问", "answer": "答", "q_lang": "zh",
        "location": "肝", "modality": "CT", "answer_type": "OPEN", "content_type": "Organ",
        "qid": name,
    }  # fmt: skip


SETS = [
    Set(
        "folder",
        "exams.jsonl",
        lambda name, image: {
            "exam_id": name, "patient_id": "P", "site": "肝", "findings": "所见", "diagnosis": "",
            "frames": [image],
        },
        text="findings",
    ),
    Set(
        "report-json",
        "reports.json",
        lambda name, image: {"uid": name, "finding": "所见", "image_path": [image]},
        text="finding",
    ),
    Set(
        "llava",
        "llava.json",
        lambda name, image: {"id": name, "image": image, "conversations": [HUMAN, GPT]},
        text="conversations",
    ),
    Set(
        "messages",
        "messages.jsonl",
        lambda name, image: {"id": name, "images": [image], "messages": [USER, ASSISTANT]},
        text="messages",
    ),
    Set(
        "llava-med-eval",
        "eval.jsonl",
        lambda name, image: {"question_id": name, "image": image, "text": "q", "gpt4_answer": "a"},
        text="gpt4_answer",
        path="image",
    ),
    Set("slake", "train.json", slake_row, text="question", path="img_name", unique=False),
    Set(
        "openi-zh",
        "openi-zh.json",
        lambda name, image: {"image_id": image.removesuffix(".png"), "caption": f"双肺 {name}"},
        text="caption",
        path="image_id",
        unique=False,
    ),
    Set(
        "pmc-vqa",
        "train.csv",
        lambda name, image: {"index": name, "Figure_path": image, "Question": "Which?",
                             "Answer": "A", **CHOICES},
        text="Question",
        path="Figure_path",
    ),
    Set(
        "chimed-vl",
        "ChiMed-VL-Alignment.jsonl",
        lambda name, image: {"id": name, "image": image, "caption": "肝囊肿"},
        text="caption",
    ),
    Set(
        "video",
        "videos.csv",
        lambda name, image: {"filename": image, "id": name, "label": "正常"},
        text="filename",
        path="filename",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("malformed") / "images"
    folder.mkdir()
    write_images(folder)
    return folder


def bring_in(config: DataConfig) -> tuple[Imported, dict[str, str]]:
    """Run `prepare`; return the tables, and reasons by place."""
    found = read_tables(config, prepare(config))
    rows = [r for uri in parquet.part_uris(config.quarantine_uri) for r in parquet.read_rows(uri)]
    assert len({row["source"] for row in rows}) == len(rows) == found.counts.quarantined
    return found, {row["source"]: row["reason"] for row in rows}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", SETS, ids=lambda kind: kind.format)
def test_every_malformed_row_has_its_reason(kind: Set, tmp_path: Path, images: Path) -> None:
    cases = kind.cases()
    storage.write_bytes(f"{tmp_path}/set/{kind.file}", kind.write(cases))
    source = "" if kind.format == "folder" else kind.file
    config = config_of(
        tmp_path, kind.format, source, images_uri=str(images), max_frame_bytes=MAX_BYTES, ocr="off"
    )
    found, reasons = bring_in(config)
    expected = {kind.place(i): case.reason for i, case in enumerate(cases) if case.reason}
    wrong = {
        place: (reasons.get(place), reason)
        for place, reason in expected.items()
        if not reasons.get(place, "").startswith(reason)
    }
    assert wrong == {}
    assert set(reasons) == set(expected)
    num_good = sum(not case.reason for case in cases)
    if kind.format == "openi-zh":  # the good images of one name are one report
        num_good = 1
    assert found.counts.exams == len(found.exams) == num_good
    assert all(len(exam.frames) == 1 for exam in found.exams.values())


def test_there_are_more_than_300_and_no_two_alike() -> None:
    bad = [(s.format, repr(case.line)) for s in SETS for case in s.cases() if case.reason]
    assert len(bad) > 300
    assert len(bad) - len(set(bad)) == 0


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("m.json", b"", "malformed file: not JSON from there on: parse error: premature EOF"),
        ("m.json", b"[1, 2", "malformed line: not a JSON object"),
        ("m.json", b'[{"id": NaN}]', "malformed file: not JSON from there on: lexical error"),
        (
            "m.json",
            '[{"id": "肝"}]'.encode("gb18030"),
            "malformed file: not JSON from there on: 'u",
        ),
        ("m.json", '[{"id": "a"}]'.encode("utf-16"), "malformed file: not JSON from there on: 'u"),
        ("m.json", bytes(100), "malformed file: not JSON from there on: lexical error"),
        ("m.jsonl", "\n".join('{"id": "a"}').encode("utf-16"), "malformed line: not"),
        ("m.csv", b"a,b\n\xff\xfe,\0\n", "malformed row: not utf-8 text"),
        ("m.csv", b'messages,"id\n1,2\n', "malformed row: unexpected end of data"),
    ],
)
def test_a_file_that_is_none_is_in_quarantine(
    tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    found = import_set(tmp_path, "messages", name, {name: data})
    assert found.counts.exams == 0
    assert found.reasons[0][1].startswith(reason)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_an_empty_file_holds_no_exam(tmp_path: Path, name: str) -> None:
    storage.write_bytes(f"{tmp_path}/set/{name}", b"")
    with pytest.raises(ConfigError, match=f"{name} holds no exam"):
        prepare(config_of(tmp_path, "messages", name))


@pytest.mark.usefixtures("ray_cluster")
def test_trees_with_links_in_a_circle(tmp_path: Path) -> None:
    good = dicom_bytes(
        tissue(10),
        region(*REGION),
        StudyInstanceUID="1.2.4",
        PatientID="7",
        SeriesInstanceUID="1.5",
    )
    files = {"a/good.dcm": good, "a/cut.dcm": good[:200], "a/good.gif": film("gif", [1, 2])}
    for name, data in files.items():
        storage.write_bytes(f"{tmp_path}/set/{name}", data)
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self.gif").symlink_to("self.gif")
    with open(os.fsencode(tmp_path / "set") + "/肝.dcm".encode("gb18030"), "wb") as file:
        file.write(good)
    found, reasons = bring_in(config_of(tmp_path, "dicom", ocr="off"))
    assert found.counts.exams == 1
    assert set(reasons) == {"a/cut.dcm", "a/good.gif", "\\udcb8\\udcce.dcm"}
    assert all(reason.startswith("unreadable DICOM header: ") for reason in reasons.values())
    found, reasons = bring_in(config_of(tmp_path, "video"))
    assert (found.counts.exams, reasons) == (1, {})


@pytest.mark.usefixtures("ray_cluster")
def test_ids_that_come_twice_keep_the_first_good_one(tmp_path: Path) -> None:
    rows = [
        {"id": "E", "images": [], "messages": [USER, ASSISTANT]},
        {"id": "E", "images": ["good.png"], "messages": [USER, ASSISTANT]},
        {"id": "E", "images": ["good.png"], "messages": [USER, ASSISTANT]},
    ]
    (tmp_path / "set").mkdir()
    write_images(tmp_path / "set")
    storage.write_bytes(f"{tmp_path}/set/m.jsonl", json_lines(rows))
    found, reasons = bring_in(config_of(tmp_path, "messages", "m.jsonl"))
    assert found.counts.exams == 1
    assert reasons == {
        "m.jsonl line 1": "no frames: the list is empty",
        "m.jsonl line 3": "duplicate exam_id: also at m.jsonl line 2",
    }
