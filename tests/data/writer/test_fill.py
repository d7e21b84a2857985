from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.exam_tables import write_exams
from ultra.config import DataConfig, InstructionsConfig
from ultra.data import parquet
from ultra.data.schema import from_row
from ultra.data.writer.drafts import MARK
from ultra.data.writer.fill import Filled, fill_part, sheet_uri
from ultra.data.writer.orders import place_order
from ultra.data.writer.review import Decision
from ultra.types import Conversation, FrameGroup, Turn

CYST = FrameGroup(
    "e-1", "p", "肝脏", "肝右叶见一无回声区，大小约12mm，边界清晰。", "肝右叶囊肿。",
    (b"frame",), ((8, 6),), ("1",),
)  # fmt: skip
IMPORTED = Conversation(
    "instruct",
    "vqa",
    (Turn("user", "Where is the stone?"), Turn("assistant", "In the left kidney.")),
    language="en",
    question_id="slake-7",
)


def table(tmp_path: Path, *groups: FrameGroup) -> DataConfig:
    data = DataConfig(exams_uri=str(tmp_path / "exams"))
    write_exams(tmp_path / "exams", [list(groups)])
    return data


def config_at(tmp_path: Path, **changes: Any) -> InstructionsConfig:
    given = {
        "base_url": "http://127.0.0.1:1/v1",
        "model": "m",
        "replies_uri": str(tmp_path / "instructions"),
        "rejected_uri": str(tmp_path / "rejected"),
        **changes,
    }
    return InstructionsConfig(**given)


def fill(
    data: DataConfig, config: InstructionsConfig, decisions: dict[str, Decision] | None = None
) -> Filled:
    """Fill the one part of a table and publish what came of it."""
    (part,) = parquet.read_parts(data.exams_uri)
    filled = fill_part(part, data, config, decisions or {})
    parquet.publish_parts(data.exams_uri, [filled.exams])
    parquet.publish_parts(config.rejected_uri, [filled.rejected] if filled.rejected else [])
    parquet.publish_parts(sheet_uri(config), [filled.sheet] if filled.sheet else [])
    return filled


def rows(uri: str) -> list[dict[str, Any]]:
    return [row for part in parquet.part_uris(uri) for row in parquet.read_rows(part)]


def exams(data: DataConfig) -> list[FrameGroup]:
    return [from_row(row) for row in rows(data.exams_uri)]


def keep_reply(
    config: InstructionsConfig, group: FrameGroup, content: str, reason: str = "stop"
) -> None:
    order = place_order(group, config, True)
    assert order is not None
    kept = Path(config.replies_uri) / "replies" / f"{order.digest}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"content": content, "finish_reason": reason, "cost": 0.0}))


def written(*conversations: tuple[str, str, str]) -> str:
    items = [{"task": t, "turns": [{"question": q, "answer": a}]} for t, q, a in conversations]
    return json.dumps({"conversations": items})


def test_rules_write_both_stages_into_the_same_rows_and_again_the_same(tmp_path: Path) -> None:
    data, config = table(tmp_path, CYST), config_at(tmp_path)
    first = fill(data, config)
    (exam,) = exams(data)
    assert exam.frames == CYST.frames
    assert {c.stage for c in exam.conversations} == {"align", "instruct"}
    assert all(c.question_id.startswith(MARK) for c in exam.conversations)
    assert len({c.question_id for c in exam.conversations}) == len(exam.conversations)
    assert first.counts.conversations == len(exam.conversations)
    assert first.rejected is None
    assert fill(data, config).exams == first.exams  # what was written before is not "imported"


def test_what_came_with_a_set_stays(tmp_path: Path) -> None:
    with_report = replace(CYST, conversations=(IMPORTED,))
    without = replace(with_report, exam_id="e-2", findings="", diagnosis="")
    english = replace(with_report, exam_id="e-3", findings="A cyst.", diagnosis="Cyst.")
    data = table(tmp_path, with_report, without, english)
    for _ in range(2):
        counts = fill(data, config_at(tmp_path)).counts
        found = exams(data)
        assert all(exam.conversations[0] == IMPORTED for exam in found)
        assert [len(exam.conversations) for exam in found[1:]] == [1, 1]
        assert counts.imported == 3
        assert counts.conversations == len(found[0].conversations) - 1 > 5


def test_questions_tell_the_site_where_the_configuration_says_so(tmp_path: Path) -> None:
    told = {}
    for cue in (True, False):
        data = table(tmp_path, CYST).model_copy(update={"site_cue": cue})
        fill(data, config_at(tmp_path))
        asked = [c.turns[0].content for exam in exams(data) for c in exam.conversations]
        told[cue] = sum(question.startswith("检查部位") for question in asked)
    assert told[True] > 0 == told[False]


def test_an_endpoint_writes_the_second_stage_and_what_is_false_is_kept_apart(
    tmp_path: Path,
) -> None:
    config = config_at(tmp_path, writer="endpoint")
    data = table(tmp_path, CYST, replace(CYST, exam_id="e-2", findings="肝左叶见囊肿。"))
    reply = json.loads(written(
        ("kind", "肝脏里的病变是什么？", "考虑囊肿。"),
        ("size", "它多大？", "约21mm。"),
        ("side", "在哪一侧？", "左叶。"),
        ("other", "有结石吗？", "未见结石。"),
        ("site", "肝脏图像是哪个部位？", "肝脏"),
    ))  # fmt: skip
    reply["conversations"].append({"task": "size"})
    keep_reply(config, CYST, json.dumps(reply))
    filled = fill(data, config)
    first, second = exams(data)
    instruct = [c for c in first.conversations if c.stage == "instruct"]
    assert [(c.task, c.turns[1].content) for c in instruct] == [("kind", "考虑囊肿。")]
    assert {c.task for c in first.conversations if c.stage == "align"} == {"findings", "report"}
    assert {c.stage for c in second.conversations} == {"align"}  # its reply is not there
    assert filled.counts.unwritten == 1
    found = rows(config.rejected_uri)
    assert [(r["exam_id"], r["task"], r["reason"]) for r in found] == [
        ("e-1", "size", "number: 21mm"),
        ("e-1", "side", "side: 左"),
        ("e-1", "other", "lesion: 结石"),
        ("e-1", "site", "site told: in a question"),
        ("e-1", "", "malformed reply: turns: Field required"),
    ]
    assert found[0]["turns"] == [
        {"role": "user", "content": "它多大？"}, {"role": "assistant", "content": "约21mm。"},
    ]  # fmt: skip
    assert json.loads(found[-1]["reply"]) == reply
    assert filled.counts.rejected == Counter(
        ["number", "side", "lesion", "site told", "malformed reply"]
    )


@pytest.mark.parametrize(
    ("content", "reason", "expected"),
    [
        ("{", "stop", "malformed reply: Invalid JSON"),
        ("", "no choices", "malformed reply: Invalid JSON"),
        (written(("kind", "是什么？", "囊肿")), "length", "malformed reply: cut at 2048 tokens"),
    ],
)
def test_a_reply_that_cannot_be_read_is_kept_with_its_reason(
    tmp_path: Path, content: str, reason: str, expected: str
) -> None:
    data, config = table(tmp_path, CYST), config_at(tmp_path, writer="endpoint")
    keep_reply(config, CYST, content, reason)
    fill(data, config)
    (row,) = rows(config.rejected_uri)
    assert row["reason"].startswith(expected)
    assert (row["turns"], row["reply"]) == ([], content)


def test_english_is_translated_beside_what_it_was_and_checked(tmp_path: Path) -> None:
    config = config_at(tmp_path, writer="translate")
    two = replace(IMPORTED, turns=(Turn("user", "Size?"), Turn("assistant", "A 12 mm stone.")))
    group = replace(CYST, findings="No stone.", diagnosis="", conversations=(IMPORTED, two))
    texts = ["结石在哪里？", "在右肾。", "大小？", "结石约12毫米。", "未见结石。"]
    keep_reply(config, group, json.dumps({"texts": texts}))
    data = table(tmp_path, group)
    for _ in range(2):
        counts = fill(data, config).counts
        (exam,) = exams(data)
        assert exam.conversations[:2] == (IMPORTED, two)
        new = exam.conversations[2:]
        assert [(c.language, c.stage, c.turns[1].content) for c in new] == [
            ("zh", "instruct", "结石约12毫米。"),
            ("zh", "align", "未见结石。"),
        ]
        assert counts.rejected == {"side": 1}
        assert [r["reason"] for r in rows(config.rejected_uri)] == ["side: 右、左"]


def test_an_expert_s_decision_counts_before_the_check(tmp_path: Path) -> None:
    config = config_at(
        tmp_path, writer="endpoint", review_uri=str(tmp_path / "sheet.csv"), review_share=1
    )
    data = table(tmp_path, CYST)
    answers = [("kind", "是什么？", "囊肿"), ("size", "多大？", "21mm"), ("side", "哪侧？", "右叶")]
    keep_reply(config, CYST, written(*answers))
    fill(data, config)
    sheet = {row["task"]: row for row in rows(sheet_uri(config))}
    assert sheet["size"]["check"] == "number: 21mm"
    assert sheet["kind"]["source"] == f"肝脏\n{CYST.findings}\n{CYST.diagnosis}"
    digests = {task: row["digest"] for task, row in sheet.items()}
    decisions = {
        digests["kind"]: Decision("edit", {1: "肝囊肿"}),
        digests["size"]: Decision("accept"),
        digests["side"]: Decision("discard"),
        digests["report"]: Decision("accept"),
    }
    for _ in range(2):
        counts = fill(data, config, decisions).counts
        (exam,) = exams(data)
        assert {
            c.task: c.turns[1].content for c in exam.conversations if c.stage == "instruct"
        } == {
            "kind": "肝囊肿",
            "size": "21mm",
        }
        assert counts.reviewed == {"accept": 2, "edit": 1, "discard": 1}
        assert counts.rejected == {}
        assert {row["digest"] for row in rows(sheet_uri(config))} == set(digests.values())
