"""Whether an answer states only what its report states, and a translation what its source states.

An answer is unfaithful as soon as one of its facts has no like in the report. What the rules cannot
read is not judged: they find slips, they do not prove that there is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ultra.data.instructions import parse_report
from ultra.data.writer.facts import (
    ABNORMAL,
    DIGITS,
    LEFT,
    MANY,
    NORMAL,
    NOWHERE,
    ONE,
    RIGHT,
    Fact,
    Sides,
    normalise,
    read_facts,
    read_numbers,
    read_organs,
    read_sides,
    split_clauses,
)
from ultra.types import FrameGroup, Turn

PRESUPPOSED = ("lesion", "malignancy", "grade", "echogenicity", "number")
"""Facts that a question may not take for granted either."""

_YES = re.compile(r"(?:是|有|对|可见|存在)的?(?=$|[,，。;!\s])")
_NO = re.compile(r"(?:否|不是|没有|无|不|未见|没见)的?(?=$|[,，。;!\s])")
_WHETHER = re.compile("请问|请(?:说出|指出)|是否|是不是|有没有|有无|能否|可否|[吗呢么]")
_OPEN = re.compile("还是|哪|什么|多[少大]|几|如何|怎|清不清")
_LETTERS, _HAN = re.compile("[A-Za-z]{3}"), re.compile("[\u4e00-\u9fff]")
_ENGLISH_SIDES = {"left": LEFT, r"right(?!\?|ly| now| after)": RIGHT, "bilateral": LEFT + RIGHT}
_ENGLISH_NO = re.compile(
    r"\b(?:no|not|none|without|absent|absence|negative|never|neither|nor)\b|n't\b|\bfree of\b"
)
_ENGLISH_NO_OR_PREFIX = re.compile(
    _ENGLISH_NO.pattern + r"|\b(?:un|non|in|im|ir|a|an|hypo)\w{4,}|\bnormal\b|less\b|\brule"
)
_CHINESE_NO = re.compile("[无未没不否非]|阴性|排除|除外|缺|消失")
_CHINESE_NONE = re.compile("未[见发探]|没有|无(?!回声|痛|论|创|症)")
_MALIGNANCY = {
    "恶性|癌|肉瘤|恶变": r"malignan|cancer|carcino|sarcoma|metasta",
    "良性": r"\bbenign",
}
_COUNT_WORDS = dict(one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10)
_MASS = re.compile("[瘤癌]|囊肿|息肉|结节|肿块|包块|占位|脓肿|血肿")


def find_unstated(turns: Sequence[Turn], group: FrameGroup) -> str:
    """Return the first thing that answers state and the report does not; empty where all is told.

    Args:
        turns: questions and answers by turns.
        group: the exam; its site, history, findings and diagnosis count as told.

    Returns:
        `kind: value`, where kind is number, side, negation, normal or one of PATTERNS.
    """
    texts = (group.site, group.history, group.findings, group.diagnosis)
    source = [fact for text in texts for fact in read_facts(text, read_sides(group.site))]
    normal = parse_report(group.site, group.findings, group.diagnosis).normal
    known = frozenset().union(*(read_sides(normalise(text)) for text in texts))
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        asked = normalise(question.content)
        text = _in_full(asked, normalise(answer.content))
        if unstated := read_sides(text) - known:
            return f"side: {_list(unstated)}"
        for fact in _claims(asked, text):
            if reason := _objection(fact, source, normal):
                return reason
    return ""


def _claims(question: str, answer: str) -> list[Fact]:
    """Return the facts of an answer, and those that its question takes for granted."""
    named = read_sides(question)
    organs = read_organs(_last_clause(question))
    organ = organs[0][1] if len(organs) == 1 else ""
    facts = read_facts(answer, named if len(named) == 1 else NOWHERE, organ)
    if organs:  # asked of them, not of the whole exam
        facts = [replace(f, kind="normal") if f.kind == "whole" else f for f in facts]
    if not _WHETHER.search(question) and "还是" not in question:
        facts += [fact for fact in read_facts(question) if fact.kind in PRESUPPOSED]
    return facts


def _in_full(question: str, answer: str) -> str:
    """Return what an answer says, where yes or no affirms or denies what the question names."""
    asked = _last_clause(question)
    if not asked or _OPEN.search(asked):
        return answer
    named = _WHETHER.sub("", asked)
    if yes := _YES.match(answer):
        return f"{named}。{answer[yes.end() :]}"
    if no := _NO.match(answer):
        return f"未见{named.split('是')[-1]}。{answer[no.end() :]}"
    return answer


def _last_clause(question: str) -> str:
    return (split_clauses(question) or [""])[-1]


def _objection(fact: Fact, source: Sequence[Fact], normal: bool | None) -> str:
    """Return why the source does not bear a fact out; empty where it does."""
    if fact.kind in ("whole", "normal"):
        return _objection_to_health(fact, source, normal)
    if fact.value == ONE:
        counts = {f.value for f in source if f.kind == "number" and f.value[-1] == ONE[-1]}
        return f"number: {ONE}" if counts and ONE not in counts else ""
    alike = [f for f in source if _alike(fact, f)]
    if not alike:
        return f"{fact.kind}: {fact.value}"
    agreeing = [f for f in alike if _agrees(fact, f)]
    if not agreeing or (fact.polarity == "denied" and _affirmed(fact, source)):
        return f"negation: {fact.value}"
    where = _where([f for f in agreeing if f.sides]) or _where(
        [f for f in source if f.kind in ("lesion", "echogenicity") and f.polarity == fact.polarity]
    )  # what is told of no side lies where the report saw something
    if where and fact.sides - where:
        return f"side: {_list(fact.sides - where)} {fact.value}"
    organs = {f.organ for f in agreeing if f.organ and f.kind == fact.kind}
    if fact.organ and organs and fact.organ not in organs:
        return f"site: {fact.organ} {fact.value}"
    return ""


def _objection_to_health(fact: Fact, source: Sequence[Fact], normal: bool | None) -> str:
    told = {(f.kind, f.value) for f in source if f.kind in ("whole", "normal")}
    if fact.value == NORMAL:
        local = fact.kind == "normal" and ("normal", NORMAL) in told
        return "" if normal or local or ("whole", NORMAL) in told else f"normal: {NORMAL}"
    seen = any(f.kind == "lesion" and f.polarity == "stated" for f in source)
    borne_out = normal is False or ABNORMAL in {value for _, value in told}
    return "" if borne_out or (seen and not normal) else f"normal: {ABNORMAL}"


def _alike(fact: Fact, other: Fact) -> bool:
    """Return whether both speak of the same thing, be it stated or denied."""
    if other.kind in ("whole", "normal"):  # where all is normal, there is no stone
        return fact.kind == "lesion" and fact.polarity == "denied" and other.value == NORMAL
    if fact.kind != other.kind:
        return False
    if fact.kind == "number" and fact.value == MANY:
        return other.value[-1] == ONE[-1] and other.value != ONE
    if fact.kind == "number" and fact.value.replace(".", "").isdigit():
        return fact.value == re.sub(r"[^\d.]", "", other.value)
    if fact.kind == "description" and fact.polarity == "denied":
        return fact.value[-1] == other.value[-1]
    if fact.kind == "lesion" and fact.polarity == "denied" and other.value == "占位":
        return bool(_MASS.search(fact.value))
    if fact.value == "占位" and fact.polarity != "denied":
        return bool(_MASS.search(other.value))
    return fact.value == other.value


def _agrees(fact: Fact, other: Fact) -> bool:
    if fact.kind == "description" and fact.polarity == "denied":
        return (other.value[0] in "不欠") != (fact.value[0] in "不欠")
    if other.value == NORMAL:
        return True
    if fact.polarity == "possible":
        return other.polarity != "denied"
    return fact.polarity == other.polarity


def _affirmed(fact: Fact, source: Sequence[Fact]) -> bool:
    """Return whether the source states what is denied, on the same side or on none.

    Not where it denies it as well, of another organ: 胆囊结石，胆总管未见结石.
    """
    if fact.kind != "lesion" or replace(fact, sides=NOWHERE, organ="") in (
        replace(f, sides=NOWHERE, organ="") for f in source
    ):
        return False
    return any(
        f.value == fact.value
        and f.polarity == "stated"
        and (not f.sides or not fact.sides or bool(f.sides & fact.sides))
        for f in source
    )


def _where(facts: Sequence[Fact]) -> Sides:
    return frozenset().union(*(fact.sides for fact in facts))


def _list(values: Sides | set[str]) -> str:
    return "、".join(sorted(values))


def find_mistranslated(source: str, target: str) -> str:
    """Return the first thing in which a Chinese text differs from its English source, or nothing.

    Numbers (lengths in mm), sides, negation and malignancy are compared.

    Returns:
        `kind: value`, where kind is language, number, side, negation or malignancy.
    """
    english, chinese = _to_chinese_units(normalise(source).lower()), normalise(target)
    if _LETTERS.search(english) and not _HAN.search(chinese):
        return "language: not Chinese"
    if different := _numbers_that_differ(english, chinese):
        return f"number: {_list(different)}"
    named = {side for word, side in _ENGLISH_SIDES.items() if re.search(rf"\b{word}", english)}
    told = frozenset("".join(named))
    sides = read_sides(chinese)
    if told != sides and not (re.search(r"\bboth\b", english) and told <= sides):
        return f"side: {_list(told ^ sides)}"
    if bool(_ENGLISH_NO.search(english)) > bool(_CHINESE_NO.search(chinese)):
        return "negation: lost"
    if bool(_CHINESE_NONE.search(chinese)) > bool(_ENGLISH_NO_OR_PREFIX.search(english)):
        return "negation: added"
    for word, pattern in _MALIGNANCY.items():
        if bool(re.search(pattern, english)) != bool(re.search(word, chinese)):
            return f"malignancy: {word.partition('|')[0]}"
    return ""


def _numbers_that_differ(english: str, chinese: str) -> set[str]:
    """Return the numbers that only one of two texts has; a count may be in words."""
    said, told = _plain_numbers(english), _plain_numbers(chinese)
    words = {str(n) for word, n in _COUNT_WORDS.items() if re.search(rf"\b{word}\b", english)}
    digits = {str(n) for digit, n in DIGITS.items() if digit in chinese}
    return (said - told - digits) | (told - said - words - {MANY, "1"})


def _plain_numbers(text: str) -> set[str]:
    """Return the numbers of a text, without units but for lengths: those differ by language."""
    values = (value for clause in split_clauses(text) for _, _, value in read_numbers(clause))
    return {v if v.endswith("mm") or v == MANY else re.sub(r"[^\d.]", "", v) for v in values}


def _to_chinese_units(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"\b(centi|milli)met(?:er|re)s?\b", lambda m: f"{m[1][0]}m", text)
    return re.sub(r"(?<=\d) (?:by|x) (?=\d)|(?<=m) (?:by|x) (?=\d)", "x", text)
