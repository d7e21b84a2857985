"""ChiMed-VL, the Chinese data of Qilin-Med-VL (Liu et al., arXiv:2310.17956).

Its three files are `ChiMed-VL-Alignment.jsonl`, `-Instruction.json` and `-Chat.json`. The names of
their fields could not be read when this was written, so rows of three kinds are taken, each in the
spellings that such sets use:

- conversations as LLaVA has them: `id`, `image`, `conversations`;
- messages: `id`, `images`, `messages`;
- a caption: `id`, `image` and one of `caption`, `text`, `report`. It becomes the findings.

The alignment file is for the stage align, the others for instruct. The images are not published;
they come from PMC-OA and PMC-CaseReport and belong where `data.images_uri` says.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import AliasChoices, Field

from ultra.config import DataConfig
from ultra.data.importers.dialogue import DialogueRow, make_entry
from ultra.data.importers.entry import ExamEntry, Name, parse, to_entries
from ultra.data.importers.llava import LlavaRow
from ultra.data.importers.messages import MessagesRow
from ultra.data.importers.records import Record, read_records
from ultra.types import Stage


class CaptionRow(DialogueRow):
    """A row without a conversation."""

    caption: Name = Field(validation_alias=AliasChoices("caption", "text", "report"))


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams in the order of the file, bad rows with their reason."""
    stage = _stage_of(config)
    records = read_records(config.source_uri, config.encoding)
    return to_entries(records, lambda record: _entry(record, stage))


def _stage_of(config: DataConfig) -> Stage:
    name = config.source_uri.rsplit("/", 1)[-1].lower()
    if "alignment" in name:
        return "align"
    return "instruct" if "instruction" in name or "chat" in name else config.stage


def _entry(record: Record, stage: Stage) -> ExamEntry:
    keys = record.value.keys()
    if "messages" in keys:
        said = parse(record, MessagesRow)
        return make_entry(record.place, said, said.messages, stage, modality="OT")
    if keys.isdisjoint({"conversations", "conversatons"}) and keys & {"caption", "text", "report"}:
        row = parse(record, CaptionRow)
        return ExamEntry(
            source=record.place,
            exam_id=row.id or record.place,
            patient_id=row.patient_id or (row.images[0] if row.images else ""),
            findings=row.caption,
            modality=row.modality or "OT",
            frames=row.images,
            split=row.split,
        )
    asked = parse(record, LlavaRow)
    return make_entry(record.place, asked, asked.conversations, stage, modality="OT")
