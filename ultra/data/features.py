"""The feature cache: what the frozen encoders see in each frame, computed once.

Each row group of the exams table has one file of features under `features_uri/KEY/`. KEY names the
encoders, their weights, sizes, pooling and type; the file's name is the digest of the frames it
describes, in their order. So nothing stale is ever read: other frames or other encoders look for
another file, and new conversations about the same frames find the old one. Row i of the file
belongs to row i of the row group, and is a row group of its own, so that exams can be read one by
one. A file holds no more than a row group's frames (16 MiB of them by default): little is lost with
a worker, and many can work on a small table.

Shapes: K frames of a group or the one picture composed of them, T visual tokens of a picture, F
channels of an encoder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultra import storage
from ultra.data import parquet

Features = Mapping[str, NDArray[Any]]
Encode = Callable[[Sequence[Sequence[bytes]]], Sequence[Features]]
"""Frames of several groups -> encoder name -> (K, T, F), of each group."""

BATCH_FRAMES = 32
"""Frames that are encoded together, over exams in their order; an exam is never divided. What is
encoded together follows from the row group alone, so that a file is the same whoever writes it."""


def features_uris(exams_part_uri: str, folder_uri: str) -> list[str]:
    """Return where the features of each row group of a part are, written or not."""
    groups = parquet.read_column_groups(exams_part_uri, "content_sha256")
    digests = (hashlib.sha256("\n".join(group).encode()).hexdigest() for group in groups)
    return [storage.join(folder_uri, f"{digest[:32]}.parquet") for digest in digests]


@dataclass(frozen=True, slots=True)
class Written:
    """A file of features: the frames it describes, and its size in bytes."""

    frames: int
    bytes: int


@dataclass(frozen=True, slots=True)
class EncodeCounts:
    """What an encode job did.

    Attributes:
        cached: files of features that were there before, one for each row group of the exams table.
        written: files that it wrote.
        frames: described by those.
        bytes: size of those.
        seconds: from the first frame to the last; what the encoders took to start comes before.
    """

    cached: int
    written: int = 0
    frames: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def frames_per_second(self) -> float:
        """Frames through all encoders."""
        return self.frames / self.seconds if self.seconds else 0.0

    @property
    def bytes_per_frame(self) -> float:
        """What the cache takes for a frame."""
        return self.bytes / self.frames if self.frames else 0.0

    def metrics(self) -> dict[str, float]:
        """Return the counts by name, for a tracker."""
        derived = ("frames_per_second", "bytes_per_frame")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    def summary(self) -> str:
        """Return the counts in a line for people."""
        return (
            f"{self.frames:,} frames encoded ({self.frames_per_second:,.1f}/s, "
            f"{self.bytes_per_frame:,.0f} bytes each) into {self.written} files; "
            f"{self.cached} were in the cache"
        )


def write_features(exams_part_uri: str, row_group: int, target_uri: str, encode: Encode) -> Written:
    """Encode the frames of a row group of the exams table into a file.

    The file appears whole, when it is done.
    """
    rows = parquet.read_row_group(exams_part_uri, row_group, ["content_sha256", "frames"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.parquet"
        writer: pq.ParquetWriter | None = None
        for batch in _batches(rows):
            encoded = encode([row["frames"] for row in batch])
            for row, features in zip(batch, encoded, strict=True):
                table = _to_table(row["content_sha256"], features)
                writer = writer or _open_writer(path, table.schema)
                writer.write_table(table)
        assert writer is not None, f"{exams_part_uri}: a row group has rows"
        writer.close()
        storage.write_file(target_uri, path)
        return Written(sum(len(row["frames"]) for row in rows), path.stat().st_size)


def read_features(uri: str, rows: Iterable[tuple[int, str]]) -> Iterator[dict[str, list[bytes]]]:
    """Yield the features of exams as stored: encoder name -> the bytes of each picture.

    Args:
        uri: a file of features.
        rows: place in the row group and `content_sha256` of each exam wanted.

    Raises:
        ValueError: when the file holds another exam at that place.
    """
    with storage.open_read(uri) as file, pq.ParquetFile(file) as table:
        for index, content in rows:
            row = table.read_row_group(index).to_pylist()[0]
            if row.pop("content_sha256") != content:
                raise ValueError(f"{uri}: row {index} belongs to another exam")
            yield row


def unpack(stored: Mapping[str, Sequence[bytes]], num_tokens: int, dtype: str) -> Features:
    """Return stored features as encoder name -> (K, T, F)."""
    return {
        name: np.stack([np.frombuffer(f, dtype=dtype).reshape(num_tokens, -1) for f in frames])
        for name, frames in stored.items()
    }


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        if batch and sum(len(r["frames"]) for r in [*batch, row]) > BATCH_FRAMES:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Least and largest of the features, which nobody asks for, made small ones larger by a quarter.
    return pq.ParquetWriter(
        path, schema, compression="NONE", use_dictionary=False, write_statistics=False
    )


def _to_table(content_sha256: str, features: Features) -> pa.Table:
    columns: dict[str, pa.Array] = {"content_sha256": pa.array([content_sha256])}
    for name, array_KTF in features.items():
        frames = [np.ascontiguousarray(frame).tobytes() for frame in array_KTF]
        columns[name] = pa.array([frames], type=pa.list_(pa.binary()))
    return pa.table(columns)
