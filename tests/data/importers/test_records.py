from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from ultra import storage
from ultra.config import ConfigError
from ultra.data.importers import records
from ultra.data.importers.records import Record, read_records


def read(folder: Path, name: str, data: bytes, **options: str) -> list[Record]:
    storage.write_bytes(f"{folder}/{name}", data)
    return list(read_records(f"{folder}/{name}", **options))


ROWS = [{"id": "一", "n": 1.5}, {"id": "二", "n": [None, {"x": True}]}]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lists_and_lines_of_json_give_the_same_values(tmp_path: Path, mark: bytes) -> None:
    listed = read(tmp_path, "a.json", mark + json.dumps(ROWS, ensure_ascii=False).encode())
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    lined = read(tmp_path, "a.jsonl", mark + lines.encode())
    assert [record.value for record in listed] == [record.value for record in lined] == ROWS
    assert [record.place for record in listed] == ["a.json item 1", "a.json item 2"]
    assert [record.place for record in lined] == ["a.jsonl line 1", "a.jsonl line 3"]


def test_a_list_under_a_key(tmp_path: Path) -> None:
    data = json.dumps({"version": [1], "annotations": ROWS}).encode()
    found = read(tmp_path, "a.json", data, items="annotations.item")
    assert [record.value for record in found] == ROWS


def test_a_table_with_a_line_feed_in_a_field(tmp_path: Path) -> None:
    data = '\ufeffid, text\n一,"a\nb, ""c"""\n二,d\n'.encode()
    found = read(tmp_path, "a.csv", data)
    assert [r.value for r in found] == [
        {"id": "一", "text": 'a\nb, "c"'},
        {"id": "二", "text": "d"},
    ]
    assert [r.place for r in found] == ["a.csv line 3", "a.csv line 4"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_another_encoding(tmp_path: Path, name: str) -> None:
    text = {"a.json": '[{"id": "肝脏"}]', "a.jsonl": '{"id": "肝脏"}', "a.csv": "id\n肝脏\n"}[name]
    (good,) = read(tmp_path, name, text.encode("gb18030"), encoding="gb18030")
    assert good.value == {"id": "肝脏"}
    (bad,) = read(tmp_path, name, text.encode("gb18030"))
    assert bad.reason.startswith("malformed")


@pytest.mark.parametrize("encoding", ["utf-16", "klingon"])
def test_an_encoding_without_plain_line_feeds_is_refused(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.encoding"):
        read(tmp_path, "a.json", b"[]", encoding=encoding)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.xls: one of \.json, "):
        read(tmp_path, "a.xls", b"")


def test_what_stands_before_a_break_is_kept(tmp_path: Path) -> None:
    found = read(tmp_path, "a.json", json.dumps(ROWS).encode()[:-8])
    assert found[0].value == ROWS[0]
    assert found[-1].place == "a.json after item 1"
    assert found[-1].reason.startswith("malformed file: not JSON from there on")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b'{"a": "\xff"}', "malformed line: not utf-8 text"),
        ("a.jsonl", b"[" * 99_999, "malformed line: not JSON"),
        ("a.jsonl", b"7", "malformed line: not a JSON object"),
        ("a.json", b"[7]", "malformed line: not a JSON object"),
        ("a.csv", b"a,b\n1\n", "malformed row: not as many columns"),
        ("a.csv", b"a,b\n1,2,3\n", "malformed row: not as many columns"),
        ("a.csv", b'a,b\n1,"2\n', "malformed row: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", "malformed row: not utf-8 text"),
    ],
)
def test_a_bad_record_says_why(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (record,) = read(tmp_path, name, data)
    assert record.reason.startswith(reason)


def test_a_line_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 100)
    first, second = read(tmp_path, "a.jsonl", b'"' + b"x" * 5000 + b'"\n{"a": 1}')
    assert first.reason == "over the caps: a line of more than 100 bytes"
    assert second.value == {"a": 1}


def test_lists_under_every_key(tmp_path: Path) -> None:
    data = json.dumps({"train": ROWS[:1], "about": {"x": [1]}, "test": ROWS[1:]}).encode()
    found = read(tmp_path, "a.json", data, items="*.item")
    assert [record.value for record in found] == ROWS
    assert records.is_object(f"{tmp_path}/a.json")
    read(tmp_path, "b.json", b"\xef\xbb\xbf [7]")
    assert not records.is_object(f"{tmp_path}/b.json")


@pytest.mark.parametrize("depth", [63, 64, 100_000])
def test_what_is_nested_too_deep_is_one_bad_record(tmp_path: Path, depth: int) -> None:
    data = b'[{"id": ' + b"[" * depth + b"]" * depth + b'}, {"id": "after"}]'
    first, after = read(tmp_path, "a.json", data)
    # The list of records and the record itself are two more.
    assert first.reason == ("malformed record: nested deeper than 64" if depth > 62 else "")
    assert after.value == {"id": "after"}


def test_numbers_of_any_size(tmp_path: Path) -> None:
    (whole, part, huge, after) = read(
        tmp_path, "a.json", b'[{"n": 123456789012345678901}, {"n": 0.25}, {"n": 1e999}, {"n": 1}]'
    )
    assert whole.value == {"n": 123456789012345678901}
    assert part.value == {"n": 0.25}
    assert huge.value == {"n": float("inf")}
    assert after.value == {"n": 1}
    (refused,) = read(tmp_path, "a.json", b'[{"n": ' + b"9" * 5000 + b"}]")
    assert refused.reason.startswith("malformed file: not JSON from there on: Exceeds the limit")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_memory_is_that_of_a_record(tmp_path: Path, name: str) -> None:
    rows = [json.dumps({"id": i, "text": "x" * 2000}) for i in range(5000)]
    body = {
        "a.json": f"[{','.join(rows)}]",
        "a.jsonl": "\n".join(rows),
        "a.csv": "id,text\n" + "\n".join(f"{i},{'x' * 2000}" for i in range(5000)),
    }[name]
    storage.write_bytes(f"{tmp_path}/{name}", body.encode())
    tracemalloc.start()
    count = sum(1 for _ in read_records(f"{tmp_path}/{name}"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 5000
    assert peak < 5 * 2**20 < len(body)  # a chunk of 1 MiB, some of it twice


def test_python_s_nan_in_a_line_is_nothing(tmp_path: Path) -> None:
    (found,) = read(tmp_path, "a.jsonl", b'{"a": NaN, "b": -Infinity}')
    assert found.value == {"a": None, "b": None}


def test_a_bad_file_s_reason_quotes_nothing_of_it(tmp_path: Path) -> None:
    (bad,) = read(tmp_path, "a.json", '[{"name": "张建国" "id": 7}]'.encode())
    assert bad.reason.startswith("malformed file: not JSON from there on: parse error")
    assert "张建国" not in bad.reason


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("s3://b/train/set.json", None),
        ("train_2.csv", "train"),
        ("validate.json", "validation"),
        ("openi-VAL.json", "validation"),
        ("slake_test.json", "test"),
        ("contest.json", None),
    ],
)
def test_a_file_s_name_says_its_split(name: str, split: str | None) -> None:
    assert records.split_in_name(name) == split


def test_the_files_of_a_folder_that_are_named_after_splits(tmp_path: Path) -> None:
    for name in ("train.json", "test.json", "notes.json", "test.txt", "sub/train.json"):
        storage.write_bytes(f"{tmp_path}/{name}", b"[]")
    assert records.split_files(f"{tmp_path}/") == [
        f"{tmp_path}/test.json",
        f"{tmp_path}/train.json",
    ]
    assert records.split_files("any/notes.json") == ["any/notes.json"]
