"""What one task of `instructions` does: write, check and review the conversations of one part.

Nothing is paid for here: what an endpoint wrote is read from the replies that are kept, so a task
may run as often as it likes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa

from ultra import storage
from ultra.config import DataConfig, InstructionsConfig
from ultra.data import parquet, schema
from ultra.data.parquet import Part
from ultra.data.writer.counts import FillCounts
from ultra.data.writer.drafts import MARK, Judged, judge, write_drafts
from ultra.data.writer.review import SHEET, Decision, in_share

REJECTED = pa.schema(
    [
        ("exam_id", pa.string()),
        ("digest", pa.string()),
        ("stage", pa.string()),
        ("task", pa.string()),
        ("reason", pa.string()),
        ("turns", schema.EXAMS.field("conversations").type.value_type.field("turns").type),
        ("reply", pa.string()),
        ("schema_version", pa.int32()),
    ]
)
"""Conversations not let in; one row with the `reply`, and no turns, where it could not be read."""


@dataclass(frozen=True, slots=True)
class Filled:
    """The parts one task wrote, and its counts; a table that got no row has no part."""

    exams: Part
    rejected: Part | None
    sheet: Part | None
    counts: FillCounts


def sheet_uri(config: InstructionsConfig) -> str:
    """Return the address of the table that becomes the review sheet."""
    return storage.join(config.replies_uri, "sheet")


def fill_part(
    part: Part, data: DataConfig, config: InstructionsConfig, decisions: Mapping[str, Decision]
) -> Filled:
    """Write the exams of a part anew with their conversations.

    What came with an imported set stays; what this job wrote before is written again.

    Args:
        part: of the exams table.
        data: where the tables are.
        config: who writes.
        decisions: digest -> what an expert decided.
    """
    rejected: list[dict[str, Any]] = []
    sheet: list[dict[str, Any]] = []
    counts = FillCounts()

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal counts
        for row in parquet.read_rows(parquet.part_uri(data.exams_uri, part)):
            group = schema.from_row(row)
            drafts, unwritten = write_drafts(group, data, config)
            judged = [judge(draft, group.exam_id, decisions) for draft in drafts]
            kept = tuple(c for j in judged if (c := j.kept))
            own = tuple(c for c in group.conversations if not c.question_id.startswith(MARK))
            rejected.extend(_rejected_row(j) for j in judged if j.rejected)
            if config.review_uri:
                sheet.extend(r for j in judged for r in _sheet_rows(j, config.review_share))
            counts += FillCounts(
                1, len(kept), len(own), unwritten,
                Counter(j.draft.reason.partition(":")[0] for j in judged if j.rejected),
                Counter(j.verdict for j in judged if j.verdict),
            )  # fmt: skip
            yield {**row, "conversations": schema.conversations_to_rows((*own, *kept))}

    exams = _write_part(rows(), data.exams_uri, schema.EXAMS, part.position, data)
    assert exams is not None, f"{part.name}: a part has rows"
    return Filled(
        exams,
        _write_part(rejected, config.rejected_uri, REJECTED, part.position, data),
        _write_part(sheet, sheet_uri(config), SHEET, part.position, data),
        counts,
    )


def _rejected_row(judged: Judged) -> dict[str, Any]:
    found = judged.draft.conversation
    turns = [{"role": t.role, "content": t.content} for t in found.turns] if found else []
    return {
        "exam_id": judged.exam_id,
        "digest": judged.digest,
        "stage": found.stage if found else "",
        "task": found.task if found else "",
        "reason": judged.draft.reason,
        "turns": turns,
        "reply": judged.draft.reply,
        "schema_version": schema.SCHEMA_VERSION,
    }


def _sheet_rows(judged: Judged, share: float) -> Iterator[dict[str, str]]:
    found = judged.draft.conversation
    if found is None or not in_share(judged.digest, share):
        return
    rounds = ((q, a) for q, a in pairwise(found.turns) if a.role == "assistant")
    for number, (question, answer) in enumerate(rounds, start=1):
        yield {
            "exam_id": judged.exam_id,
            "digest": judged.digest,
            "round": str(number),
            "task": found.task,
            "source": judged.draft.source,
            "question": question.content,
            "answer": answer.content,
            "check": judged.draft.reason,
        }


def _write_part(
    rows: Iterable[Mapping[str, Any]], uri: str, kind: Any, position: int, data: DataConfig
) -> Part | None:
    return parquet.write_part(
        rows, uri, kind, position=position, row_group_bytes=data.row_group_mib * 2**20
    )
