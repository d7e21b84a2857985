"""Sets written for a test, brought in as `prepare` does, without Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultra import storage
from ultra.config import DataConfig
from ultra.data import parquet
from ultra.data.prepare import PrepareCounts, list_entries, publish, write_tables
from ultra.data.schema import from_row
from ultra.types import FrameGroup


@dataclass(frozen=True)
class Imported:
    """What the tables hold, exams by id and reasons in order."""

    counts: PrepareCounts
    exams: dict[str, FrameGroup]
    reasons: list[tuple[str, str]]


def json_list(rows: Any, mark: str = "") -> bytes:
    return (mark + json.dumps(rows, ensure_ascii=False)).encode()


def json_lines(rows: list[Any]) -> bytes:
    return b"\n".join(json_list(row) for row in rows)


def config_of(
    folder: Path | str | str, format: str, source: str = "", **changes: Any
) -> DataConfig:
    addresses = {f"{name}_uri": f"{folder}/{name}" for name in ("exams", "quarantine", "audit")}
    return DataConfig.model_validate(
        {
            **addresses,
            "format": format,
            "source_uri": f"{folder}/set/{source}".rstrip("/"),
            "assume_deidentified": "Dr. Wang, 2026-01-05",
            "patient_key_secret": "key",
            **changes,
        }
    )


def write_set(folder: Path | str | str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        storage.write_bytes(f"{folder}/set/{name}", data)


def import_set(
    folder: Path | str, format: str, source: str, files: dict[str, bytes], **changes: Any
) -> Imported:
    """Write a set, bring it in, and return what its tables hold."""
    write_set(folder, files)
    config = config_of(folder, format, source, **changes)
    counts = publish([write_tables(list(list_entries(config)), 0, config)], config)
    return read_tables(config, counts)


def read_tables(config: DataConfig, counts: PrepareCounts) -> Imported:
    groups = [from_row(row) for row in _rows(config.exams_uri)]
    reasons = [(row["exam_id"], row["reason"]) for row in _rows(config.quarantine_uri)]
    return Imported(counts, {group.exam_id: group for group in groups}, reasons)


def _rows(uri: str) -> list[dict[str, Any]]:
    return [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]
