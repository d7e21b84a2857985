"""Exams written for other trainers: LLaVA's JSON lists, or messages as JSON lines.

Under `data.export_uri` stand a file for each stage and split, such as `instruct_train.json`, and
the frames it names, in `images/`, called by a digest of their exam's frames. A row is one
conversation. `patient_id` (the pseudonym), `modality` and `split` are not of these formats; other
trainers pass over them, and ultra's own importers read them.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ultra import storage
from ultra.config import DataConfig
from ultra.data import parquet
from ultra.data.frames import is_jpeg
from ultra.data.importers.dialogue import MARKER
from ultra.data.parquet import Part
from ultra.data.schema import content_digest, from_row
from ultra.types import Conversation, FrameGroup, Split, Stage, Turn

_PIECES = ".pieces"
_SUFFIX = {"llava": "json", "messages": "jsonl"}


@dataclass(frozen=True, slots=True)
class ExportCounts:
    """What an export wrote; an exam without conversations gives no row and no image."""

    exams: int = 0
    conversations: int = 0
    frames: int = 0
    without_conversations: int = 0

    def __add__(self, other: ExportCounts) -> ExportCounts:
        return ExportCounts(
            self.exams + other.exams,
            self.conversations + other.conversations,
            self.frames + other.frames,
            self.without_conversations + other.without_conversations,
        )


def export_part(part: Part, config: DataConfig) -> ExportCounts:
    """Write the frames of a part of the exams table, and its rows as pieces of the files to come.

    Raises:
        StorageError: when something cannot be read or written.
    """
    counts = ExportCounts()
    lines: dict[str, list[str]] = {}
    for row in parquet.read_rows(parquet.part_uri(config.exams_uri, part)):
        group = from_row(row)
        if not group.conversations:
            counts += ExportCounts(without_conversations=1)
            continue
        images = _write_frames(group, config.export_uri)
        for name, exported in _export_rows(group, images, config.export_format):
            lines.setdefault(name, []).append(json.dumps(exported, ensure_ascii=False))
        counts += ExportCounts(1, len(group.conversations), len(images))
    for name, texts in lines.items():
        piece = storage.join(config.export_uri, _PIECES, name, part.name)
        storage.write_bytes(piece, "\n".join(texts).encode())
    return counts


def join_pieces(parts: Sequence[Part], config: DataConfig) -> list[str]:
    """Make the pieces of all parts whole files, in the table's order, and return their addresses.

    A file of an export before, that has no row now, is removed.
    """
    written = []
    for stage, split in itertools.product(get_args(Stage), get_args(Split)):
        name = _file_name(stage, split, config.export_format)
        folder = storage.join(config.export_uri, _PIECES, name)
        present = set(storage.list_files(folder))
        pieces = [uri for part in parts if (uri := storage.join(folder, part.name)) in present]
        target = storage.join(config.export_uri, name)
        if not pieces:
            storage.delete(target)
            continue
        with tempfile.TemporaryDirectory() as local:
            path = Path(local) / name
            _join(pieces, path, as_list=config.export_format == "llava")
            storage.write_file(target, path)
        written.append(target)
    storage.delete(storage.join(config.export_uri, _PIECES))
    return written


def _join(pieces: Sequence[str], path: Path, *, as_list: bool) -> None:
    opening, between, closing = (b"[\n", b",\n", b"\n]\n") if as_list else (b"", b"\n", b"\n")
    with path.open("wb") as file:
        file.write(opening)
        for index, line in enumerate(line for uri in pieces for line in _read_lines(uri)):
            file.write(between * (index > 0) + line)
        file.write(closing)


def _read_lines(uri: str) -> list[bytes]:
    return storage.read_bytes(uri).split(b"\n")


def _file_name(stage: Stage, split: Split, format: str) -> str:
    return f"{stage}_{split}.{_SUFFIX[format]}"


def _write_frames(group: FrameGroup, export_uri: str) -> list[str]:
    digest = content_digest(group.frames)[:24]
    paths = []
    for number, frame in enumerate(group.frames, start=1):
        suffix = "jpg" if is_jpeg(frame) else "png"
        path = f"images/{digest[:2]}/{digest}/{number}.{suffix}"
        storage.write_bytes(storage.join(export_uri, path), frame)
        paths.append(path)
    return paths


def _export_rows(
    group: FrameGroup, images: list[str], format: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each conversation's file and row."""
    to_row = _llava_row if format == "llava" else _messages_row
    total = Counter(c.stage for c in group.conversations)
    seen: Counter[str] = Counter()
    for conversation in group.conversations:
        stage = conversation.stage
        seen[stage] += 1
        name = group.exam_id if total[stage] == 1 else f"{group.exam_id}-{seen[stage]}"
        more = {"patient_id": group.patient_key, "modality": group.modality, "split": group.split}
        row = {"id": name, **to_row(conversation, images), **more}
        yield _file_name(stage, group.split, format), row


def _llava_row(conversation: Conversation, images: list[str]) -> dict[str, Any]:
    turns = list(conversation.turns)
    if turns[0].role == "system":  # LLaVA's rows have none
        system = turns.pop(0).content
        turns[0] = Turn("user", f"{system}\n{turns[0].content}")
    markers = f"{MARKER}\n" * len(images)
    return {
        "image": images[0] if len(images) == 1 else images,
        "conversations": [
            {
                "from": "gpt" if turn.role == "assistant" else "human",
                "value": (markers if index == 0 else "") + turn.content,
            }
            for index, turn in enumerate(turns)
        ],
    }


def _messages_row(conversation: Conversation, images: list[str]) -> dict[str, Any]:
    first = next(i for i, turn in enumerate(conversation.turns) if turn.role == "user")
    return {
        "images": images,
        "messages": [
            {
                "role": turn.role,
                "content": MARKER * (len(images) if index == first else 0) + turn.content,
            }
            for index, turn in enumerate(conversation.turns)
        ],
    }
