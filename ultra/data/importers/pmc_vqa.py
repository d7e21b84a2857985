"""PMC-VQA: multiple-choice questions about figures of articles (Zhang et al., arXiv:2305.10415).

Version 1, `train.csv` and `test.csv`, where `Answer` is also spelt `Anwser`:

    Figure_path,Question,Anwser,Choice A,Choice B,Choice C,Choice D,Answer_label

Version 2, `train_2.csv` and `test_2.csv`:

    index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split

A file, or a folder with the files of one version. Choices carry their letter (`A:Liver`) or do not.
The question names the choices, the answer is the text of the right one, and the patient is the
article (`PMC123` of `PMC123_Fig1_2.jpg`), so no article is in two of ultra's own splits.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Literal

from pydantic import AliasChoices, Field

from ultra.config import DataConfig
from ultra.data.importers.dialogue import ask_once
from ultra.data.importers.entry import ExamEntry, Name, Row, Text, parse, to_entries
from ultra.data.importers.records import Record, read_records, split_files, split_in_name

_LETTER = re.compile(r"\s*[A-D]\s*[:：]\s*")


class PmcRow(Row):
    """One question; a letter may stand for the answer."""

    figure: Name = Field(validation_alias="Figure_path")
    question: Name = Field(validation_alias="Question")
    answer: Name = Field(validation_alias=AliasChoices("Answer", "Anwser"))
    a: Text = Field(validation_alias="Choice A")
    b: Text = Field(validation_alias="Choice B")
    c: Text = Field(validation_alias="Choice C")
    d: Text = Field(validation_alias="Choice D")
    label: Text = Field("", validation_alias="Answer_label")
    caption: Text = Field("", validation_alias="Caption")
    index: Name | None = None
    split: Literal["train", "test", ""] = ""


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield one exam for each question, in order, bad rows with their reason."""
    return itertools.chain.from_iterable(
        _list_file(uri, config) for uri in split_files(config.source_uri)
    )


def _list_file(uri: str, config: DataConfig) -> Iterator[ExamEntry]:
    def convert(record: Record) -> ExamEntry:
        row = parse(record, PmcRow)
        choices = {
            letter: _LETTER.sub("", text, count=1).strip()
            for letter, text in zip("ABCD", (row.a, row.b, row.c, row.d), strict=True)
        }
        question = "\n".join([row.question, *(f"{k}: {v}" for k, v in choices.items())])
        name = f"{row.figure} {row.index or record.place}"
        answer = _right_one(row, choices)
        asked = ask_once(config.stage, "choice", question, answer, closed=True, question_id=name)
        return ExamEntry(
            source=record.place,
            exam_id=name,
            patient_id=row.figure.partition("_")[0],
            findings=row.caption,
            modality="OT",
            frames=(row.figure,),
            conversations=(asked,),
            split=row.split or split_in_name(uri),
        )

    return to_entries(read_records(uri, config.encoding), convert)


def _right_one(row: PmcRow, choices: dict[str, str]) -> str:
    """Return the text of the answer: of the choice where a letter alone is given.

    Raises:
        ValueError: for an answer that is none of the choices.
    """
    answer = choices.get(row.answer, _LETTER.sub("", row.answer, count=1).strip())
    if answer not in choices.values():
        raise ValueError("bad conversation: the answer is none of the choices")
    return answer
