from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_folders import picture
from tests.data.exam_tables import make_exam, write_exams
from tests.data.importers.importing import config_of, read_tables
from ultra import storage
from ultra.config import DataConfig
from ultra.data.export import ExportCounts
from ultra.data.frames import decode_frame, is_jpeg
from ultra.data.on_ray import export, prepare
from ultra.types import Conversation, FrameGroup, Turn

pytestmark = pytest.mark.usefixtures("ray_cluster")

SYSTEM = (Turn("system", "S"), Turn("user", "问？"), Turn("assistant", "答。"))
ROUNDS = (
    Turn("user", "Where?"), Turn("assistant", "Liver."), Turn("user", "What?"),
    Turn("assistant", "A cyst."),
)  # fmt: skip


def exam(number: int, *turns: tuple[Turn, ...], frames: int = 1, **changes: Any) -> FrameGroup:
    kind = "JPEG" if number % 2 else "PNG"
    pictures = tuple(picture(10 * number + i, kind) for i in range(frames))
    conversations = tuple(Conversation("instruct", "conversation", t) for t in turns)
    return replace(
        make_exam(number, frames=pictures),
        conversations=conversations,
        frame_sizes=((48, 32),) * frames,
        findings="",
        **changes,
    )


EXAMS = [
    exam(1, ROUNDS[:2]),
    exam(2, ROUNDS, frames=3, split="test", exam_id="名/..: 2"),
    exam(3),
    exam(4, ROUNDS[:2], SYSTEM, frames=2, modality="CT"),
    replace(exam(5, SYSTEM), conversations=(Conversation("align", "t", SYSTEM),)),
]


def export_at(root: str, folder: Path, format: str, groups: list[FrameGroup]) -> Any:
    write_exams(folder / "exams", [part for part in (groups[:2], groups[2:]) if part])
    config = DataConfig.model_validate(
        {
            "exams_uri": str(folder / "exams"),
            "export_uri": f"{root}/export",
            "export_format": format,
        }
    )
    return export(config)


def rows(root: str, name: str) -> Any:
    text = storage.read_bytes(f"{root}/export/{name}").decode()
    return json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))


def test_rows_as_llava_reads_them(tmp_path: Path) -> None:
    root = str(tmp_path)
    counts, files = export_at(root, tmp_path, "llava", EXAMS)
    assert counts == ExportCounts(exams=4, conversations=5, frames=7, without_conversations=1)
    assert files == [
        f"{root}/export/{name}.json" for name in ("align_train", "instruct_train", "instruct_test")
    ]
    first, second, third = rows(root, "instruct_train.json")
    assert first["conversations"] == [
        {"from": "human", "value": "<image>\nWhere?"},
        {"from": "gpt", "value": "Liver."},
    ]
    assert isinstance(first["image"], str)
    assert (first["patient_id"], first["split"]) == ("patient-1", "train")
    assert storage.read_bytes(f"{root}/export/{first['image']}") == EXAMS[0].frames[0]
    assert [row["id"] for row in (first, second, third)] == ["exam-1", "exam-4-1", "exam-4-2"]
    assert second["image"] == third["image"]
    assert third["conversations"][0]["value"] == "<image>\n<image>\nS\n问？"
    (test,) = rows(root, "instruct_test.json")
    assert [turn["from"] for turn in test["conversations"]] == ["human", "gpt"] * 2
    assert len(test["image"]) == 3
    assert not any("名" in file for file in storage.list_files(f"{root}/export"))
    assert len(storage.list_files(f"{root}/export")) == 7 + 3


def test_messages_on_an_object_store(s3_bucket: str, tmp_path: Path) -> None:
    root = f"{s3_bucket}/messages"
    counts, files = export_at(root, tmp_path, "messages", EXAMS)
    assert (counts.exams, counts.conversations) == (4, 5)
    assert [file.rsplit("/", 1)[-1] for file in files] == [
        "align_train.jsonl",
        "instruct_train.jsonl",
        "instruct_test.jsonl",
    ]
    (test,) = rows(root, "instruct_test.jsonl")
    assert test["messages"][0] == {"role": "user", "content": "<image><image><image>Where?"}
    assert [storage.read_bytes(f"{root}/export/{path}") for path in test["images"]] == list(
        EXAMS[1].frames
    )
    (aligned,) = rows(root, "align_train.jsonl")
    assert [m["content"] for m in aligned["messages"]] == ["S", "<image>问？", "答。"]


@pytest.mark.parametrize("format", ["llava", "messages"])
def test_what_is_exported_comes_in_again_the_same(tmp_path: Path, format: str) -> None:
    """Pixels of PNG come back as they were; JPEG is encoded once more and stays within 2 levels."""
    groups = [
        exam(1, ROUNDS[:2], split="validation"),
        exam(2, ROUNDS, frames=3, split="test"),
        exam(4, ROUNDS[:2], frames=2, modality="CT"),
        exam(5, SYSTEM[1:], frames=2),
    ]
    _, files = export_at(str(tmp_path), tmp_path, format, groups)
    found: dict[str, FrameGroup] = {}
    for file in files:
        config = config_of(tmp_path / Path(file).stem, format, source_uri=file)
        found |= read_tables(config, prepare(config)).exams
    assert len(found) == len(groups)
    for group in groups:
        again = found[group.exam_id]
        assert (again.split, again.modality) == (group.split, group.modality)
        assert [c.turns for c in again.conversations] == [c.turns for c in group.conversations]
        assert again.frame_sizes == group.frame_sizes
        for before, after in zip(group.frames, again.frames, strict=True):
            pixels = [
                decode_frame(f, max_bytes=10**6, max_pixels=10**6).astype(int)
                for f in (before, after)
            ]
            limit = 2 if is_jpeg(before) else 0
            assert abs(pixels[0] - pixels[1]).max() <= limit


def test_a_second_export_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    root = str(tmp_path)
    export_at(root, tmp_path, "llava", EXAMS)
    _, files = export_at(root, tmp_path, "llava", EXAMS[:1])
    assert files == [f"{root}/export/instruct_train.json"]
    assert len(rows(root, "instruct_train.json")) == 1
    assert storage.list_files(f"{root}/export", ".json") == files


def test_an_export_needs_exams(tmp_path: Path) -> None:
    config = DataConfig(exams_uri=f"{tmp_path}/no", export_uri=f"{tmp_path}/export")
    with pytest.raises(storage.StorageError, match="no complete table here"):
        export(config)
    assert not storage.exists(f"{tmp_path}/export")
