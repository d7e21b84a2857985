"""Drafts of conversations: who writes them, what the check and the expert say of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ultra.config import DataConfig, InstructionsConfig
from ultra.data.instructions import write_conversations
from ultra.data.writer.endpoint import read_reply
from ultra.data.writer.faithful import find_mistranslated, find_unstated
from ultra.data.writer.orders import (
    is_chinese,
    is_english,
    place_order,
    read_translated,
    read_written,
)
from ultra.data.writer.review import Decision
from ultra.types import Conversation, FrameGroup

MARK = "ultra:"
"""How `question_id` begins in conversations that this job wrote; those of a set stay."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A conversation before it is judged.

    Attributes:
        conversation: None where a reply could not be read.
        source: the text it was written or translated from.
        reason: why it is not to be let in; empty where nothing speaks against it.
        reply: what could not be read.
    """

    conversation: Conversation | None
    source: str
    reason: str = ""
    reply: str = ""


def write_drafts(
    group: FrameGroup, data: DataConfig, config: InstructionsConfig
) -> tuple[list[Draft], int]:
    """Return the drafts about an exam, and 1 where a reply is wanted and not there."""
    drafts = []
    if is_chinese(group.findings + group.diagnosis):
        drafts = [
            Draft(c, _report(group), find_unstated(c.turns, group))
            for c in write_conversations(group, data.seed, data.site_cue)
            if config.writer != "endpoint" or c.stage == "align"
        ]
    order = None if config.writer == "rules" else place_order(group, config, data.site_cue)
    if order is None:
        return drafts, 0
    reply = read_reply(config.replies_uri, order.digest)
    if reply is None:
        return drafts, 1
    if reply.finish_reason == "length":
        cut = f"malformed reply: cut at {config.max_tokens} tokens"
        return [*drafts, Draft(None, _report(group), cut, reply.content)], 0
    if config.writer == "translate":
        return [*drafts, *_translated(reply.content, group)], 0
    return [*drafts, *_written(reply.content, group, data.site_cue)], 0


def _written(content: str, group: FrameGroup, site_cue: bool) -> Iterator[Draft]:
    for found in read_written(content):
        if isinstance(found, str):
            yield Draft(None, _report(group), found, content)
            continue
        asked = found.turns[:1] if site_cue else found.turns[::2]
        may_tell = site_cue and found.task != "site"
        told = not may_tell and any(group.site in turn.content for turn in asked if group.site)
        reason = "site told: in a question" if told else find_unstated(found.turns, group)
        yield Draft(found, _report(group), reason)


def _translated(content: str, group: FrameGroup) -> Iterator[Draft]:
    try:
        pairs = list(read_translated(content, group))
    except ValueError as error:
        yield Draft(None, _report(group), str(error), content)
        return
    for source, found in pairs:
        reasons = (
            find_mistranslated(turn.content, other.content)
            for turn, other in zip(source.turns, found.turns, strict=True)
            if is_english(turn.content)
        )
        english = "\n".join(turn.content for turn in source.turns)
        yield Draft(found, english, next((r for r in reasons if r), ""))


@dataclass(frozen=True, slots=True)
class Judged:
    """A draft with what becomes of it; `verdict` is the expert's, empty where there is none."""

    draft: Draft
    exam_id: str
    digest: str
    verdict: str
    kept: Conversation | None

    @property
    def rejected(self) -> bool:
        """Return whether the check, and no expert, turned it away."""
        return bool(self.draft.reason) and not self.verdict


def judge(draft: Draft, exam_id: str, decisions: Mapping[str, Decision]) -> Judged:
    """Return what becomes of a draft: an expert's decision counts before the check's."""
    found = draft.conversation
    if found is None:
        return Judged(draft, exam_id, "", "", None)
    digest = _digest(exam_id, found)
    decision = decisions.get(digest)
    if decision is None:
        verdict, kept = "", None if draft.reason else found
    elif decision.verdict == "discard":
        verdict, kept = "discard", None
    else:
        verdict, kept = decision.verdict, _edit(found, decision.edits)
    kept = replace(kept, question_id=f"{MARK}{digest}") if kept else None
    return Judged(draft, exam_id, digest, verdict, kept)


def _digest(exam_id: str, conversation: Conversation) -> str:
    """Return what names a conversation of an exam as it was first written."""
    texts = [exam_id, conversation.stage, conversation.task]
    texts += [turn.content for turn in conversation.turns]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _edit(conversation: Conversation, edits: Mapping[int, str]) -> Conversation:
    """Return a conversation with the answers of some rounds replaced."""
    turns = list(conversation.turns)
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    for place, number in zip(answers, range(1, len(answers) + 1), strict=True):
        if number in edits:
            turns[place] = replace(turns[place], content=edits[number])
    return replace(conversation, turns=tuple(turns))


def _report(group: FrameGroup) -> str:
    return "\n".join(filter(None, (group.site, group.findings, group.diagnosis)))
