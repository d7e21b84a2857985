from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ultra.config import InstructionsConfig
from ultra.data.instructions import questions
from ultra.data.writer.orders import (
    Order,
    english_sources,
    is_chinese,
    is_english,
    place_order,
    read_translated,
    read_written,
)
from ultra.types import Conversation, FrameGroup, Turn

CYST = FrameGroup("e", "p", "肝脏", "肝右叶见一无回声区。", "肝右叶囊肿。", (), (), ())
ENGLISH = Conversation(
    "instruct",
    "vqa",
    (
        Turn("user", "Where is the stone?", has_frames=True),
        Turn("assistant", "In the left kidney."),
        Turn("user", "多大？"),
        Turn("assistant", "12"),
    ),
    language="en",
    closed=False,
    question_id="q1",
)


def config(**changes: Any) -> InstructionsConfig:
    given = {"writer": "endpoint", "base_url": "http://127.0.0.1:1/v1", "model": "m", **changes}
    return InstructionsConfig(**given)


def order(group: FrameGroup, site_cue: bool = True, **changes: Any) -> Order:
    found = place_order(group, config(**changes), site_cue)
    assert found is not None
    return found


def test_an_order_tells_the_report_and_the_version() -> None:
    told, untold = order(CYST), order(CYST, site_cue=False)
    system, user = (message["content"] for message in told.body["messages"])
    assert user == "检查部位：肝脏\n超声所见：肝右叶见一无回声区。\n超声提示：肝右叶囊肿。"
    assert "写6组对话" in system
    assert '{"conversations":[{"task":"size"' in system
    assert "一半的问题先说明检查部位" in system
    assert "一律不说检查部位" in untold.body["messages"][0]["content"]
    assert order(replace(CYST, site="")).body["messages"][1]["content"].startswith("超声所见")


def test_the_digest_follows_from_all_that_decides_the_reply_and_nothing_else() -> None:
    first = order(CYST)
    same = [order(replace(CYST, exam_id="other")), order(CYST, max_retries=0, timeout_s=1)]
    assert {o.digest for o in same} == {first.digest}
    others = [
        order(CYST, site_cue=False),
        order(CYST, model="n"),
        order(CYST, temperature=0.1),
        order(CYST, conversations_per_exam=3),
        order(CYST, extra_body={"thinking": False}),
        order(replace(CYST, findings="肝右叶见一低回声区。")),
    ]
    assert len({o.digest for o in [first, *others]}) == 7
    assert order(CYST, extra_body={"thinking": False}).body["thinking"] is False


def test_what_gives_nothing_to_ask_places_no_order() -> None:
    english = replace(CYST, findings="A cyst.", diagnosis="")
    assert place_order(english, config(), True) is None
    assert place_order(CYST, config(writer="translate"), True) is None


def test_conversations_are_read_and_bad_ones_named() -> None:
    good = {"task": "size", "turns": [{"question": " 多大？ ", "answer": "12mm"}], "note": "x"}
    items = [
        good,
        {**good, "task": "colour"},
        {"task": "size", "turns": []},
        {"task": "kind", "turns": [{"question": "", "answer": "囊肿"}]},
        "words",
    ]
    found = list(read_written(json.dumps({"conversations": items})))
    turns = (Turn("user", "多大？"), Turn("assistant", "12mm"))
    assert found[0] == Conversation("instruct", "size", turns)
    assert [str(reason).partition(": ")[2].partition(": ")[0] for reason in found[1:]] == [
        "task", "turns", "turns.0.question",
        "Input should be a valid dictionary or instance of Written",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "content", ["", "好的，如下：{}", "{}", "[]", '{"conversations": []}', '{"conversations": 3}']
)
def test_a_reply_of_another_shape_is_one_reason(content: str) -> None:
    (reason,) = read_written(content)
    assert isinstance(reason, str)
    assert reason.startswith("malformed reply: ")


def test_what_is_english_is_sent_and_the_rest_stays() -> None:
    group = replace(CYST, conversations=(ENGLISH,), findings="A cyst.")
    sent = order(group, writer="translate").body["messages"][1]["content"]
    assert json.loads(sent) == {"texts": ["Where is the stone?", "In the left kidney.", "A cyst."]}
    reply = json.dumps({"texts": ["结石在哪里？", "在左肾。", "一个囊肿。"]})
    (source, translated), (findings, found) = read_translated(reply, group)
    assert source == ENGLISH
    assert translated == Conversation(
        "instruct",
        "vqa",
        (
            Turn("user", "结石在哪里？", has_frames=True),
            Turn("assistant", "在左肾。"),
            Turn("user", "多大？"),
            Turn("assistant", "12"),
        ),
        closed=False,
        question_id="q1",
    )
    assert findings.turns[1].content == "A cyst."
    assert (found.stage, found.task, found.turns[1].content) == ("align", "findings", "一个囊肿。")
    assert found.turns[0].content in questions()["findings"]
    assert [c.task for c in english_sources(group)] == ["vqa", "findings"]


@pytest.mark.parametrize("content", ['{"texts": ["一", "二", "三"]}', '{"texts": "一"}', "x", "{}"])
def test_a_translation_of_other_texts_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match="malformed reply: "):
        list(read_translated(content, replace(CYST, conversations=(ENGLISH,))))


def test_languages_are_told_apart() -> None:
    assert is_english("No")
    assert not any(map(is_english, ("12", "", "CT检查", "左")))
    assert is_chinese("CT检查")
    assert not is_chinese("CT")
