r"""The two kinds of test files of LLaVA-Med.

Lines of its chat test, whose answers GPT-4 wrote from a caption and what the article says of it:

    {"question_id": 0, "image": "a.jpg", "pair_id": "1", "text": "…\n<image>", "type": "…",
     "gpt4_answer": "…", "fig_caption": "…", "in_text_mention": ["…"], "domain": {"mri": true}}

and a list of one-round questions for VQA sets:

    [{"id": "1", "image": "a.jpg", "answer_type": "CLOSED",
      "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "yes"}]}]

All are for the test split, unless the file's name says `train` or `validation`. Caption and
mentions become the findings, the context that GPT-4 is given to judge by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ultra.config import DataConfig
from ultra.data.importers.dialogue import ask_once, make_entry, read_domain
from ultra.data.importers.entry import ExamEntry, Name, Row, Text, parse, to_entries
from ultra.data.importers.llava import LlavaRow
from ultra.data.importers.records import Record, read_records, split_in_name
from ultra.types import Split, Stage


def _mentions(value: Any) -> Any:
    """Return mentions as texts; some are objects with the text in `tokens`."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list):
        return values
    return [item.get("tokens") if isinstance(item, dict) else item for item in values]


class ChatRow(Row):
    """A line of the chat test."""

    question_id: Name
    image: Name
    text: Text
    gpt4_answer: Text
    type: Text = "conversation"
    fig_caption: Text = ""
    in_text_mention: Annotated[tuple[Text, ...], BeforeValidator(_mentions)] = ()
    domain: dict[str, bool] = Field(default_factory=dict)


class QuestionRow(LlavaRow):
    """An item of a VQA test."""

    answer_type: Literal["OPEN", "CLOSED"]


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield one exam for each question, in order, bad rows with their reason."""
    split = split_in_name(config.source_uri) or "test"

    def convert(record: Record) -> ExamEntry:
        is_question = "conversations" in record.value or "conversatons" in record.value
        return (_question if is_question else _chat)(record, config.stage, split)

    return to_entries(read_records(config.source_uri, config.encoding), convert)


def _chat(record: Record, stage: Stage, split: Split) -> ExamEntry:
    row = parse(record, ChatRow)
    asked = ask_once(stage, row.type, row.text, row.gpt4_answer, question_id=row.question_id)
    return ExamEntry(
        source=record.place,
        exam_id=row.question_id,
        patient_id=row.image,
        findings="\n".join(filter(None, [row.fig_caption, *row.in_text_mention])),
        modality=read_domain(row.domain),
        frames=(row.image,),
        conversations=(asked,),
        split=split,
    )


def _question(record: Record, stage: Stage, split: Split) -> ExamEntry:
    row = parse(record, QuestionRow)
    entry = make_entry(record.place, row, row.conversations, stage, modality="OT", task="vqa")
    (asked,) = entry.conversations
    if len(asked.turns) != 2:
        raise ValueError(f"bad conversation: {len(asked.turns)} turns where a question has two")
    asked = replace(asked, closed=row.answer_type == "CLOSED", question_id=entry.exam_id)
    # These questions do not mark where the image stands.
    return replace(entry, conversations=(asked,), split=row.split or split, notes=())
