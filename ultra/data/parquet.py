"""Tables of exams as Parquet parts, published whole.

A table is a folder of `part-*.parquet` files and `_parts.json`, which names them in order. Parts
are named by their content and written first, `_parts.json` last: a reader sees the old table or
the new one, and a task that runs twice writes the same part once.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ultra import storage

ROW_GROUP_CAP = 64 * 2**20
"""Bytes of a row group, unless a single exam is larger."""

_MANIFEST = "_parts.json"
_PART_NAME = re.compile(r"part-\d{8}-[0-9a-f]{12}\.parquet")
_UNCOMPRESSED = "frames.list.element"
_DICTIONARY = ("site", "modality", "split")


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a table."""

    name: str
    num_rows: int

    @property
    def position(self) -> int:
        """Place of its first row in the table."""
        return int(self.name.split("-")[1])


def write_part(
    rows: Iterable[Mapping[str, Any]],
    uri: str,
    schema: pa.Schema,
    *,
    position: int,
    row_group_bytes: int,
) -> Part | None:
    """Write rows as one part of a table; None, and no file, where there are no rows.

    Rows are held only until a row group has `row_group_bytes`, so `rows` may be a generator. Text
    is compressed, `frames` are not: they are compressed images.

    Args:
        rows: values of `schema`.
        uri: the table's address.
        schema: of the table.
        position: place of the first row in the table; parts sort by it.
        row_group_bytes: target size of a row group.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        num_rows = 0
        with _open_writer(path, schema) as writer:
            for group in _row_groups(rows, row_group_bytes):
                table = pa.Table.from_pylist(group, schema=schema)
                writer.write_table(table, row_group_size=len(group))
                num_rows += len(group)
        if not num_rows:
            return None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        part = Part(f"part-{position:08d}-{digest[:12]}.parquet", num_rows)
        storage.write_file(part_uri(uri, part), path)
    return part


def publish_parts(uri: str, parts: Sequence[Part]) -> None:
    """Make `parts` the table at an address, and remove the parts of the table that was there."""
    ordered = sorted(parts, key=lambda part: part.name)
    manifest = {"format": 1, "parts": [{"name": p.name, "rows": p.num_rows} for p in ordered]}
    storage.write_bytes(storage.join(uri, _MANIFEST), json.dumps(manifest, indent=1).encode())
    current = {part.name for part in parts}
    for file in storage.list_files(uri, ".parquet"):
        name = file.rsplit("/", 1)[-1]
        if _PART_NAME.fullmatch(name) and name not in current:
            storage.delete(file)


def read_parts(uri: str) -> list[Part]:
    """Return the parts of a table in order.

    Raises:
        StorageError: when there is no complete table at the address.
    """
    try:
        raw = json.loads(storage.read_bytes(storage.join(uri, _MANIFEST)))
    except storage.StorageError:
        raise storage.StorageError(f"{uri}: no complete table here; run the job before") from None
    return [Part(item["name"], item["rows"]) for item in raw["parts"]]


def digest_table(uri: str) -> str:
    """Return 32 hexadecimal digits that stand for a table's content; no row is read.

    Raises:
        StorageError: as `read_parts`.
    """
    names = "\n".join(part.name for part in read_parts(uri))  # each holds its content's digest
    return hashlib.sha256(names.encode()).hexdigest()[:32]


def is_table(uri: str) -> bool:
    """Return whether a complete table stands at an address."""
    return storage.exists(storage.join(uri, _MANIFEST))


def part_uri(uri: str, part: Part) -> str:
    """Return the address of a part of the table at `uri`."""
    return storage.join(uri, part.name)


def part_uris(uri: str) -> list[str]:
    """Return the addresses of a table's parts in order.

    Raises:
        StorageError: as `read_parts`.
    """
    return [part_uri(uri, part) for part in read_parts(uri)]


def read_rows(part_uri: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one part, a row group at a time.

    Raises:
        StorageError: when there is no such part.
    """
    with storage.open_read(part_uri) as file, pq.ParquetFile(file) as parquet:
        for index in range(parquet.num_row_groups):
            yield from parquet.read_row_group(index, columns=columns).to_pylist()


def read_row_group(
    part_uri: str, index: int, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one row group of a part."""
    with storage.open_read(part_uri) as file, pq.ParquetFile(file) as parquet:
        rows: list[dict[str, Any]] = parquet.read_row_group(index, columns=columns).to_pylist()
    return rows


def read_column(part_uri: str, name: str) -> list[Any]:
    """Return the values of one column of a part, in order."""
    with storage.open_read(part_uri) as file:
        values: list[Any] = pq.read_table(file, columns=[name])[name].to_pylist()
    return values


def read_column_groups(part_uri: str, name: str) -> list[list[Any]]:
    """Return the values of one column of a part, row group by row group."""
    with storage.open_read(part_uri) as file, pq.ParquetFile(file) as parquet:
        groups = range(parquet.num_row_groups)
        return [parquet.read_row_group(i, columns=[name])[name].to_pylist() for i in groups]


def _row_groups(
    rows: Iterable[Mapping[str, Any]], target: int
) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        row_size = 512 + sum(len(frame) for frame in row.get("frames", ()))
        if group and size + row_size > ROW_GROUP_CAP:
            yield group
            group, size = [], 0
        group.append(row)
        size += row_size
        if size >= target:
            yield group
            group, size = [], 0
    if group:
        yield group


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    return pq.ParquetWriter(
        path,
        schema,
        compression={leaf: "NONE" if leaf == _UNCOMPRESSED else "ZSTD" for leaf in leaves},
        use_dictionary=[name for name in _DICTIONARY if name in schema.names],
        write_statistics=[leaf for leaf in leaves if leaf != _UNCOMPRESSED],
    )


def _leaves(path: str, kind: pa.DataType) -> Iterator[str]:
    """Yield the Parquet paths of the values under a column."""
    if pa.types.is_list(kind):
        yield from _leaves(f"{path}.list.element", kind.value_type)
    elif pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{path}.{field.name}", field.type)
    else:
        yield path
