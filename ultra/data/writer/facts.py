"""What a Chinese ultrasound text says, read by rule: facts, each with its polarity and its side.

A text is read clause by clause. A side holds from where it is named until another side or another
organ is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Polarity = Literal["stated", "denied", "possible"]
Sides = frozenset[str]

LEFT, RIGHT = "左", "右"
NOWHERE: Sides = frozenset()
NORMAL, ABNORMAL = "正常", "异常"
ONE, MANY = "1个", "多个"
DIGITS = dict(zip("一二三四五六七八九十两", [*range(1, 11), 2], strict=True))

PATTERNS = {
    "lesion": re.compile(
        "血管平滑肌脂肪瘤|血管瘤|错构瘤|纤维腺瘤|腺瘤|脂肪瘤|肌瘤|畸胎瘤|淋巴瘤|息肉|囊肿|脓肿|血肿"
        "|结石|钙化|结节|肿块|包块|占位|血栓|斑块|积液|积水|腹水|扩张|狭窄|反流|返流|增生|增厚|肿大|增大"
        "|脂肪肝|硬化|水肿|破裂|梗阻|声影|血流信号|回声增强|回声衰减|彗星尾"
    ),
    "malignancy": re.compile("恶性|恶变|癌|肉瘤|转移|良性"),
    "grade": re.compile(r"([A-Z]{1,2})-?RADS\s*(?:分[类级])?:?\s*(\d[A-Ca-c]?)", re.IGNORECASE),
    "echogenicity": re.compile(
        r"[极稍偏略]?(?:[无低等高强弱]|混[合杂])回声(?!增强|衰减|失落|中断)|囊实性|囊性|实性"
    ),
    "description": re.compile(
        r"(不太|不够|不甚|[不欠尚较])?(?:(?<!血)(清)(?:晰|楚)?(?![洁除水宫])|(均匀)|(规则)|(光滑))"
        r"|模糊"
    ),
    "site": re.compile(
        "胆囊|胆总管|胆管|肾上腺|[肝肾胰脾肺胆]|(?<![囊宫])颈|甲状腺|乳(?=腺|房)|(?<=[左右双侧])乳"
        "|子宫|卵巢|膀胱|前列腺|睾丸"
        "|心(?=脏|[房室包肌])|阑尾|淋巴结|腮腺|输尿管|盆腔|腹腔"
    ),
}
"""Kind of fact -> how it is found. Besides these there are `number`, `normal` and `whole`."""

_CLAUSE = re.compile(r"[^,，。;；:：!！?？\n]+")
_TURN = re.compile("但是?|然而|仅见|另见|而(?=可?见)")
"""Where a clause turns: what was denied before is not denied behind."""
_TURNS_AWAY = re.compile(f"提示|其?余|{PATTERNS['site'].pattern}")
"""How a clause begins that no longer speaks of the side before."""
_SIDE = re.compile("左[、/和及与]?右(?:两侧)?|两[侧肾乳叶肺]|双(?![胎层重幅管峰腔])侧?|左|右")
_ABOUT = re.compile(r"(?<=[\dm米个枚])左右")
_POSSIBLE = re.compile("不(?:能|完全)*(?:除外|排除)|待(?:排|除外)|可能|疑似|可疑|性大")
_DENIED = re.compile(r"未|无(?!回声|痛)|没有|没见|不考虑|不支持|不符|不是|并非|除外|排除|否认|消失")
_FILLER = re.compile("见|明显|显示|到|征象|[的了]")

_NUMBER = r"\d+(?:\.\d+)?"
_UNIT = r"mm|毫米|cm/s|m/s|cm|厘米|ml|毫升|%|°|度|岁|周|次/分|bpm|[个枚处]"
_LENGTH = {"mm": 1.0, "毫米": 1.0, "cm": 10.0, "厘米": 10.0}
_SAME_UNIT = {"毫升": "ml", "枚": "个", "处": "个", "度": "°"}
_PIECE = re.compile(rf"({_NUMBER})\s*-?({_UNIT})?", re.IGNORECASE)
_MEASURE = re.compile(rf"{_PIECE.pattern}(?:\s*[x×*]\s*{_PIECE.pattern})*", re.IGNORECASE)
_COUNT = re.compile("([一二两三四五六七八九十多数])(?:[个枚处]|发(?![现生]))")

_HEALTH = re.compile(
    f"(大小|形态|回声|厚度|内径|包膜|结构|流速)?(?:均|基本|大致)*(不?{NORMAL}|{ABNORMAL})"
)
_WHOLE = re.compile(
    "(?:图像|超声|检查|该?部位|所见|表现|结果|[本这][次组]|这|都|均|基本|大致|完全|是|为|的"
    "|请|说出|指出|提示|未见|无|没有|明显|异常|正常|从|看|根据)*"
)
"""A clause of nothing else speaks of the whole exam."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing a text says.

    Attributes:
        kind: `number`, `normal`, `whole` (normal or not, said of the whole exam) or of PATTERNS.
        value: in one form: lengths in mm, `边缘模糊` as 不清, a denied 异常 as 正常.
        sides: 左, 右 or both; empty where the text names none.
        organ: which it is of, as PATTERNS["site"] finds it; empty where the text names none.
    """

    kind: str
    value: str
    polarity: Polarity = "stated"
    sides: Sides = NOWHERE
    organ: str = ""


def read_facts(text: str, sides: Sides = NOWHERE, organ: str = "") -> list[Fact]:
    """Return the facts of a text; `sides` and `organ` are what it speaks of until it names one."""
    facts, first = [], (sides, organ)
    for clause in split_clauses(normalise(text)):
        if _TURNS_AWAY.match(clause):
            sides, organ = first
        marks, organs = list(_SIDE.finditer(clause)), read_organs(clause)
        for start, end, kind, value in _values(clause):
            near = [mark for mark in marks if mark.start() < start]
            here = read_sides(near[-1][0]) if near else sides
            of = next((name for place, name in reversed(organs) if place < start), organ)
            if kind == "site":
                facts.append(Fact(kind, value))
            elif kind == "number":
                facts.append(Fact(kind, value, "stated", here, of))
            else:
                facts.append(Fact(kind, value, _polarity(clause, start, end), here, of))
        sides = read_sides(marks[-1][0]) if marks else sides
        organ = organs[-1][1] if organs else organ
        facts += _states_of_health(clause, sides)
    return facts


def normalise(text: str) -> str:
    """Return a text with one form for every character, and without `左右` for about."""
    return _ABOUT.sub("", unicodedata.normalize("NFKC", text))


def split_clauses(text: str) -> list[str]:
    """Return the clauses of a text, parted also where one turns."""
    parts = (part for clause in _CLAUSE.findall(text) for part in _TURN.split(clause))
    return [part.strip() for part in parts if part.strip()]


def read_sides(text: str) -> Sides:
    """Return 左 and 右 as far as a text names them; 双侧 is both."""
    found: set[str] = set()
    for mark in _SIDE.findall(text):
        found |= {LEFT, RIGHT} if mark[0] in "双两" or len(mark) > 1 else {mark}
    return frozenset(found)


def read_organs(clause: str) -> list[tuple[int, str]]:
    """Return place and name of the organs of a clause."""
    return [(match.start(), match[0]) for match in PATTERNS["site"].finditer(clause)]


def read_numbers(clause: str) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and value of every number: lengths in mm, others with their unit."""
    clause = PATTERNS["grade"].sub(lambda m: "-" * len(m[0]), clause)
    for measure in _MEASURE.finditer(clause):
        unit = ""
        for number, own in reversed(_PIECE.findall(measure[0])):
            unit = own.lower() or unit  # 12×9mm measures both in mm
            if unit in _LENGTH:
                value = f"{round(float(number) * _LENGTH[unit], 2):g}mm"
            else:
                value = f"{float(number):g}{_SAME_UNIT.get(unit, unit)}"
            yield measure.start(), measure.end(), value
    for count in _COUNT.finditer(clause):
        digit = DIGITS.get(count[1])
        yield count.start(), count.end(), f"{digit}个" if digit else MANY


def _values(clause: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end, kind and value of every fact of a clause but those of health."""
    for start, end, value in read_numbers(clause):
        yield start, end, "number", value
    for kind, pattern in PATTERNS.items():
        for match in pattern.finditer(clause):
            yield match.start(), match.end(), kind, _value(kind, match)


def _value(kind: str, match: re.Match[str]) -> str:
    text = match[0]
    if kind == "grade":
        return f"{match[1]}-RADS {match[2]}".upper()
    if kind == "malignancy":
        return text.replace("恶变", "恶性")
    if kind == "echogenicity":
        return text.replace("混杂", "混合").replace("弱", "低")
    if kind != "description":
        return text
    if text == "模糊":
        return "不清"
    degree = match[1] or ""
    word = next(word for word in match.groups()[1:] if word)
    return ("欠" if len(degree) > 1 else degree) + word


def _states_of_health(clause: str, sides: Sides) -> Iterator[Fact]:
    kind = "whole" if _WHOLE.fullmatch(clause.replace("不正常", ABNORMAL)) else "normal"
    for match in _HEALTH.finditer(clause):
        denied = _polarity(clause, match.start(), match.end()) == "denied"
        healthy = (match[2] == NORMAL) != denied
        value = NORMAL if healthy else ABNORMAL
        if match[1]:  # a size that is normal says nothing of the rest
            yield Fact("description", match[1] + value, "stated", sides)
        else:
            yield Fact(kind, value, "stated", sides)


def _polarity(clause: str, start: int, end: int) -> Polarity:
    """Return how a clause speaks of what stands from `start` to `end`."""
    if _POSSIBLE.search(clause):
        return "possible"
    for denial in _DENIED.finditer(clause):
        last = not _FILLER.sub("", clause[denial.end() :])
        if denial.end() <= start or (last and end <= denial.start()):
            return "denied"
    return "stated"
