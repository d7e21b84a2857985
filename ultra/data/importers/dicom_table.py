"""A table of reports beside DICOM files: CSV, JSON or JSON lines, one exam a row.

A row names its files by `path` (a file or a folder, several with `;`), `study_uid` or `accession`
(检查号), and says `findings` (所见), `diagnosis` (提示, 诊断), `site` (部位), `history` (病史). The
files are under `data.images_uri`. Ids leave as keyed pseudonyms only, whichever way they came.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pydantic import AliasChoices, Field

from ultra.config import DataConfig
from ultra.data.importers.dicom import Study, read_studies
from ultra.data.importers.entry import ExamEntry, Row, Text, parse, patient_key, to_entries
from ultra.data.importers.reader import images_uri
from ultra.data.importers.records import Record, read_records


def _named(*names: str) -> Any:
    return Field(default="", validation_alias=AliasChoices(*names))


class ReportRow(Row):
    """A row of the table, under English or Chinese names."""

    exam_id: Text = _named("exam_id", "检查编号")
    study_uid: Text = _named("study_uid", "StudyInstanceUID", "study_instance_uid")
    accession: Text = _named("accession", "AccessionNumber", "accession_number", "检查号")
    path: Text = _named("path", "frames", "图像", "路径")
    patient_id: Text = _named("patient_id", "PatientID", "患者ID", "病人ID", "患者编号")
    site: Text = _named("site", "部位", "检查部位")
    history: Text = _named("history", "病史", "临床病史")
    findings: Text = _named("findings", "所见", "超声所见", "检查所见")
    diagnosis: Text = _named("diagnosis", "提示", "超声提示", "诊断", "诊断意见")


@dataclass(frozen=True, slots=True)
class _Index:
    """Which studies and files a row means."""

    studies: dict[str, Study]
    by_accession: dict[str, list[str]]
    places: list[tuple[str, str]]
    """Every file's path and study, sorted."""

    def find(self, row: ReportRow, secret: str) -> tuple[list[str], tuple[str, ...]]:
        """Return the studies' pseudonyms and the files of a row; a path may have no file."""
        if row.path:
            parts = [part.strip().strip("/") for part in row.path.split(";") if part.strip()]
            hits = [self._under(part) for part in parts]
            paths = [
                [path for path, _ in hit] or [part] for part, hit in zip(parts, hits, strict=True)
            ]
            keys = [key for hit in hits for _, key in hit]
            return list(dict.fromkeys(keys)), tuple(path for some in paths for path in some)
        if row.study_uid:
            key = patient_key(row.study_uid, secret)
            keys = [key] if key in self.studies else []
        else:
            keys = self.by_accession.get(patient_key(row.accession, secret), [])
        return keys, tuple(path for key in keys for path in self.studies[key].paths)

    def _under(self, part: str) -> list[tuple[str, str]]:
        start = bisect_left(self.places, (part, ""))
        hits = takewhile(lambda place: place[0].startswith(part), self.places[start:])
        return [place for place in hits if place[0] == part or place[0].startswith(f"{part}/")]


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams of the table in order, then the studies and files that no row speaks of.

    Raises:
        StorageError: when there is no such table.
    """
    studies, strays = read_studies(images_uri(config), config)
    table = config.source_uri.rpartition("/")[2]
    index = _make_index(studies)
    named: set[str] = set()

    def convert(record: Record) -> ExamEntry:
        row = parse(record, ReportRow)
        keys, paths = _find(row, index, config)
        named.update(keys)
        return _to_exam(row, record.place, [studies[key] for key in keys], paths, config)

    yield from to_entries(read_records(config.source_uri, config.encoding), convert)
    yield from (stray for stray in strays if stray.source != table)
    for key, study in studies.items():
        if key not in named:
            source = f"study of {study.paths[0]}"
            yield ExamEntry(source, key, reason="no report: no row of the table names this study")


def _make_index(studies: dict[str, Study]) -> _Index:
    by_accession: dict[str, list[str]] = {}
    for key, study in studies.items():
        if study.header.accession:
            by_accession.setdefault(study.header.accession, []).append(key)
    places = sorted((path, key) for key, study in studies.items() for path in study.paths)
    return _Index(studies, by_accession, places)


def _find(row: ReportRow, index: _Index, config: DataConfig) -> tuple[list[str], tuple[str, ...]]:
    if not (row.path or row.study_uid or row.accession):
        raise ValueError("missing keys: one of path, study_uid, accession must say which files")
    keys, paths = index.find(row, config.patient_key_secret)
    if not paths:
        by = "study_uid" if row.study_uid else "accession"
        raise ValueError(f"no DICOM: no ultrasound file has the row's {by}")
    patients = set().union(*(index.studies[key].patients for key in keys))
    if len(patients) > 1:
        raise ValueError("several patients: in the files of one exam")
    return keys, paths


def _to_exam(
    row: ReportRow, place: str, studies: list[Study], paths: tuple[str, ...], config: DataConfig
) -> ExamEntry:
    name = row.exam_id or row.study_uid or row.accession or row.path
    patient = studies[0].header.patient if studies else row.patient_id
    return ExamEntry(
        source=place,
        exam_id=patient_key(name, config.patient_key_secret),
        patient_id=patient or name,
        site=row.site or (studies[0].site if studies else ""),
        history=row.history,
        findings=row.findings,
        diagnosis=row.diagnosis,
        frames=paths,
    )
