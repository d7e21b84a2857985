from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from ultra.data.instructions import (
    CUE,
    TASKS,
    Report,
    parse_answer,
    parse_report,
    questions,
    write_conversations,
)
from ultra.types import FrameGroup

CYST = FrameGroup(
    exam_id="e-1",
    patient_key="p",
    site="肝脏",
    findings="肝右叶见一无回声区，大小约12mm，边界清晰，后方回声增强。余肝实质回声均匀。",
    diagnosis="肝右叶囊肿。",
    frames=(),
    frame_sizes=(),
    frame_sources=(),
)


def by_task(group: FrameGroup, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers of each task of the instruct stage."""
    found = {}
    for conversation in write_conversations(group, seed):
        if conversation.stage == "instruct":
            contents = [turn.content for turn in conversation.turns]
            found[conversation.task] = list(zip(contents[::2], contents[1::2], strict=True))
    return found


REPORTS = {
    "organ size beside the nodule's": (
        ("甲状腺", "甲状腺右叶大小约48×15mm，内见一低回声结节，大小约8.5×6mm，边界欠清晰。"
         "左叶未见明显异常。", "甲状腺右叶低回声结节，TI-RADS 4a类"),
        Report("低回声结节", "右叶", 8.5, "低回声", "边界欠清", False),
    ),
    "several cysts, centimetres, a stone denied": (
        ("肝胆", "肝右叶见多个无回声区，较大者约1.2cm×0.9cm，边界清。胆囊未见结石。",
         "肝囊肿；胆囊未见明显结石"),
        Report("囊肿", "右叶", 12, "无回声", "边界清晰", False),
    ),
    "side in the site": (
        ("左肾", "肾上极见强回声光团，直径6毫米，后伴声影", "结石"),
        Report("结石", "左侧", 6, "强回声", None, False),
    ),
    "two lesions of two kinds": (
        ("乳腺", "右乳见12mm×8mm低回声结节，边界清晰；左乳见6mm无回声区",
         "右乳低回声结节，左乳囊肿"),
        Report(normal=False),
    ),
    "two lesions of one kind, one margin": (
        ("乳腺", "右乳见低回声结节，大小约12mm，边界清晰。右乳另见低回声结节，大小约5mm。",
         "右乳结节"),
        Report("结节", "右侧", None, "低回声", None, False),
    ),
    "both sides": (
        ("乳腺", "双侧乳腺见无回声区，边界不清晰", "双侧乳腺囊肿"),
        Report("囊肿", "双侧", None, "无回声", "边界不清", False),
    ),
    "slightly strong echo": (
        ("肝脏", "肝左外叶见稍高回声团，范围约30×22mm，边界模糊", "肝左叶血管瘤可能"),
        Report("血管瘤", "左叶", 30, "稍高回声", "边界不清", False),
    ),
    "nothing found": (
        ("肝脏", "肝脏大小正常，实质回声均匀，未见占位。", "肝胆脾胰未见明显异常"),
        Report(normal=True),
    ),
    "something else found": (("肝脏", "肝实质回声增强、细密", "脂肪肝"), Report()),
    "a lesion described, none concluded": (
        ("肝脏", "肝右叶见一低回声结节", "请结合临床"), Report()
    ),
    "nothing written": (("肝脏", "", ""), Report()),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_read_as_it_is_written(name):
    written, expected = REPORTS[name]
    assert parse_report(*written) == expected


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("kind", "考虑囊肿。", Report(kind="囊肿")),
        ("kind", "低回声结节", Report(kind="低回声结节")),
        ("kind", "囊肿或结节", Report()),
        ("kind", "未见囊肿", Report()),
        ("side", "右叶", Report(side="右叶")),
        ("side", "病变位于左侧。", Report(side="左侧")),
        ("side", "左叶和右叶", Report()),
        ("size", "12mm", Report(size_mm=12)),
        ("size", "大小约1.2cm×0.9cm", Report(size_mm=12)),
        ("size", "最大径约 8.5 毫米。", Report(size_mm=8.5)),
        ("size", "很大", Report()),
        ("echogenicity", "无回声", Report(echogenicity="无回声")),
        ("echogenicity", "病变呈低回声。", Report(echogenicity="低回声")),
        ("echogenicity", "高回声伴低回声", Report()),
        ("margin", "清晰", Report(margin="边界清晰")),
        ("margin", "边界欠清晰。", Report(margin="边界欠清")),
        ("margin", "边缘模糊", Report(margin="边界不清")),
        ("diagnosis", "肝右叶囊肿。", Report("囊肿", "右叶", normal=False)),
        ("diagnosis", "肝脏未见异常。", Report(normal=True)),
        ("findings", "左肾见囊肿，大小约6mm，边界清晰。",
         Report("囊肿", "左侧", 6, None, "边界清晰", False)),
        ("report", "所见：肝右叶见无回声区，直径8mm。提示：肝右叶囊肿。",
         Report("囊肿", "右叶", 8, "无回声", None, False)),
        ("report", "肝右叶囊肿，直径8mm", Report("囊肿", "右叶", 8, None, None, False)),
        ("normal", "是", Report()),
        ("site", "左肾", Report()),
        ("kind", "", Report()),
    ],
)  # fmt: skip
def test_an_answer_states_what_it_says_and_no_more(task, answer, expected):
    assert parse_answer(task, answer) == expected


def test_every_written_answer_is_read_back():
    report = parse_report(CYST.site, CYST.findings, CYST.diagnosis)
    fields = {"kind": "kind", "side": "side", "size": "size_mm", "echogenicity": "echogenicity",
              "margin": "margin"}  # fmt: skip
    answers = {task: rounds[-1][1] for task, rounds in by_task(CYST).items()}
    for task, field in fields.items():
        assert getattr(parse_answer(task, answers[task]), field) == getattr(report, field)


def test_answers_are_short_and_as_the_report_says():
    answers = {task: rounds[-1][1] for task, rounds in by_task(CYST).items()}
    assert answers == {
        "kind": "囊肿",
        "side": "右叶",
        "size": "12mm",
        "echogenicity": "无回声",
        "margin": "边界清晰",
        "site": "肝脏",
        "diagnosis": "肝右叶囊肿。",
        "normal": "否",
        "multi": "肝右叶囊肿。",
    }
    assert set(answers) == set(TASKS)


def test_the_align_stage_asks_for_findings_and_report():
    align = [c for c in write_conversations(CYST, 0) if c.stage == "align"]
    assert [(c.task, len(c.turns)) for c in align] == [("findings", 2), ("report", 2)]
    assert align[0].turns[1].content == CYST.findings
    assert align[1].turns[1].content == f"所见：{CYST.findings}提示：{CYST.diagnosis}"


def test_only_what_the_report_states_is_asked():
    stone = replace(CYST, findings="肝右叶见一强回声团。", diagnosis="结石。")
    assert set(by_task(stone)) == set(TASKS) - {"size", "margin"}
    normal = replace(CYST, findings="肝脏未见占位。", diagnosis="肝脏未见异常。")
    rounds = by_task(normal)
    assert set(rounds) == {"site", "diagnosis", "normal", "multi"}
    assert rounds["normal"][0][1] == "是"
    unknown = replace(CYST, findings="肝实质回声细密。", diagnosis="脂肪肝。")
    assert set(by_task(unknown)) == {"site", "diagnosis", "multi"}


def test_answers_use_no_character_or_number_the_report_lacks():
    for seed in range(5):
        for conversation in write_conversations(CYST, seed):
            if conversation.task in ("normal", "report"):
                continue
            for turn in conversation.turns[1::2]:
                assert set(turn.content) <= set(CYST.site + CYST.findings + CYST.diagnosis)
                assert set(re.findall(r"\d+", turn.content)) <= {"12"}


def test_missing_texts_leave_out_their_questions():
    assert write_conversations(replace(CYST, site="", findings="", diagnosis=""), 0) == ()
    silent = write_conversations(replace(CYST, diagnosis=""), 0)
    assert [(c.stage, c.task) for c in silent] == [
        ("align", "findings"), ("instruct", "site"), ("instruct", "multi"),
    ]  # fmt: skip
    assert [turn.content for turn in silent[-1].turns[1::2]] == [CYST.site, CYST.findings]


def test_several_turns_ask_site_then_findings_then_diagnosis():
    rounds = by_task(CYST)["multi"]
    assert [answer for _, answer in rounds] == [CYST.site, CYST.findings, CYST.diagnosis]
    for task, (question, _) in zip(("site", "findings", "diagnosis"), rounds, strict=True):
        assert question in questions()[task]


def test_the_site_is_told_in_every_other_question_and_never_where_it_is_asked_for():
    cue = CUE.format(CYST.site)
    openings = set()
    for seed in range(20):
        conversations = [c for c in write_conversations(CYST, seed) if c.task != "multi"]
        told = [c.turns[0].content.startswith(cue) for c in conversations if c.task != "site"]
        assert all(a != b for a, b in pairwise(told))
        openings.add(told[0])
        for question, _ in [*by_task(CYST, seed)["site"], *by_task(CYST, seed)["multi"]]:
            assert CYST.site not in question
    assert openings == {True, False}


def test_without_the_cue_the_same_is_asked_and_the_site_is_told_nowhere():
    cue = CUE.format(CYST.site)
    for seed in range(5):
        told = write_conversations(CYST, seed)
        turns = [[replace(t, content=t.content.removeprefix(cue)) for t in c.turns] for c in told]
        plain = [replace(c, turns=tuple(t)) for c, t in zip(told, turns, strict=True)]
        assert write_conversations(CYST, seed, site_cue=False) == tuple(plain) != told


def test_wording_follows_from_the_seed_and_the_exam_and_varies_with_both():
    first = write_conversations(CYST, 0)
    assert write_conversations(CYST, 0) == first
    assert any(write_conversations(CYST, seed) != first for seed in range(1, 4))
    ids = [replace(CYST, exam_id=f"e-{i}") for i in range(2, 5)]
    assert any(write_conversations(group, 0) != first for group in ids)
    asked = {
        q.removeprefix(CUE.format("肝脏")) for s in range(200) for q, _ in by_task(CYST, s)["kind"]
    }
    assert asked == set(questions()["kind"])


def test_every_task_is_asked_in_twenty_ways():
    assert set(questions()) == (set(TASKS) - {"multi"}) | {"findings", "report"}
    for task, ways in questions().items():
        assert len(ways) == len(set(ways)) == 20, task
        assert all(way.endswith(("？", "。")) for way in ways)


def test_a_question_that_asks_for_the_site_or_the_lesion_tells_neither():
    told = re.compile("肝|肾|甲状腺|乳腺|囊肿|结石|结节|血管瘤|钙化|\\d|[无低高强]回声")
    assert [way for ways in questions().values() for way in ways if told.search(way)] == []
