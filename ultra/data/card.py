"""The data card: what a data set holds, what was left out and why, and whether splits leak."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tempfile
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from ultra import storage
from ultra.config import DataConfig
from ultra.data import parquet
from ultra.data.prepare import PrepareCounts
from ultra.page import build_page, show_table

Rows = list[dict[str, Any]]

_COLUMNS = (
    "patient_key", "site", "modality", "history", "findings", "diagnosis", "conversations",
    "frame_width", "split", "content_sha256",
)  # fmt: skip
_TEXTS = ("history", "findings", "diagnosis")
_PLACE = re.compile(r"\(-?\d+, -?\d+\) to \(-?\d+, -?\d+\)")
_NUMBER = re.compile(r"\d+")
_NUM_SITES = 40

_PROTECT = (
    "The tables behind this card hold frames and reports: protect them like the exams. The list of "
    "what was left out names files of the source."
)


@dataclass(slots=True)
class _Seen:
    """What one pass over the exams counts."""

    exams: Counter[str] = field(default_factory=Counter)
    frames: Counter[str] = field(default_factory=Counter)
    patients: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    contents: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reports: Counter[str] = field(default_factory=Counter)
    num_frames: Counter[int] = field(default_factory=Counter)
    sites: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    lengths: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    tasks: Counter[tuple[str, str, str]] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class DataCard:
    """What is in a data set; every table is rows of plain values.

    Attributes:
        counts: what came of the run of `prepare`.
        splits: exams, patients and frames of each split.
        leakage: patients, and exams with the very same frames, in more than one split.
        repeats: exams whose frames, or whose whole report, another exam has too.
        frames_per_exam: how many exams have how many frames.
        text_lengths: of each text that is not empty, in characters.
        evidence: frames by what shows that they carry no identity.
    """

    counts: PrepareCounts
    splits: Rows
    leakage: Mapping[str, int]
    repeats: Mapping[str, int]
    frames_per_exam: Rows
    sites: Rows
    modalities: Rows
    text_lengths: Rows
    conversations: Rows
    evidence: Rows

    def metrics(self) -> dict[str, float]:
        """Return the numbers to follow from run to run, for a tracker."""
        leaks = {f"leaking_{name}": float(count) for name, count in self.leakage.items()}
        repeats = {f"repeated_{name}": float(count) for name, count in self.repeats.items()}
        return self.counts.metrics() | leaks | repeats

    def to_json(self) -> str:
        """Return the whole card as JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)

    def to_html(self, title: str) -> str:
        """Return the card as a page."""
        counts = self.counts
        let_in = {
            "exams": counts.exams,
            "frames": counts.frames,
            "near-duplicate frames dropped": counts.duplicates_dropped,
            "exams in quarantine": counts.quarantined,
            "missing files": counts.missing_files,
        }
        leaks = sum(self.leakage.values())
        verdict = "No patient and no frame is in two splits." if not leaks else (
            f"<strong>Splits leak</strong>: {self.leakage['patients']} patients and "
            f"{self.leakage['contents']} sets of frames are in more than one split."
        )  # fmt: skip
        tables = [
            ("Left out, by reason", counts.reason_rows()),
            ("Taken out of texts", _rows(counts.scrubbed, "kind")),
            ("Oddities of the set", _rows(counts.notes, "note")),
            ("Frames per exam", self.frames_per_exam),
            ("Repeats of an exam before", [dict(self.repeats)]),
            ("Sites", self.sites),
            ("Modalities", self.modalities),
            ("Text lengths in characters", self.text_lengths),
            ("Conversations", self.conversations),
            ("Why frames were let in", self.evidence),
        ]
        sections = [
            ("Counts", show_table([let_in])),
            ("Splits", show_table(self.splits) + f"<p>{verdict}</p>"),
            *((heading, show_table(rows)) for heading, rows in tables if rows),
        ]
        return build_page(title, sections, _PROTECT)


def describe(config: DataConfig, counts: PrepareCounts) -> DataCard:
    """Return the card of the tables that stand at the configured addresses; no frame is read.

    Args:
        config: where the tables are.
        counts: what came of the run that wrote them.

    Raises:
        StorageError: when there is no complete table.
    """
    seen = _Seen()
    for row in _read(config.exams_uri, _COLUMNS):
        _count(seen, row)
    return DataCard(
        counts=counts,
        splits=[
            {
                "split": split,
                "exams": seen.exams[split],
                "patients": sum(split in found for found in seen.patients.values()),
                "frames": seen.frames[split],
            }
            for split in sorted(seen.exams)
        ],
        leakage={
            "patients": sum(len(found) > 1 for found in seen.patients.values()),
            "contents": sum(len(found) > 1 for found in seen.contents.values()),
        },
        repeats={
            "frames": sum(found.total() - 1 for found in seen.contents.values()),
            "reports": seen.reports.total() - len(seen.reports),
        },
        frames_per_exam=[
            {"frames": number, "exams": exams} for number, exams in sorted(seen.num_frames.items())
        ],
        sites=_rows(seen.sites, "site")[:_NUM_SITES],
        modalities=_rows(seen.modalities, "modality"),
        text_lengths=[
            {"text": name, **_quantiles(lengths)} for name, lengths in seen.lengths.items()
        ],
        conversations=[
            {"stage": stage, "task": task, "language": language, "conversations": count}
            for (stage, task, language), count in sorted(seen.tasks.items())
        ],
        evidence=_rows(_count_evidence(config.audit_uri), "evidence"),
    )


def write_card(card: DataCard, config: DataConfig, title: str) -> str:
    """Write the card and the lists behind it, and return the page's address.

    Beside `index.html` stand `card.json`, and `audit.csv` and `quarantine.csv`: every frame let in
    with the evidence, and everything left out with the reason, for a spreadsheet.
    """
    page = storage.join(config.card_uri, "index.html")
    storage.write_bytes(storage.join(config.card_uri, "card.json"), card.to_json().encode())
    for name, uri, columns in (
        ("audit", config.audit_uri, ("exam_id", "source", "evidence")),
        ("quarantine", config.quarantine_uri, ("exam_id", "source", "reason")),
    ):
        _write_csv(storage.join(config.card_uri, f"{name}.csv"), _read(uri), columns)
    storage.write_bytes(page, card.to_html(title).encode())
    return page


def _read(uri: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    for part in parquet.part_uris(uri):
        yield from parquet.read_rows(part, columns)


def _count(seen: _Seen, row: Mapping[str, Any]) -> None:
    split, num_frames = row["split"], len(row["frame_width"])
    seen.exams[split] += 1
    seen.frames[split] += num_frames
    seen.num_frames[num_frames] += 1
    seen.patients[row["patient_key"]].add(split)
    seen.contents[row["content_sha256"]][split] += 1
    seen.sites[row["site"]] += 1
    seen.modalities[row["modality"]] += 1
    texts = [row["findings"], row["diagnosis"]]
    if any(texts):
        seen.reports[hashlib.sha256("\n".join(texts).encode()).hexdigest()] += 1
    for name in _TEXTS:
        if row[name]:
            seen.lengths[name][len(row[name])] += 1
    for conversation in row["conversations"]:
        key = (conversation["stage"], conversation["task"], conversation["language"])
        seen.tasks[key] += 1
        for turn in conversation["turns"]:
            name = "answer" if turn["role"] == "assistant" else "question"
            seen.lengths[name][len(turn["content"])] += 1


def _count_evidence(audit_uri: str) -> Counter[str]:
    """Return how many frames each kind of evidence let in, places and numbers left out."""
    kinds: Counter[str] = Counter()
    for row in _read(audit_uri, ["evidence"]):
        evidence = row["evidence"]
        stated = evidence.startswith("stated by")
        kinds[evidence if stated else _NUMBER.sub("n", _PLACE.sub("a box", evidence))] += 1
    return kinds


def _rows(counts: Mapping[str, int], name: str) -> Rows:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{name: key or "(none)", "count": count} for key, count in ordered]


def _quantiles(lengths: Counter[int]) -> dict[str, float]:
    """Return count, mean, and quantiles (nearest rank) of the values that are counted."""
    ordered = sorted(lengths.items())
    passed = list(accumulate(count for _, count in ordered))

    def at(share: float) -> int:
        return ordered[bisect_left(passed, share * passed[-1])][0]

    mean = sum(value * count for value, count in ordered) / lengths.total()
    shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {"count": lengths.total(), "mean": round(mean, 1)} | {
        name: at(share) for name, share in shares.items()
    }


def _write_csv(uri: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV that spreadsheets open as what it is, texts never as formulas."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows([_harmless(row[name]) for name in columns] for row in rows)
        storage.write_file(uri, path)


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
