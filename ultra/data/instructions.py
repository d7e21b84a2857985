"""Conversations from a report, written offline by rule: nothing is asked that it does not state.

A fact is kept only where the report names exactly one value for it, so a report of two lesions
gives no question about "the" size. Sentences that deny something ("未见结石") state nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TypeVar

import yaml

from ultra.types import Conversation, FrameGroup, Stage, Turn

_T = TypeVar("_T")

CUE = "检查部位：{}。"
"""Opens a question in the version that tells the site."""

NORMAL, ABNORMAL = "是", "否"

TASKS = ("kind", "side", "size", "echogenicity", "margin", "site", "diagnosis", "normal", "multi")
"""Tasks of the instruct stage; `multi` asks for site, findings and diagnosis in turn."""

REPORT = "所见：{}提示：{}"

_REPORT = re.compile(REPORT.format("(.*)", "(.*)"), re.DOTALL)
_CLAUSE = re.compile(r"[^，,。；;\n]+")
_SENTENCE = re.compile(r"[^。；;\n]+")
_DENIED = re.compile(
    r"未见|未探及|未发现|未显示|未触及|无明显|无异常|没有|不考虑|除外|排除|否认|消失"
)
_ECHOES = r"(?:极|稍|偏)?[无低等高强]回声|混[合杂]回声"
_LUMPS = r"区|结节|光?团|灶|斑|影|肿块|包块|占位|病"
_KIND = re.compile(
    r"血管瘤|错构瘤|血管平滑肌脂肪瘤|纤维腺瘤|腺瘤|脂肪瘤|肌瘤|畸胎瘤|息肉|囊肿|结石|钙化"
    r"|(?:[低等高强]回声|混合回声|囊实性|囊性|实性)?(?:结节|肿块|包块|占位)"
)
_ECHO = re.compile(f"({_ECHOES})(?={_LUMPS})")
_ANY_ECHO = re.compile(_ECHOES)
_MARGIN = re.compile(r"边[界缘](尚|较|欠|不)?(清|模糊)")
_SIDE = re.compile(r"([左右双])([内外前后]?叶|侧|肾|乳|肝|颈|眼|附件|卵巢|睾丸|腮腺|腋)")
_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = {"mm": 1, "毫米": 1, "cm": 10, "厘米": 10}
_SIZE = re.compile(
    rf"(?:大小|[直长]径|最大径|大者|范围)[^，,。；;\d]{{0,6}}"
    rf"({_NUMBER}(?:\s*(?:{'|'.join(_UNIT)})?\s*[x×X*]\s*{_NUMBER})*)\s*({'|'.join(_UNIT)})"
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a report states; None where it states nothing, or more than one thing.

    Attributes:
        kind: the lesion, e.g. 囊肿.
        side: 左叶, 右叶, 左侧, 右侧 or 双侧.
        size_mm: the largest measure of the lesion.
        echogenicity: e.g. 无回声.
        margin: e.g. 边界清晰.
        normal: whether the diagnosis finds nothing (True) or a lesion (False).
    """

    kind: str | None = None
    side: str | None = None
    size_mm: float | None = None
    echogenicity: str | None = None
    margin: str | None = None
    normal: bool | None = None


@cache
def questions() -> dict[str, tuple[str, ...]]:
    """Return the ways each task is asked, as `questions.yaml` beside this module lists them."""
    text = (resources.files("ultra.data") / "questions.yaml").read_text(encoding="utf-8")
    return {task: tuple(ways) for task, ways in yaml.safe_load(text).items()}


def parse_report(site: str, findings: str, diagnosis: str) -> Report:
    """Return what a report states, read by rule from common Chinese ultrasound wording."""
    concluded = _stated(diagnosis)
    kinds = [kind for clause in concluded for kind in _KIND.findall(clause)]
    places, lesions = _lesion_clauses(findings)
    if not kinds:
        nothing = bool(diagnosis.strip()) and not lesions and all("正常" in c for c in concluded)
        return Report(normal=True) if nothing else Report()
    side = _side([site, *concluded, *places])
    if _only(kinds) is None:
        return Report(side=side, normal=False)
    return Report(
        kind=kinds[0],
        side=side,
        size_mm=_only(_only(_millimetres(*f) for f in _SIZE.findall(text)) for text in lesions),
        echogenicity=_only(_only(_ECHO.findall(text)) for text in lesions),
        margin=_only(_only(_margin(*f) for f in _MARGIN.findall(text)) for text in lesions),
        normal=False,
    )


def parse_answer(task: str, answer: str) -> Report:
    """Return what an answer to a question of `task` states, read by the rules of `parse_report`.

    A short answer gives the fact that was asked for, unless it denies it or names several values;
    diagnosis, findings and report give all they state. What the question told, the site above all,
    does not count as stated. `normal`, answered by yes or no, and `site` give nothing.
    """
    stated = "，".join(_stated(answer))
    if task == "kind":
        return Report(kind=_only(_KIND.findall(stated)))
    if task == "side":
        return Report(side=_side([stated]))
    if task == "size":  # the question says what the number measures, the answer need not
        return Report(size_mm=_only(_millimetres(*f) for f in _SIZE.findall(f"大小{stated}")))
    if task == "echogenicity":
        return Report(echogenicity=_only(_ANY_ECHO.findall(stated)))
    if task == "margin":
        return Report(margin=_only(_margin(*f) for f in _MARGIN.findall(f"边界{stated}")))
    if task == "diagnosis":
        return parse_report("", "", answer)
    if task == "findings":
        return parse_report("", answer, answer)
    if task == "report":
        parts = _REPORT.fullmatch(answer.strip())
        return parse_report("", *parts.groups()) if parts else parse_report("", answer, answer)
    return Report()


def write_conversations(
    group: FrameGroup, seed: int, site_cue: bool = True
) -> tuple[Conversation, ...]:
    """Return the conversations of both stages about an exam.

    Stage `align` asks for the findings and for the whole report; stage `instruct` asks one
    question a task, and `multi` several in turn. With `site_cue`, every other question tells
    the site (both versions of section 4.2). The rest follows from the seed and the exam's id alone.
    """
    rng = random.Random(f"{seed}/{group.exam_id}")
    cued = rng.random() < 0.5
    conversations = []
    for stage, task, answer in _answers(group):
        question = rng.choice(questions()[task])
        if task != "site":
            told = site_cue and cued and group.site
            question = CUE.format(group.site) + question if told else question
            cued = not cued
        conversations.append(_conversation(stage, task, [(question, answer)]))
    rounds = [("site", group.site), ("findings", group.findings), ("diagnosis", group.diagnosis)]
    asked = [(rng.choice(questions()[task]), answer) for task, answer in rounds if answer]
    if len(asked) > 1:
        conversations.append(_conversation("instruct", "multi", asked))
    return tuple(conversations)


def _answers(group: FrameGroup) -> Iterator[tuple[Stage, str, str]]:
    """Yield stage, task and answer of every single-turn conversation."""
    report = parse_report(group.site, group.findings, group.diagnosis)
    if group.findings:
        yield "align", "findings", group.findings
    if group.findings and group.diagnosis:
        yield "align", "report", REPORT.format(group.findings, group.diagnosis)
    size = None if report.size_mm is None else f"{report.size_mm:g}mm"
    normal = None if report.normal is None else NORMAL if report.normal else ABNORMAL
    answers = {
        "kind": report.kind,
        "side": report.side,
        "size": size,
        "echogenicity": report.echogenicity,
        "margin": report.margin,
        "site": group.site,
        "diagnosis": group.diagnosis,
        "normal": normal,
    }
    for task, answer in answers.items():
        if answer:
            yield "instruct", task, answer


def _conversation(stage: Stage, task: str, rounds: Iterable[tuple[str, str]]) -> Conversation:
    turns = [t for q, a in rounds for t in (Turn("user", q), Turn("assistant", a))]
    return Conversation(stage, task, tuple(turns))


def _stated(text: str) -> list[str]:
    """Return the clauses of a text that deny nothing."""
    return [clause for clause in _CLAUSE.findall(text) if not _DENIED.search(clause)]


def _lesion_clauses(findings: str) -> tuple[list[str], list[str]]:
    """Return all clauses of sentences that describe a lesion, and a text for each of them.

    A text begins at the clause that names the lesion: what stands before it says where the lesion
    lies, but may measure the organ.
    """
    whole, lesions = [], []
    for sentence in _SENTENCE.findall(findings):
        clauses = _stated(sentence)
        for index, clause in enumerate(clauses):
            if _KIND.search(clause) or _ECHO.search(clause):
                whole += clauses
                lesions.append("，".join(clauses[index:]))
                break
    return whole, lesions


def _only(values: Iterable[_T]) -> _T | None:
    """Return the value when all are the same one."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _side(texts: Iterable[str]) -> str | None:
    found: list[tuple[str, str]] = [match for text in texts for match in _SIDE.findall(text)]
    hand = _only(hand for hand, _ in found)
    if hand is None:
        return None
    return hand + ("叶" if any(part.endswith("叶") for _, part in found) and hand != "双" else "侧")


def _millimetres(numbers: str, unit: str) -> float:
    return round(max(map(float, re.findall(_NUMBER, numbers))) * _UNIT[unit], 1)


def _margin(degree: str, word: str) -> str:
    if word == "模糊" or degree == "不":
        return "边界不清"
    return f"边界{degree}清" if degree else "边界清晰"
