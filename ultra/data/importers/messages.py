"""Messages and images, as LLaMA-Factory, ms-swift and TRL read them.

A line (or an item of a JSON list) reads

    {"id": "case001", "images": ["a.png", "b.png"],
     "messages": [{"role": "user", "content": "<image><image>…"},
                  {"role": "assistant", "content": "…"}]}

with one `<image>` for each image. `image` may stand for a single one, and `id` may be missing: the
exam is then called by its place in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

from ultra.config import DataConfig
from ultra.data.importers.dialogue import DialogueRow, Message, make_entry
from ultra.data.importers.entry import ExamEntry, parse, to_entries
from ultra.data.importers.records import Record, read_records


class MessagesRow(DialogueRow):
    """A line of the file."""

    messages: tuple[Message, ...]


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams in the order of the file, bad lines with their reason."""

    def convert(record: Record) -> ExamEntry:
        row = parse(record, MessagesRow)
        return make_entry(record.place, row, row.messages, config.stage)

    return to_entries(read_records(config.source_uri, config.encoding), convert)
