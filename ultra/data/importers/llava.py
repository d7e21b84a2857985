r"""Conversations as LLaVA and LLaVA-Med have them: a JSON list, or a line each.

A row reads

    {"id": "1", "image": "a.jpg", "domain": {"mri": true, "ct_scan": false},
     "conversations": [{"from": "human", "value": "<image>\n…"}, {"from": "gpt", "value": "…"}]}

`conversations` is also spelt `conversatons`, as LLaVA-Med's own files have it; `image` may be a
list; `domain` is LLaVA-Med's. A row without an image is not for a model that looks at images.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import AliasChoices, Field

from ultra.config import DataConfig
from ultra.data.importers.dialogue import DialogueRow, Message, make_entry
from ultra.data.importers.entry import ExamEntry, parse, to_entries
from ultra.data.importers.records import Record, read_records


class LlavaRow(DialogueRow):
    """A row of the list."""

    conversations: tuple[Message, ...] = Field(
        validation_alias=AliasChoices("conversations", "conversatons")
    )


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams in the order of the list, bad rows with their reason."""

    def convert(record: Record) -> ExamEntry:
        row = parse(record, LlavaRow)
        return make_entry(record.place, row, row.conversations, config.stage)

    return to_entries(read_records(config.source_uri, config.encoding), convert)
