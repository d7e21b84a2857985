"""Every format that exams come in, by the name `data.format` calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ultra.config import ConfigError, DataConfig
from ultra.data.importers import (
    chimed_vl,
    dicom,
    dicom_table,
    folder,
    llava,
    llava_med_eval,
    messages,
    openi_zh,
    pmc_vqa,
    reader,
    report_json,
    simulated,
    slake,
    video,
)
from ultra.data.importers.entry import ExamEntry
from ultra.data.importers.reader import ImportedExam


@dataclass(frozen=True, slots=True)
class Format:
    """How exams are listed, and how the frames of a listed one are read.

    Attributes:
        list_exams: yields the exams in order, without reading a frame.
        read_exam: makes the frame group; raises ValueError (`kind: detail`) where it cannot.
        reads_uri: whether it reads `data.source_uri`.
    """

    list_exams: Callable[[DataConfig], Iterator[ExamEntry]]
    read_exam: Callable[[ExamEntry, DataConfig], ImportedExam] = reader.read_exam
    reads_uri: bool = True


FORMATS = {
    "simulator": Format(simulated.list_exams, simulated.read_exam, reads_uri=False),
    "folder": Format(folder.list_exams),
    "dicom": Format(dicom.list_exams),
    "dicom-table": Format(dicom_table.list_exams),
    "report-json": Format(report_json.list_exams),
    "llava": Format(llava.list_exams),
    "llava-med-eval": Format(llava_med_eval.list_exams),
    "messages": Format(messages.list_exams),
    "slake": Format(slake.list_exams),
    "openi-zh": Format(openi_zh.list_exams),
    "pmc-vqa": Format(pmc_vqa.list_exams),
    "chimed-vl": Format(chimed_vl.list_exams),
    "video": Format(video.list_exams),
}


def find_format(config: DataConfig) -> Format:
    """Return the format that the configuration names.

    Raises:
        ConfigError: for an unknown one, or one without its source.
    """
    found = FORMATS.get(config.format)
    if found is None:
        raise ConfigError(
            f"data.format: no format is called {config.format!r}; allowed: {', '.join(FORMATS)}"
        )
    if found.reads_uri and not config.source_uri:
        raise ConfigError(f"data.source_uri: needed for data.format: {config.format}")
    return found
