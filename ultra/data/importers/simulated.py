"""The simulator as a source of exams."""

from __future__ import annotations

from collections.abc import Iterator

from ultra.config import DataConfig
from ultra.data.importers.entry import ExamEntry
from ultra.data.importers.reader import ImportedExam
from ultra.data.synthetic import simulate_exam, simulated_exams


def list_exams(config: DataConfig) -> Iterator[ExamEntry]:
    """Yield the exams of the simulator; their ids say all that is needed to make them."""
    for patient, exam in simulated_exams(config.simulator, config.seed):
        yield ExamEntry("simulator", f"sim-{patient:05d}-{exam}")


def read_exam(entry: ExamEntry, config: DataConfig) -> ImportedExam:
    """Return a simulated exam."""
    _, patient, exam = entry.exam_id.split("-")
    group = simulate_exam(config.simulator, config.seed, int(patient), int(exam))
    return ImportedExam(group, ("simulated",) * len(group.frames))
