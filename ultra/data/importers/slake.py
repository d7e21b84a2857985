"""SLAKE: questions in Chinese and English about medical images (Liu et al., ISBI 2021).

`train.json`, `validate.json` (also `validation.json`) and `test.json`, or a folder with them, hold

    [{"img_id": 1, "img_name": "xmlab1/source.jpg", "question": "…", "answer": "…",
      "q_lang": "zh", "location": "Abdomen", "modality": "MRI", "answer_type": "OPEN",
      "content_type": "Modality", "qid": 12995}]

All questions about an image make one exam. The images are looked for in `imgs/`, as published,
where `data.images_uri` says nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

from ultra.config import DataConfig
from ultra.data.importers.dialogue import ask_once
from ultra.data.importers.entry import ExamEntry, Modality, Name, Row, Text, to_grouped_entries
from ultra.data.importers.records import read_records, split_files, split_in_name


class SlakeRow(Row):
    """One question about an image."""

    img_id: Name
    img_name: Name
    question: Name
    answer: Name
    q_lang: Literal["en", "zh"]
    location: Text
    modality: Modality
    answer_type: Literal["OPEN", "CLOSED"]
    content_type: Name
    qid: Name


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield one exam for each image, bad questions first and each by itself."""
    return itertools.chain.from_iterable(
        _list_file(uri, config) for uri in split_files(config.source_uri)
    )


def _list_file(uri: str, config: DataConfig) -> Iterator[ExamEntry]:
    def convert(place: str, rows: list[SlakeRow]) -> ExamEntry:
        first = rows[0]
        return ExamEntry(
            source=place,
            exam_id=first.img_id,
            patient_id=f"image {first.img_id}",
            site=first.location,
            modality=first.modality,
            frames=(first.img_name if config.images_uri else f"imgs/{first.img_name}",),
            conversations=tuple(
                ask_once(
                    config.stage,
                    row.content_type,
                    row.question,
                    row.answer,
                    language=row.q_lang,
                    closed=row.answer_type == "CLOSED",
                    question_id=row.qid,
                )
                for row in rows
            ),
            split=split_in_name(uri),
        )

    records = read_records(uri, config.encoding)
    return to_grouped_entries(
        records, SlakeRow, lambda row: f"{row.img_id} {row.img_name}", convert
    )
