"""What one task of `prepare` does: read exams, split them by patient, write parts of tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ultra.config import DataConfig
from ultra.data import parquet, schema
from ultra.data.importers.folder import ExamEntry, ImportedExam, list_exams, read_exam
from ultra.data.instructions import write_conversations
from ultra.data.parquet import Part
from ultra.data.synthetic import simulate_exam, simulated_exams
from ultra.types import Split


@dataclass(frozen=True, slots=True)
class PrepareCounts:
    """What came of a run of prepare; `quarantine_reasons` counts exams by kind of reason."""

    exams: int = 0
    frames: int = 0
    duplicates_dropped: int = 0
    quarantined: int = 0
    quarantine_reasons: Mapping[str, int] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: PrepareCounts) -> PrepareCounts:
        return PrepareCounts(
            self.exams + other.exams,
            self.frames + other.frames,
            self.duplicates_dropped + other.duplicates_dropped,
            self.quarantined + other.quarantined,
            _sum(self.quarantine_reasons, other.quarantine_reasons),
            _sum(self.splits, other.splits),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for JSON."""
        return asdict(self)

    def metrics(self) -> dict[str, float]:
        """Return the counts by name, for a tracker."""
        names = ("exams", "frames", "duplicates_dropped", "quarantined")
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
        return "\n".join(lines + [f"  {r['exams']:6} {r['reason']}" for r in self.reason_rows()])


@dataclass(frozen=True, slots=True)
class Written:
    """The parts one task wrote, and its counts; a table that got no row has no part."""

    exams: Part | None
    quarantine: Part | None
    audit: Part | None
    counts: PrepareCounts


def list_entries(config: DataConfig) -> Iterator[dict[str, Any]]:
    """Yield what names each exam of the source: (patient, exam) pairs, or lines of the index.

    Raises:
        ValueError: when the source holds no exam.
        StorageError: when the exam folder has no index.
    """
    if config.source == "simulator":
        for patient, exam in simulated_exams(config.simulator, config.seed):
            yield {"patient": patient, "exam": exam}
        return
    if not config.folder_uri:
        raise ValueError("data.folder_uri: needed for data.source: folder")
    found = False
    for entry in list_exams(config.folder_uri):
        found = True
        yield asdict(entry)
    if not found:
        raise ValueError(f"{config.folder_uri}: exams.jsonl holds no exam")


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
    entries: Sequence[Mapping[str, Any]], position: int, config: DataConfig
) -> Written:
    """Read exams one at a time and write them as one part of each table.

    An exam that cannot be let in becomes a row of the quarantine table with its reason.

    Args:
        entries: as `list_entries` yields them.
        position: place of the first one in the source.
        config: with `patient_key_secret` set.
    """
    quarantine: list[dict[str, Any]] = []
    audit: list[dict[str, Any]] = []
    totals: Counter[str] = Counter()
    splits: Counter[str] = Counter()

    def rows() -> Iterator[dict[str, Any]]:
        for entry in entries:
            try:
                imported = _read(entry, config)
            except ValueError as error:
                quarantine.append(_quarantine_row(entry, str(error)))
                continue
            group = imported.group
            group = replace(group, split=split_of(group.patient_key, config))
            totals.update(frames=len(group.frames), duplicates=imported.num_duplicates)
            splits[group.split] += 1
            audit.extend(_audit_rows(imported))
            yield schema.to_row(group)

    exams = _write(rows(), config.exams_uri, schema.EXAMS, position, config)
    counts = PrepareCounts(
        exams=splits.total(),
        frames=totals["frames"],
        duplicates_dropped=totals["duplicates"],
        quarantined=len(quarantine),
        quarantine_reasons=Counter(row["reason"].partition(":")[0] for row in quarantine),
        splits=splits,
    )
    return Written(
        exams,
        _write(quarantine, config.quarantine_uri, schema.QUARANTINE, position, config),
        _write(audit, config.audit_uri, schema.AUDIT, position, config),
        counts,
    )


def fill_conversations(part: Part, config: DataConfig) -> Part:
    """Write the exams of a part anew with their conversations, and return the new part."""
    source = parquet.part_uri(config.exams_uri, part)

    def rows() -> Iterator[dict[str, Any]]:
        for row in parquet.read_rows(source):
            group = schema.from_row(row)
            conversations = write_conversations(group, config.seed, config.site_cue)
            yield {**row, "conversations": schema.conversations_to_rows(conversations)}

    filled = _write(rows(), config.exams_uri, schema.EXAMS, part.position, config)
    assert filled is not None, f"{source}: a part has rows"
    return filled


def publish(written: Sequence[Written], config: DataConfig) -> PrepareCounts:
    """Make what the tasks wrote the tables of the run, and return all counts together.

    The exams come last: who sees them finds their audit and quarantine in place.
    """
    for uri, parts in (
        (config.quarantine_uri, [w.quarantine for w in written]),
        (config.audit_uri, [w.audit for w in written]),
        (config.exams_uri, [w.exams for w in written]),
    ):
        parquet.publish_parts(uri, [part for part in parts if part is not None])
    return sum((w.counts for w in written), PrepareCounts())


def _read(entry: Mapping[str, Any], config: DataConfig) -> ImportedExam:
    if config.source == "simulator":
        group = simulate_exam(config.simulator, config.seed, entry["patient"], entry["exam"])
        return ImportedExam(group, ("simulated",) * len(group.frames))
    return read_exam(
        ExamEntry(**{**entry, "frames": tuple(entry["frames"])}), config.folder_uri, config
    )


def _write(
    rows: Iterable[Mapping[str, Any]], uri: str, kind: Any, position: int, config: DataConfig
) -> Part | None:
    return parquet.write_part(
        rows, uri, kind, position=position, row_group_bytes=config.row_group_mib * 2**20
    )


def _quarantine_row(entry: Mapping[str, Any], reason: str) -> dict[str, Any]:
    return {
        "exam_id": entry["exam_id"],
        "source": f"exams.jsonl line {entry['line']}",
        "reason": reason,
        "schema_version": schema.SCHEMA_VERSION,
    }


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
