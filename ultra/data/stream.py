"""The order in which training reads exams, and what it reads of them.

A window is a few row groups drawn from all over the table and shuffled together: random enough to
train on, and read in large pieces. The order follows from the seed alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

from ultra import storage
from ultra.config import ConfigError, DataConfig, StageConfig
from ultra.data import parquet, schema
from ultra.data.collate import Sample, pick_conversations
from ultra.data.features import features_uris, read_features, unpack
from ultra.tracking import Tracker
from ultra.types import Split

ROW_GROUPS_PER_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A row group of the exams table, and where the features of its exams are, if anywhere."""

    part_uri: str
    row_group: int
    features_uri: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """Pieces that are read and shuffled together, in one epoch."""

    epoch: int
    pieces: tuple[Piece, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Source:
    """What a stage, or an evaluation, reads.

    Attributes:
        features: whether the exams' features are read, or else their frames.
        num_exams: exams of the split that is trained on.
    """

    pieces: tuple[Piece, ...]
    features: bool
    num_exams: int


def open_source(
    config: DataConfig, cache_uri: str, use: str, key: str = "train.features"
) -> Source:
    """Return what is read: features where the cache holds every exam, else frames alone.

    Args:
        config: where the exams are.
        cache_uri: folder of the features of exactly the model's encoders.
        use: auto, require or pixels.
        key: of the configuration that says so.

    Raises:
        StorageError: when there is no table of exams.
        ConfigError: when features are required and some are missing.
    """
    pieces = list_pieces(config.exams_uri, cache_uri)
    missing = [] if use == "pixels" else without_features(pieces, cache_uri)
    if missing and use == "require":
        raise ConfigError(
            f"{key}: require, but {len(missing)} of {len(pieces)} row groups have no features at "
            f"{cache_uri}; run ray_jobs.encode"
        )
    features = use != "pixels" and not missing
    if not features:
        pieces = [replace(piece, features_uri="") for piece in pieces]
    return Source(tuple(pieces), features, count_splits(config.exams_uri)["train"])


def count_splits(exams_uri: str) -> Counter[str]:
    """Return split -> number of its exams in a table.

    Raises:
        StorageError: when there is no table of exams.
    """
    parts = parquet.part_uris(exams_uri)
    return Counter(name for part in parts for name in parquet.read_column(part, "split"))


def track_exams(tracker: Tracker, exams_uri: str, context: str) -> None:
    """Record the table of exams that a run reads, by its content.

    Args:
        tracker: of the run.
        exams_uri: the table.
        context: what for, `training` or `evaluation`.

    Raises:
        StorageError: when there is no table of exams.
    """
    tracker.dataset(exams_uri, parquet.digest_table(exams_uri), count_splits(exams_uri), context)


def list_pieces(exams_uri: str, cache_uri: str) -> list[Piece]:
    """Return the row groups of a table and where the features of each belong, written or not.

    Raises:
        StorageError: when there is no table of exams.
    """
    return [
        Piece(part, index, uri)
        for part in parquet.part_uris(exams_uri)
        for index, uri in enumerate(features_uris(part, cache_uri))
    ]


def without_features(pieces: Iterable[Piece], cache_uri: str) -> list[Piece]:
    """Return the pieces whose features are not in the cache, one of each content."""
    present = set(storage.list_files(cache_uri, ".parquet"))
    missing = {p.features_uri: p for p in pieces if p.features_uri not in present}
    return list(missing.values())


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
        for index, row in enumerate(rows):
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
    """Return the first `count` exams of a split as `read_exams` does, with `epoch` 0."""
    rows = chain.from_iterable(read_exams(piece, "split", {split}) for piece in source.pieces)
    return [{**row, "epoch": 0} for row in islice(rows, count)]


def read_exams(
    piece: Piece,
    column: str,
    values: Collection[str],
    columns: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the exams of a row group whose `column` has one of some values.

    A row is one of the exams table, of the named columns or of all, with `features` beside them
    where there are features. Those of one exam are read at a time: they are larger than frames.
    """
    names = parquet.read_row_group(piece.part_uri, piece.row_group, [column])
    places = [place for place, name in enumerate(names) if name[column] in values]
    if not places:
        return
    rows = parquet.read_row_group(piece.part_uri, piece.row_group, columns)
    if not piece.features_uri:
        yield from (rows[place] for place in places)
        return
    wanted = [(place, rows[place]["content_sha256"]) for place in places]
    for place, features in zip(places, read_features(piece.features_uri, wanted), strict=True):
        yield {**rows[place], "features": features}


def to_sample(
    row: Mapping[str, Any], stage: StageConfig, seed: int, num_tokens: int, dtype: str
) -> Sample:
    """Return a row of `read_window` with the conversations its epoch trains on."""
    group = schema.from_row(row)
    conversations = pick_conversations(group, stage, seed, row["epoch"])
    stored = row.get("features")
    features = unpack(stored, num_tokens, dtype) if stored is not None else None
    if features is not None:
        group = replace(group, frames=())
    return Sample(group, conversations, features, row["epoch"])
