"""The sheet in which an expert accepts, edits or discards conversations: a CSV that Excel opens.

One row is one question and its answer. What is decided stays decided: the next run honours it and
carries the row over as it stands.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa

from ultra import storage
from ultra.config import InputError

Verdict = Literal["accept", "edit", "discard"]
STRONGEST_FIRST: tuple[Verdict, ...] = ("discard", "edit", "accept")

COLUMNS = (
    "exam_id", "digest", "round", "task", "source", "question", "answer", "check", "decision",
    "edited",
)  # fmt: skip
"""`check` says why the conversation was rejected; `decision` and `edited` are the expert's."""

SHEET = pa.schema([(name, pa.string()) for name in COLUMNS[:-2]])
"""The rows of one run, before they become the sheet."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
"""How a cell begins that a spreadsheet would run."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What an expert decided on a conversation; `edits` is round -> the answer in its place."""

    verdict: Verdict
    edits: Mapping[int, str] = field(default_factory=dict)


def in_share(digest: str, share: float) -> bool:
    """Return whether a conversation is one of a share, always the same ones."""
    return int(digest[:8], 16) < share * 2**32


def read_decisions(uri: str) -> dict[str, Decision]:
    """Return digest -> decision of a sheet; nothing where there is no sheet.

    A conversation of several rounds goes as soon as one of them is discarded.

    Raises:
        InputError: for a missing column, an unknown decision or an edit without text; names the
            row as a spreadsheet counts it.
    """
    decisions: dict[str, Decision] = {}
    for digest, rows in _decided(uri).items():
        verdicts = {row["decision"] for row in rows}
        edits = {int(r["round"]): r["edited"] for r in rows if r["decision"] == "edit"}
        verdict = next(v for v in STRONGEST_FIRST if v in verdicts)
        decisions[digest] = Decision(verdict, edits)
    return decisions


def write_sheet(uri: str, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write the sheet anew and return how many rows it has.

    Rows that are decided in the sheet that is there stay as they are; those that `rows` no longer
    holds come last.

    Args:
        uri: of the CSV.
        rows: values of SHEET.

    Raises:
        InputError: as `read_decisions`.
    """
    decided = {(r["digest"], r["round"]): r for rows in _decided(uri).values() for r in rows}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.csv"
        count = 0
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in rows:
                kept = decided.pop((row["digest"], row["round"]), {})
                writer.writerow({name: _guard(value) for name, value in (kept or row).items()})
                count += 1
            for row in decided.values():
                writer.writerow({name: _guard(value) for name, value in row.items()})
                count += 1
        storage.write_file(uri, path)
    return count


def _decided(uri: str) -> dict[str, list[dict[str, str]]]:
    """Return the decided rows of each conversation of a sheet."""
    found: dict[str, list[dict[str, str]]] = {}
    if not uri or not storage.exists(uri):
        return found
    for number, row in enumerate(_read(uri), start=2):  # row 1 holds the names
        decision = row["decision"].strip().lower()
        if not decision:
            continue
        place = f"{uri}: row {number}: "
        if decision not in get_args(Verdict):
            allowed = ", ".join(get_args(Verdict))
            raise InputError(f"{place}decision {decision!r}; allowed: {allowed}, or empty")
        if decision == "edit" and not row["edited"].strip():
            raise InputError(f"{place}decision edit without a text in `edited`")
        if not row["round"].strip().isdecimal():
            raise InputError(f"{place}round {row['round']!r} is no number")
        found.setdefault(row["digest"], []).append({**row, "decision": decision})
    return found


def _read(uri: str) -> Iterator[dict[str, str]]:
    data = storage.read_bytes(uri)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:  # Excel on Chinese Windows, saving as plain CSV
        text = data.decode("gb18030", errors="replace")
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    missing: Sequence[str] = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise InputError(f"{uri}: no column {', '.join(missing)}")
    for row in reader:
        yield {name: _unguard(row[name]) for name in COLUMNS}


def _guard(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _unguard(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
