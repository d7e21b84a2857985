"""The order in which training reads exams, and what it reads of them.

A window is a few row groups drawn from all over the table and shuffled together: random enough to
train on, and read in large pieces. The order follows from the seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ultra import storage
from ultra.config import ConfigError, DataConfig
from ultra.data import parquet, schema
from ultra.data.collate import Sample, pick_conversation
from ultra.data.features import features_uri, read_features, unpack
from ultra.types import Split, Stage

ROW_GROUPS_PER_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A row group of the exams table, and where the features of its exams are.

    Attributes:
        first_row: place of its first exam in the part.
    """

    part_uri: str
    row_group: int
    first_row: int
    features_uri: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """Pieces that are read and shuffled together, in one epoch."""

    epoch: int
    pieces: tuple[Piece, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Source:
    """What a stage reads.

    Attributes:
        features: whether the exams' features are read, or else their frames.
        num_exams: exams of the split that is trained on.
    """

    pieces: tuple[Piece, ...]
    features: bool
    num_exams: int


def open_source(config: DataConfig, cache_uri: str, use: str) -> Source:
    """Return what training reads: features where the cache holds every exam, else frames.

    Args:
        config: where the exams are.
        cache_uri: folder of the features of exactly the model's encoders.
        use: `train.features`: auto, require or pixels.

    Raises:
        StorageError: when there is no table of exams.
        ConfigError: when features are required and some are missing.
    """
    parts = parquet.part_uris(config.exams_uri)
    cached = dict.fromkeys(parts, "")
    if use != "pixels":
        present = set(storage.list_files(cache_uri, ".parquet"))
        wanted = {part: features_uri(part, cache_uri) for part in parts}
        if set(wanted.values()) <= present:
            cached = wanted
        elif use == "require":
            missing = len(set(wanted.values()) - present)
            raise ConfigError(
                f"train.features: require, but {missing} of {len(parts)} parts have no features at "
                f"{cache_uri}; run ray_jobs.encode"
            )
    pieces = []
    num_exams = 0
    for part in parts:
        num_exams += parquet.read_column(part, "split").count("train")
        first_row = 0
        for index, num_rows in enumerate(parquet.row_group_sizes(part)):
            pieces.append(Piece(part, index, first_row, cached[part]))
            first_row += num_rows
    return Source(tuple(pieces), all(cached.values()), num_exams)


def plan_windows(
    pieces: Sequence[Piece], seed: int, first_epoch: int, num_epochs: int
) -> Iterator[Window]:
    """Yield the windows of some epochs in reading order."""
    for epoch in range(first_epoch, first_epoch + num_epochs):
        rng = random.Random(f"{seed} {epoch}")
        order = list(pieces)
        rng.shuffle(order)
        for start in range(0, len(order), ROW_GROUPS_PER_WINDOW):
            chosen = tuple(order[start : start + ROW_GROUPS_PER_WINDOW])
            yield Window(epoch, chosen, rng.randrange(2**32))


def read_window(window: Window, seen: Collection[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    """Yield the training rows of a window in shuffled order, those seen before left out.

    A row is one of the exams table, with `epoch`, and with `features` instead of `frames` where
    there are features.
    """
    found = []
    for piece in window.pieces:
        columns = schema.TEXT_COLUMNS if piece.features_uri else None
        rows = parquet.read_row_group(piece.part_uri, piece.row_group, columns)
        for index, row in enumerate(rows, piece.first_row):
            if row["split"] == "train":
                found.append((piece, index, {**row, "epoch": window.epoch}))
    random.Random(window.seed).shuffle(found)
    # Left out after the shuffle: a run that goes on keeps the order it had.
    left = [item for item in found if (window.epoch, item[2]["exam_id"]) not in seen]
    wanted: dict[str, list[tuple[int, str]]] = {}
    for piece, index, row in left:
        wanted.setdefault(piece.features_uri, []).append((index, row["content_sha256"]))
    # Each file of features is opened once, and read exam by exam as the order comes to it.
    readers = {uri: read_features(uri, rows) for uri, rows in wanted.items()}
    for piece, _, row in left:
        if piece.features_uri:
            row["features"] = next(readers[piece.features_uri])
        yield row


def read_split(source: Source, split: Split, count: int) -> list[dict[str, Any]]:
    """Return the first `count` exams of a split, or as many as there are.

    A row is one of the exams table, with `epoch` 0, and with `features` beside `frames` where there
    are features.
    """
    found: list[dict[str, Any]] = []
    for part_uri, group in groupby(source.pieces, key=lambda piece: piece.part_uri):
        if len(found) == count:
            break
        pieces = list(group)
        splits = parquet.read_column(part_uri, "split")
        places = [place for place, name in enumerate(splits) if name == split]
        for place in places[: count - len(found)]:
            piece = max((p for p in pieces if p.first_row <= place), key=lambda p: p.first_row)
            row = parquet.read_row_group(part_uri, piece.row_group)[place - piece.first_row]
            if piece.features_uri:
                wanted = [(place, row["content_sha256"])]
                row["features"] = next(read_features(piece.features_uri, wanted))
            found.append({**row, "epoch": 0})
    return found


def to_sample(
    row: Mapping[str, Any], stage: Stage, seed: int, num_tokens: int, dtype: str
) -> Sample:
    """Return a row of `read_window` with the conversation its epoch trains on."""
    group = schema.from_row(row)
    conversation = pick_conversation(group, stage, seed, row["epoch"])
    stored = row.get("features")
    features = unpack(stored, num_tokens, dtype) if stored is not None else None
    if features is not None:
        group = replace(group, frames=())
    return Sample(group, conversation, features, row["epoch"])
