"""What came of a run of `instructions`, for people, for MLflow and for the next run's cap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class FillCounts:
    """What came of the exams of a part, or of all.

    Attributes:
        conversations: written by this job and let in.
        imported: that came with the set.
        unwritten: exams whose reply is not there: left by the cap, or failed.
        rejected: conversations by kind of reason.
        reviewed: conversations by an expert's decision.
    """

    exams: int = 0
    conversations: int = 0
    imported: int = 0
    unwritten: int = 0
    rejected: Mapping[str, int] = field(default_factory=dict)
    reviewed: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: FillCounts) -> FillCounts:
        return FillCounts(
            self.exams + other.exams,
            self.conversations + other.conversations,
            self.imported + other.imported,
            self.unwritten + other.unwritten,
            Counter(self.rejected) + Counter(other.rejected),
            Counter(self.reviewed) + Counter(other.reviewed),
        )


@dataclass(frozen=True, slots=True)
class Bill:
    """What asking an endpoint came to.

    Attributes:
        states: exams by what became of their order: paid, kept, left, failed.
        failures: failed ones by reason.
        cost: of what was paid in this run.
        spent: of every kept reply together, and of those that were lost on the way in this run.
    """

    states: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    cost: float = 0.0
    spent: float = 0.0


@dataclass(frozen=True, slots=True)
class InstructionCounts:
    """What came of the job; `sheet_rows` is the length of the review sheet."""

    filled: FillCounts
    bill: Bill = Bill()
    sheet_rows: int = 0

    @property
    def left(self) -> int:
        """Exams that were not asked about because the cap allowed no more."""
        return self.bill.states.get("left", 0)

    def metrics(self) -> dict[str, float]:
        """Return the counts by name, for a tracker."""
        filled, bill = self.filled, self.bill
        return {
            "exams": filled.exams,
            "conversations": filled.conversations,
            "conversations_imported": filled.imported,
            "conversations_rejected": sum(filled.rejected.values()),
            "exams_unwritten": filled.unwritten,
            "exams_left_by_cap": self.left,
            "requests_paid": bill.states.get("paid", 0),
            "requests_failed": bill.states.get("failed", 0),
            "cost": bill.cost,
            "spent": bill.spent,
        }

    def reason_rows(self) -> list[dict[str, Any]]:
        """Return a row for each reason to reject, to fail, and each decision, commonest first."""
        sources = {
            "rejected": self.filled.rejected,
            "failed": self.bill.failures,
            "reviewed": self.filled.reviewed,
        }
        return [
            {"what": what, "reason": reason, "count": count}
            for what, counts in sources.items()
            for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        ]

    def summary(self) -> str:
        """Return the counts in a few lines for people."""
        filled, bill = self.filled, self.bill
        lines = [
            f"{filled.conversations} conversations for {filled.exams} exams, {filled.imported} "
            f"more came with them; {sum(filled.rejected.values())} rejected"
        ]
        if bill.states:
            states = ", ".join(f"{count} {state}" for state, count in sorted(bill.states.items()))
            lines.append(f"replies: {states}; cost {bill.cost:.4f}, spent so far {bill.spent:.4f}")
        if self.left:
            lines.append(
                f"{self.left} exams are left: they could exceed instructions.spend_cap; "
                "a run with a larger one goes on"
            )
        lines += [f"  {r['count']:6} {r['what']}: {r['reason']}" for r in self.reason_rows()]
        return "\n".join(lines)
