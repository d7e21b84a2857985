from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ultra import storage
from ultra.data import parquet
from ultra.data.schema import AUDIT, EXAMS, from_row, to_row
from ultra.types import Conversation, FrameGroup, Turn


def group(number: int, frame_bytes: int = 1000) -> FrameGroup:
    turns = (Turn("user", "这是什么？"), Turn("assistant", "肝囊肿"))
    return FrameGroup(
        exam_id=f"E{number}",
        patient_key="k",
        site="肝脏",
        findings="所见" * 20,
        diagnosis="肝囊肿",
        frames=(bytes([number]) * frame_bytes, b"second"),
        frame_sizes=((3, 4), (5, 6)),
        frame_sources=("a#0", "a#1"),
        valid=None if number % 2 else (True, False),
        conversations=(Conversation("align", "report", turns),),
    )


def write(
    uri: str, groups: list[FrameGroup], position: int = 0, target: int = 2**24
) -> parquet.Part:
    rows = (to_row(g) for g in groups)
    part = parquet.write_part(rows, uri, EXAMS, position=position, row_group_bytes=target)
    assert part is not None
    return part


def test_exams_come_back_equal_and_in_order(tmp_path: Path) -> None:
    uri = str(tmp_path / "exams")
    groups = [group(i) for i in range(5)]
    later, first = write(uri, groups[3:], position=3), write(uri, groups[:3])
    parquet.publish_parts(uri, [later, first])
    assert parquet.read_parts(uri) == [first, later]
    assert [part.position for part in parquet.read_parts(uri)] == [0, 3]
    found = [from_row(row) for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]
    assert found == groups


def test_row_groups_are_flushed_by_bytes(tmp_path: Path) -> None:
    part = write(str(tmp_path), [group(i, 10_000) for i in range(7)], target=25_000)
    metadata = pq.ParquetFile(tmp_path / part.name).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [3, 3, 1]


def test_a_row_group_never_passes_the_cap_unless_one_exam_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_CAP", 30_000)
    groups = [group(0, 10_000), group(1, 25_000), group(2, 40_000), group(3, 100)]
    part = write(str(tmp_path), groups, target=29_000)
    metadata = pq.ParquetFile(tmp_path / part.name).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [1, 1, 1, 1]


def test_frames_are_stored_as_they_are_and_text_is_compressed(tmp_path: Path) -> None:
    part = write(str(tmp_path), [group(1), group(2)])
    columns = pq.ParquetFile(tmp_path / part.name).metadata.row_group(0)
    kinds = {
        columns.column(i).path_in_schema: columns.column(i).compression
        for i in range(columns.num_columns)
    }
    assert kinds.pop("frames.list.element") == "UNCOMPRESSED"
    assert set(kinds.values()) == {"ZSTD"}
    assert "conversations.list.element.turns.list.element.content" in kinds


def test_the_name_of_a_part_follows_from_its_content(tmp_path: Path) -> None:
    uri = str(tmp_path)
    once, again = write(uri, [group(1)], position=9), write(uri, [group(1)], position=9)
    assert once == again
    assert once.name.startswith("part-00000009-")
    assert write(uri, [group(2)], position=9) != once
    assert len(storage.list_files(uri, ".parquet")) == 2


def test_a_table_is_replaced_only_when_the_new_one_is_published(tmp_path: Path) -> None:
    uri = str(tmp_path)
    old = write(uri, [group(1)])
    parquet.publish_parts(uri, [old])
    (tmp_path / "part-of-something-else.parquet").write_bytes(b"not ours")
    new = write(uri, [group(2)])
    assert parquet.read_parts(uri) == [old]
    assert [row["exam_id"] for row in parquet.read_rows(parquet.part_uri(uri, old))] == ["E1"]
    parquet.publish_parts(uri, [new])
    assert parquet.read_parts(uri) == [new]
    left = {Path(file).name for file in storage.list_files(uri, ".parquet")}
    assert left == {new.name, "part-of-something-else.parquet"}


def test_the_digest_of_a_table_is_of_its_content_wherever_it_is(tmp_path: Path) -> None:
    def digest(folder: str, *numbers: int) -> str:
        uri = str(tmp_path / folder)
        parquet.publish_parts(uri, [write(uri, [group(number) for number in numbers])])
        return parquet.digest_table(uri)

    first = digest("a", 1, 2)
    assert digest("b", 1, 2) == first
    assert len({first, digest("a", 2, 1), digest("a", 1), digest("a", 1, 3)}) == 4
    assert len(first) == 32


def test_no_rows_are_no_part_and_an_empty_table_is_a_table(tmp_path: Path) -> None:
    uri = str(tmp_path / "audit")
    assert parquet.write_part([], uri, AUDIT, position=0, row_group_bytes=100) is None
    with pytest.raises(storage.StorageError, match="no complete table here") as refused:
        parquet.read_parts(uri)
    assert "\n" not in str(refused.value)
    assert not parquet.is_table(uri)
    parquet.publish_parts(uri, [])
    assert parquet.is_table(uri)
    assert parquet.read_parts(uri) == []


def test_a_row_that_is_not_of_the_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pa.ArrowInvalid):
        parquet.write_part(
            [{"exam_id": b"\xff"}], str(tmp_path), AUDIT, position=0, row_group_bytes=100
        )
    assert storage.list_files(str(tmp_path)) == []


def test_parts_live_on_an_object_store(s3_bucket: str) -> None:
    uri = f"{s3_bucket}/parquet/exams"
    old = write(uri, [group(1)])
    parquet.publish_parts(uri, [old])
    new = write(uri, [group(2), group(3)])
    parquet.publish_parts(uri, [new])
    rows = [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]
    assert [from_row(row) for row in rows] == [group(2), group(3)]
    assert storage.list_files(uri, ".parquet") == [parquet.part_uri(uri, new)]
