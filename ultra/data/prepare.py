"""What one task of `prepare` does: read exams, split them by patient, write parts of tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ultra.config import ConfigError, DataConfig
from ultra.data import parquet, schema
from ultra.data.importers.entry import ExamEntry
from ultra.data.importers.formats import find_format
from ultra.data.importers.reader import ImportedExam, MissingFiles
from ultra.data.parquet import Part
from ultra.types import FrameGroup, Split

REPORT_EVERY = 16
"""Exams between two reports of progress."""
NUM_NAMED = 10
"""Missing files that are named."""


@dataclass(frozen=True, slots=True)
class PrepareCounts:
    """What came of a run of prepare.

    Attributes:
        quarantine_reasons: exams by kind of reason.
        notes: oddities of the set, by kind, in exams that were let in.
        scrubbed: identities taken out of texts, by kind.
        missing_files: files that the set names and that do not exist; the first few by name.
    """

    exams: int = 0
    frames: int = 0
    duplicates_dropped: int = 0
    quarantined: int = 0
    quarantine_reasons: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    scrubbed: Mapping[str, int] = field(default_factory=dict)
    missing_files: int = 0
    first_missing: tuple[str, ...] = ()

    def __add__(self, other: PrepareCounts) -> PrepareCounts:
        return PrepareCounts(
            self.exams + other.exams,
            self.frames + other.frames,
            self.duplicates_dropped + other.duplicates_dropped,
            self.quarantined + other.quarantined,
            _sum(self.quarantine_reasons, other.quarantine_reasons),
            _sum(self.splits, other.splits),
            _sum(self.notes, other.notes),
            _sum(self.scrubbed, other.scrubbed),
            self.missing_files + other.missing_files,
            (self.first_missing + other.first_missing)[:NUM_NAMED],
        )

    def done(self) -> dict[str, int]:
        """Return what is done, for a progress line."""
        exams = self.exams + self.quarantined
        return {"exams": exams, "frames": self.frames, "in quarantine": self.quarantined}

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return the counts by name, for a tracker."""
        names = ("exams", "frames", "duplicates_dropped", "quarantined", "missing_files")
        splits = {f"exams_{split}": float(count) for split, count in self.splits.items()}
        return {name: float(getattr(self, name)) for name in names} | splits

    def reason_rows(self) -> list[dict[str, Any]]:
        """Return one row per kind of reason, the commonest first."""
        ordered = sorted(self.quarantine_reasons.items(), key=lambda item: (-item[1], item[0]))
        return [{"reason": reason, "exams": count} for reason, count in ordered]

    def summary(self) -> str:
        """Return the counts in a few lines for people."""
        splits = ", ".join(f"{count} {split}" for split, count in self.splits.items())
        lines = [
            f"{self.exams} exams ({splits or 'none'}), {self.frames} frames, "
            f"{self.duplicates_dropped} near-duplicates dropped",
            f"{self.quarantined} exams in quarantine",
        ]
        lines += [f"  {r['exams']:6} {r['reason']}" for r in self.reason_rows()]
        lines += [f"{count} exams with {note}" for note, count in self.notes.items()]
        if self.scrubbed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.scrubbed.items())
            lines.append(f"taken out of texts: {kinds}")
        return "\n".join([*lines, self.missing()] if self.missing_files else lines)

    def missing(self) -> str:
        """Return how many files are missing and the names of the first."""
        return f"{self.missing_files} files are missing: {', '.join(self.first_missing)}"


@dataclass(frozen=True, slots=True)
class Written:
    """The parts one task wrote, and its counts; a table that got no row has no part."""

    exams: Part | None
    quarantine: Part | None
    audit: Part | None
    counts: PrepareCounts


def list_entries(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams of the source in order; of several with one id only the first is good.

    Raises:
        ConfigError: for an unknown format, or one without its source.
        StorageError: when the source does not exist.
    """
    seen: dict[str, str] = {}
    for entry in find_format(config).list_exams(config):
        if not entry.reason:
            first = seen.setdefault(entry.exam_id, entry.source)
            # The simulator's exams share a source, and their ids differ by construction.
            if first != entry.source:
                entry = replace(entry, reason=f"duplicate exam_id: also at {first}")
        yield entry


def split_of(patient_key: str, config: DataConfig) -> Split:
    """Return the split of a patient: the same for all exams, and for every run with one seed."""
    digest = hashlib.sha256(f"{config.seed}:{patient_key}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < config.test_fraction:
        return "test"
    if share < config.test_fraction + config.validation_fraction:
        return "validation"
    return "train"


def write_tables(
    entries: Sequence[ExamEntry],
    position: int,
    config: DataConfig,
    report: Callable[[Mapping[str, int]], None] = lambda done: None,
) -> Written:
    """Read exams one at a time and write them as one part of each table.

    An exam that cannot be let in becomes a row of the quarantine table with its reason.

    Args:
        entries: as `list_entries` yields them.
        position: place of the first one in the source.
        config: with `patient_key_secret` set.
        report: is told now and then how much of the part is done.
    """
    quarantine: list[dict[str, Any]] = []
    audit: list[dict[str, Any]] = []
    read = find_format(config).read_exam
    counts = PrepareCounts()

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal counts
        for index, entry in enumerate(entries):
            try:
                imported = read(entry, config)
            except ValueError as error:
                quarantine.append(_quarantine_row(entry, str(error)))
                counts += _count_refused(error)
            else:
                group = imported.group
                split = entry.split or _split(group, config)
                audit.extend(_audit_rows(imported))
                counts += _count_let_in(imported, split, entry.notes)
                yield schema.to_row(replace(group, split=split))
            if index % REPORT_EVERY == 0:
                report(counts.done())

    exams = _write(rows(), config.exams_uri, schema.EXAMS, position, config)
    report(counts.done())
    return Written(
        exams,
        _write(quarantine, config.quarantine_uri, schema.QUARANTINE, position, config),
        _write(audit, config.audit_uri, schema.AUDIT, position, config),
        counts,
    )


def _split(group: FrameGroup, config: DataConfig) -> Split:
    # Nothing can be learnt from an exam without a report or conversations, but it can be asked.
    told = group.findings or group.diagnosis or group.conversations
    return split_of(group.patient_key, config) if told else "test"


def _count_let_in(imported: ImportedExam, split: Split, notes: Iterable[str]) -> PrepareCounts:
    return PrepareCounts(
        exams=1,
        frames=len(imported.group.frames),
        duplicates_dropped=imported.num_duplicates,
        splits={split: 1},
        notes=Counter(notes),
        scrubbed=imported.scrubbed,
    )


def _count_refused(error: ValueError) -> PrepareCounts:
    paths = error.paths if isinstance(error, MissingFiles) else []
    return PrepareCounts(
        quarantined=1,
        quarantine_reasons={str(error).partition(":")[0]: 1},
        missing_files=len(paths),
        first_missing=tuple(paths[:NUM_NAMED]),
    )


def publish(written: Sequence[Written], config: DataConfig) -> PrepareCounts:
    """Make what the tasks wrote the tables of the run, and return all counts together.

    The exams come last: who sees them finds their audit and quarantine in place.

    Raises:
        ConfigError: when a file is missing and the configuration is strict; nothing is published.
    """
    counts = sum((w.counts for w in written), PrepareCounts())
    if config.strict and counts.missing_files:
        raise ConfigError(f"data.strict: {counts.missing()}")
    for uri, parts in (
        (config.quarantine_uri, [w.quarantine for w in written]),
        (config.audit_uri, [w.audit for w in written]),
        (config.exams_uri, [w.exams for w in written]),
    ):
        parquet.publish_parts(uri, [part for part in parts if part is not None])
    return counts


def _write(
    rows: Iterable[Mapping[str, Any]], uri: str, kind: Any, position: int, config: DataConfig
) -> Part | None:
    return parquet.write_part(
        rows, uri, kind, position=position, row_group_bytes=config.row_group_mib * 2**20
    )


def _quarantine_row(entry: ExamEntry, reason: str) -> dict[str, Any]:
    texts = {"exam_id": entry.exam_id, "source": entry.source, "reason": reason}
    # The names of files on a disk are of any encoding, the texts of a table are not.
    written = {k: text.encode(errors="backslashreplace").decode() for k, text in texts.items()}
    return {**written, "schema_version": schema.SCHEMA_VERSION}


def _audit_rows(imported: ImportedExam) -> Iterator[dict[str, Any]]:
    group = imported.group
    for source, evidence in zip(group.frame_sources, imported.evidence, strict=True):
        yield {
            "exam_id": group.exam_id,
            "source": source,
            "evidence": evidence,
            "schema_version": schema.SCHEMA_VERSION,
        }


def _sum(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted((Counter(a) + Counter(b)).items()))
