"""Records out of the files that sets of exams come as: JSON, JSON lines, CSV; one at a time."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import ijson

from ultra import storage
from ultra.config import ConfigError

MAX_RECORD_BYTES = 16 * 2**20
"""Of one line, or one field of a CSV file."""

TABLES = (".json", ".jsonl", ".csv", ".tsv")


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
        items: where the records of a `.json` file are, as ijson has it: `item` for a list,
            `annotations.item` for a list under a key.

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


def parse_line(place: str, line: bytes, encoding: str = "utf-8") -> Record:
    """Return the record of one line of JSON."""
    if len(line) > MAX_RECORD_BYTES:
        return Record(place, reason=f"over the caps: a line of more than {MAX_RECORD_BYTES} bytes")
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError:
        return Record(place, reason=f"malformed line: not {encoding} text")
    try:
        value = json.loads(text)
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
        found = ijson.items(_Recoded(file, encoding), items, use_float=True)
        try:
            for number, value in enumerate(found, start=1):
                yield _object(f"{name} item {number}", value)
        except (ijson.JSONError, UnicodeError, RecursionError) as error:
            why = re.sub(r"\s+", " ", str(error))[:80]
            place = f"{name} after item {number}"
            yield Record(place, reason=f"malformed file: not JSON from there on: {why}")


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
