"""The feature cache: what the frozen encoders see in each frame, computed once.

Each part of the exams table has one file of features under `features_uri/KEY/`. KEY names the
encoders, their weights, sizes, pooling and type; the file's name is the digest of the frames it
describes, in their order. So nothing stale is ever read: other frames or other encoders look for
another file, and new conversations about the same frames find the old one. Row i of the file
belongs to row i of the part, and is a row group of its own, so that exams can be read one by one.

Shapes: K frames of a group or the one picture composed of them, T visual tokens of a picture, F
channels of an encoder.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ultra import storage
from ultra.data import parquet

Features = Mapping[str, NDArray[Any]]
Encode = Callable[[Sequence[bytes]], Features]
"""Frames of a group -> encoder name -> (K, T, F)."""


def features_uri(exams_part_uri: str, folder_uri: str) -> str:
    """Return where the features of a part of the exams table are, written or not."""
    column = parquet.read_column(exams_part_uri, "content_sha256")
    digest = hashlib.sha256("\n".join(column).encode()).hexdigest()
    return storage.join(folder_uri, f"{digest[:32]}.parquet")


def write_features(exams_part_uri: str, target_uri: str, encode: Encode) -> int:
    """Encode the frames of a part of the exams table and return how many there were.

    The file appears whole, when it is done.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.parquet"
        writer: pq.ParquetWriter | None = None
        num_frames = 0
        for row in parquet.read_rows(exams_part_uri, ["content_sha256", "frames"]):
            features = encode(row["frames"])
            table = _to_table(row["content_sha256"], features)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="NONE")
            writer.write_table(table)
            num_frames += len(row["frames"])
        if writer is not None:
            writer.close()
            storage.write_file(target_uri, path)
    return num_frames


def read_features(uri: str, rows: Iterable[tuple[int, str]]) -> Iterator[dict[str, list[bytes]]]:
    """Yield the features of exams as stored: encoder name -> the bytes of each picture.

    Args:
        uri: a file of features.
        rows: place in the file and `content_sha256` of each exam wanted.

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


def _to_table(content_sha256: str, features: Features) -> pa.Table:
    columns: dict[str, pa.Array] = {"content_sha256": pa.array([content_sha256])}
    for name, array_KTF in features.items():
        frames = [np.ascontiguousarray(frame).tobytes() for frame in array_KTF]
        columns[name] = pa.array([frames], type=pa.list_(pa.binary()))
    return pa.table(columns)
