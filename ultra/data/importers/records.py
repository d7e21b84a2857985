"""Records out of the files that sets of exams come as: JSON, JSON lines, CSV; one at a time."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, BinaryIO

import ijson
from ijson.common import ObjectBuilder

from ultra import storage
from ultra.config import ConfigError
from ultra.types import Split

MAX_RECORD_BYTES = 16 * 2**20
"""Of one line, or one field of a CSV file."""

MAX_DEPTH = 64
"""Lists and objects around a value."""

TABLES = (".json", ".jsonl", ".csv", ".tsv")

_TOO_DEEP = object()
_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation",
    "validate": "validation", "validation": "validation", "dev": "validation", "test": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a file; `reason` says why it cannot be read, and is empty where it can."""

    place: str
    value: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def read_records(uri: str, encoding: str = "utf-8", items: str = "item") -> Iterator[Record]:
    """Yield the records of a file in order, bad ones with their reason; memory stays flat.

    A file whose JSON breaks off in the middle gives what stands before, and one bad record.

    Args:
        uri: a `.jsonl`, `.json`, `.csv` or `.tsv` file; a byte order mark is no error.
        encoding: of its text; one in which a line feed is a line feed.
        items: where the records of a `.json` file are: `item` for a list, `annotations.item` for a
            list under a key, `*.item` for the lists under every key.

    Raises:
        ConfigError: for another kind of file, or an unknown encoding.
        StorageError: when there is no such file.
    """
    name = uri.rsplit("/", 1)[-1]
    try:
        usable = "\n".encode(encoding) == b"\n"
    except LookupError:
        usable = False
    if not usable:
        raise ConfigError(f"data.encoding: {encoding!r}: utf-8, gb18030 and such are read here")
    if name.endswith(".jsonl"):
        yield from _read_lines(uri, name, encoding)
    elif name.endswith(".json"):
        yield from _read_json(uri, name, encoding, items)
    elif name.endswith((".csv", ".tsv")):
        yield from _read_csv(uri, name, encoding)
    else:
        raise ConfigError(f"data.source_uri: {uri}: one of {', '.join(TABLES)} is read here")


def is_object(uri: str, encoding: str = "utf-8") -> bool:
    """Return whether a `.json` file holds an object, not a list.

    Raises:
        StorageError: when there is no such file.
    """
    with storage.open_read(uri) as file:
        head = file.read(1024).decode(encoding, errors="replace")
    return head.removeprefix("\ufeff").lstrip().startswith("{")


def split_files(uri: str) -> list[str]:
    """Return a file itself, or those files of a folder whose names say which split they hold.

    Raises:
        StorageError: for a folder without any.
    """
    if uri.endswith(TABLES):
        return [uri]
    files = [file for file in storage.list_files(uri) if file.rsplit("/", 1)[0] == uri.rstrip("/")]
    found = [file for file in files if file.endswith(TABLES) and split_in_name(file)]
    if not found:
        raise storage.StorageError(f"{uri}: no file named after a split, such as train.json")
    return found


def split_in_name(uri: str) -> Split | None:
    """Return the split that the name of a file says it holds, e.g. `train_2.csv`."""
    for word in re.split(r"[^a-z]+", uri.rsplit("/", 1)[-1].lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    return None


def parse_line(place: str, line: bytes, encoding: str = "utf-8") -> Record:
    """Return the record of one line of JSON."""
    if len(line) > MAX_RECORD_BYTES:
        return Record(place, reason=f"over the caps: a line of more than {MAX_RECORD_BYTES} bytes")
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        return Record(place, reason=f"malformed line: not {encoding} text")
    try:
        # Python writes NaN where a table had nothing.
        value = json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return Record(place, reason="malformed line: not JSON")
    return _object(place, value)


def _read_lines(uri: str, name: str, encoding: str) -> Iterator[Record]:
    for number, line in enumerate(storage.read_lines(uri, MAX_RECORD_BYTES), start=1):
        if line.strip():
            yield parse_line(f"{name} line {number}", line, encoding)


def _read_json(uri: str, name: str, encoding: str, items: str) -> Iterator[Record]:
    number = 0
    with storage.open_read(uri) as file:
        events = ijson.basic_parse(_Recoded(file, encoding))
        try:
            for number, value in enumerate(_build(events, items.split(".")), start=1):
                yield _object(f"{name} item {number}", value)
        # Python reads no number of 5000 digits, which comes out of ijson as one of the last two.
        except (ijson.JSONError, ValueError, SystemError) as error:
            why = str(error.__cause__ or error).splitlines()[0][:80]  # below, it quotes the file
            place = f"{name} after item {number}"
            yield Record(place, reason=f"malformed file: not JSON from there on: {why}")


def _build(events: Iterable[tuple[str, Any]], wanted: list[str]) -> Iterator[Any]:
    """Yield the values at a path; _TOO_DEEP for one that is nested deeper than MAX_DEPTH.

    ijson's own `items` needs memory with the square of the depth, which a small file can abuse.
    """
    path: list[str] = []  # of the lists and objects that are open: `item`, or the current key
    builder, too_deep = None, False
    for event, value in events:
        if event == "map_key":
            path[-1] = value
        elif event.startswith("end"):
            path.pop()
        elif builder is None and len(path) == len(wanted) and all(map(_fits, wanted, path)):
            builder = ObjectBuilder()
        if event.startswith("start"):
            path.append("" if event == "start_map" else "item")
        if builder is None:
            continue
        too_deep |= len(path) > MAX_DEPTH
        if not too_deep:
            builder.event(event, float(value) if isinstance(value, Decimal) else value)
        if len(path) == len(wanted):
            yield _TOO_DEEP if too_deep else builder.value
            builder, too_deep = None, False


def _fits(wanted: str, name: str) -> bool:
    return wanted in ("*", name)


def _read_csv(uri: str, name: str, encoding: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = (
        # What is no text keeps its bytes as surrogates, so that the row can be told.
        line.decode(encoding, errors="surrogateescape")
        for line in storage.read_lines(uri, MAX_RECORD_BYTES, keep_ends=True)
    )
    reader = csv.DictReader(lines, delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
    while True:
        place = f"{name} line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(place, reason=f"malformed row: {error}")
            continue
        yield _csv_record(f"{name} line {reader.line_num}", row, encoding)


def _csv_record(place: str, row: dict[str | Any, Any], encoding: str) -> Record:
    if None in row or None in row.values():
        return Record(place, reason="malformed row: not as many columns as the header has")
    if any("\udc80" <= mark <= "\udcff" for text in row.values() for mark in text):
        return Record(place, reason=f"malformed row: not {encoding} text")
    return Record(place, {str(key).strip(): value for key, value in row.items()})


def _object(place: str, value: Any) -> Record:
    if value is _TOO_DEEP:
        return Record(place, reason=f"malformed record: nested deeper than {MAX_DEPTH}")
    if not isinstance(value, dict):
        return Record(place, reason="malformed line: not a JSON object")
    return Record(place, value)


class _Recoded:
    """A file of any encoding as UTF-8 without a byte order mark, for a parser that pulls."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._first = True

    def read(self, size: int) -> bytes:
        if size == 0:  # asked to learn whether it gives bytes or text
            return b""
        while True:
            chunk = self._file.read(size)
            text = self._decoder.decode(chunk, final=not chunk)
            if self._first and text:
                text, self._first = text.removeprefix("\ufeff"), False
            if text or not chunk:
                return text.encode()
