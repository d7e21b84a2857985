"""Rows that bring conversations: what sets of the LLaVA kind and of the messages kind share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field

from ultra.data.importers.entry import ExamEntry, Modality, Name, Row, Text, code_modality
from ultra.types import Conversation, Role, Split, Stage, Turn

MARKER = "<image>"

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""The names of who speaks, as sets have them."""

MISMATCH = "image markers that are not as many as the images"
"""A note; the images count, and where they are shown is for the prompt to say."""

_CHINESE = re.compile(r"[\u4e00-\u9fff]")


def _listed(value: Any) -> Any:
    return [] if value in (None, "") else [value] if isinstance(value, str) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""One path, several, or none."""


class Message(Row):
    """What one side says, in either spelling."""

    role: Name = Field(validation_alias=AliasChoices("role", "from"))
    content: Text = Field(validation_alias=AliasChoices("content", "value"))


class DialogueRow(Row):
    """What the rows of all such sets may have besides the conversation.

    `patient_id`, `modality` and `split` are none of theirs, but the exporter of ultra writes them.
    """

    id: Name | None = None
    images: Paths = Field((), validation_alias=AliasChoices("images", "image"))
    domain: dict[str, bool] | None = None
    patient_id: Name | None = None
    modality: Modality | None = None
    split: Split | None = None


def make_entry(
    place: str,
    row: DialogueRow,
    messages: Sequence[Message],
    stage: Stage,
    *,
    modality: str = "US",
    task: str = "conversation",
) -> ExamEntry:
    """Return the exam of one row: its images and its conversation.

    The patient is the first image where the row names none, so all that is asked about an image
    comes into one split.

    Args:
        place: of the row in its set.
        row: what it has besides the conversation.
        messages: its conversation.
        stage: what the conversation is for.
        modality: where the row says nothing.
        task: what the conversation is called in scores per task.

    Raises:
        ValueError: for a conversation that is none, as `to_turns`.
    """
    turns = to_turns(messages)
    num_markers = sum(message.content.count(MARKER) for message in messages)
    return ExamEntry(
        source=place,
        exam_id=row.id or place,
        patient_id=row.patient_id or (row.images[0] if row.images else ""),
        modality=row.modality or (modality if row.domain is None else read_domain(row.domain)),
        frames=row.images,
        conversations=(Conversation(stage, task, turns, language_of(turns)),),
        split=row.split,
        notes=(MISMATCH,) if row.images and num_markers != len(row.images) else (),
    )


def to_turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """Return messages as turns, without the markers that say where an image stood.

    Raises:
        ValueError: unless a user and an assistant take turns, perhaps after a system text, and the
            assistant, who never says nothing, has the last word.
    """
    turns = []
    for number, message in enumerate(messages, start=1):
        role = ROLES.get(message.role.lower())
        if role is None:
            raise ValueError(f"bad conversation: turn {number} is nobody's: {message.role[:40]!r}")
        turns.append(Turn(role, message.content.replace(MARKER, "").strip()))
    spoken = turns[1:] if turns and turns[0].role == "system" else turns
    for index, turn in enumerate(spoken):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            number = index + 1 + len(turns) - len(spoken)
            raise ValueError(f"bad conversation: turn {number} must be the {expected}'s")
        if turn.role == "assistant" and not turn.content:
            raise ValueError("bad conversation: an empty answer")
    if not spoken or spoken[-1].role != "assistant":
        raise ValueError("bad conversation: no answer at its end")
    return tuple(turns)


def ask_once(
    stage: Stage,
    task: str,
    question: str,
    answer: str,
    *,
    language: str = "",
    closed: bool | None = None,
    question_id: str = "",
) -> Conversation:
    """Return one question and its answer as a conversation, in the language of its texts.

    Raises:
        ValueError: as `to_turns`.
    """
    turns = to_turns(
        [Message(role="user", content=question), Message(role="assistant", content=answer)]
    )
    return Conversation(stage, task, turns, language or language_of(turns), closed, question_id)


def language_of(turns: Sequence[Turn]) -> str:
    """Return `zh` for turns with Chinese characters, `en` for others."""
    return "zh" if any(_CHINESE.search(turn.content) for turn in turns) else "en"


def read_domain(domain: dict[str, bool]) -> str:
    """Return the DICOM code of LLaVA-Med's domain, `OT` (other) where none or several are true."""
    names = [name for name, holds in domain.items() if holds]
    return code_modality(names[0]) if len(names) == 1 else "OT"
