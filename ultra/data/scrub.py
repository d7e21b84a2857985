"""Free text without identities: names, numbers, dates and places become placeholders.

What is looked for is what HIPAA's safe harbour (45 CFR 164.514(b)(2)) lists, as Chinese reports
write it: names after their labels, before a title and as signatures; numbers of patients, exams and
identity cards; phones, mail addresses, dates with the times beside them, and hospitals. Sizes,
weeks of pregnancy, grades and masked sizes (`_2DS_`) stay as they are.

Every repetition is bounded or gives nothing back, so no text takes long.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """A text without identities, and how many of each kind were replaced.

    Attributes:
        text: with `[姓名]`, `[编号]`, `[证件号]`, `[电话]`, `[日期]`, `[医院]`, `[地址]` or
            `[邮箱]` where one stood.
        counts: by kind, e.g. `{"姓名": 1}`.
    """

    text: str
    counts: Mapping[str, int]


def scrub(text: str) -> Scrubbed:
    """Return a text with its identities replaced, in time that grows with its length."""
    counts: Counter[str] = Counter()
    for kind, find in _FINDERS:
        spans = list(find(text.translate(_PLAIN)))
        if spans:
            counts[kind] += len(spans)
            text = _replace(text, spans, f"[{kind}]")
    return Scrubbed(text, dict(counts))


def holds_identity(text: str) -> bool:
    """Return whether an id or the name of a file may say who somebody is.

    Beside what `scrub` finds: a Chinese name that stands alone, and two Latin words of which one is
    a Chinese surname in pinyin.
    """
    plain = text.translate(_PLAIN)
    if scrub(text).counts or _LONE_NAME.search(plain):
        return True
    words = [word.lower() for word in re.findall(r"[A-Za-z]{2,}", plain)]
    return len(words) > 1 and any(_PINYIN.fullmatch(word) for word in words)


def _replace(text: str, spans: list[Span], placeholder: str) -> str:
    parts, position = [], 0
    for start, end in spans:
        parts += [text[position:start], placeholder]
        position = end
    return "".join([*parts, text[position:]])


def _finder(*patterns: str) -> Finder:
    """Return what yields the places of group `x`, for whichever pattern comes first."""
    compiled = [re.compile(pattern, re.VERBOSE) for pattern in patterns]

    def find(text: str) -> Iterator[Span]:
        last = 0
        for start, end in sorted(m.span("x") for one in compiled for m in one.finditer(text)):
            if start >= last:
                yield start, end
                last = end

    return find


def _find_hospitals(text: str) -> Iterator[Span]:
    for match in _HOSPITAL.finditer(text):
        start = match.start()
        for word in _BEFORE_PLACE.finditer(match["place"]):
            start = match.start() + word.end()
        place = text[start : match.end("place")]
        if place and not _NO_PLACE.fullmatch(place):
            yield start, match.end()


_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Full-width digits, letters and signs as plain ones; no place in the text moves."""

_SURE = (
    "王李张刘陈杨赵吴周徐孙朱胡郭何罗梁宋郑谢韩唐冯董萧程曹袁邓许傅沈吕苏卢蒋蔡贾丁魏薛叶阎潘杜戴夏钟汪田姜"
    "谭廖邹熊陆郝孔崔康邱秦顾侯邵孟龙万雷钱汤尹黎武贺龚樊殷陶洪翟倪严芦俞鲁葛伍韦聂焦柳邢岳齐梅庄辛涂祝耿"
    "詹苗凌纪靳童欧甄裴覃霍翁隋植蒲柯阮闵卓宗晏冉骆瞿褚娄臧仇佟匡穆窦邬敖岑晁巩荆赖闫蓝缪党莫乔赫车项滕刁"
    "艾喻戚巫谈嵇麻湛游慕邰濮楚蔚马彭祁舒禹尧邸鞠仝阙茹屠佘昝隗荀郗苟储茅狄糜逄揭窦晋卞邝暴禤揣敖"
)
"""Surnames that begin hardly any other word of a report."""

_UNSURE = (
    "白高方金曾黄于全和平左时管双应明连包计能都通丰经水曲农满国文东红原师丛安常单古边封向解权代易商成宫沙路支班"
    "房林任余牛温石查席祖景谷冷司毛盖符池卫甘宁兰简盛章季范江桂尚毕费段关申施卜仲肖习屈姚史伊冼鲍胥尤牟华花蒙乐浦利毋麦巴幸戈"
)
"""Surnames that begin other words too (高血压, 黄疸); these need more beside them."""

_HAN = "[\u3400-\u4dbf\u4e00-\u9fff]"
_NOT_HAN = "[^\u3400-\u4dbf\u4e00-\u9fff]"
_TWO = "欧阳|司马|上官|诸葛|司徒|东方|独孤|南宫|皇甫|尉迟|公孙|慕容|令狐|长孙|夏侯|端木|宇文|轩辕"
_SURE_NAME = rf"(?:(?:{_TWO}|[{_SURE}]){_HAN}{{1,2}})"
_ANY_NAME = rf"(?:(?:{_TWO}|[{_SURE}{_UNSURE}]){_HAN}{{1,2}})"
_DOTTED_NAME = rf"(?:{_HAN}{{1,10}}(?:[·•]{_HAN}{{1,10}}){{1,3}})"
_HIDDEN_NAME = rf"(?:{_HAN}[某*×xX○]{{1,3}})"
_LATIN_NAME = r"(?:[A-Za-z][A-Za-z'’.-]{0,30}+(?:[ ,^]{1,2}+[A-Z][A-Za-z'’.-]{0,30}+){0,3}+)"
_FULL_LATIN_NAME = r"(?:[A-Z][A-Za-z'’.-]{1,30}+(?:[ ,^]{1,2}+[A-Z][A-Za-z'’.-]{0,30}+){1,3}+)"
_SPACE = r"[ \t\u3000]"
_GAP = rf"{_SPACE}{{0,8}}+"
_COLON = rf"{_GAP}[:=]{_GAP}"
_END = (
    rf"(?={_NOT_HAN}|$|男|女|性别|年龄|先生|女士|同志|科|床|住院|门诊|病区|审核|报告|检查|日期|签)"
)
_AGED = rf"(?=(?:{_SPACE}|[,，、;/(（]){{0,4}}(?:男|女|\d{{1,3}}{_SPACE}?岁|先生|女士))"
_DISEASE = (
    "(?!高血|高热|高龄|高危|高脂|黄疸|白血|白带|水肿|曾|经产|经期|全麻|平素|时有|常有|余|安静)"
)

_NAMED = rf"(?:姓{_SPACE}{{0,4}}名|(?i:name))"
_PATIENT = "(?:患者|病人|患儿|产妇|孕妇|家属|伤者|受检者|(?i:patient))"
_SIGNER = r"""(?:
    (?:送检|申请|报告|审核|检查|诊断|操作|主治|主任|副主任|主管|经治|经管|责任|会诊|值班|手术|超声|住院|
       开单|申报|复核|书写|记录|录入|初诊|签发|上级)(?:医师|医生|大夫|技师|者|人|员))"""
_ROLE = rf"""(?:{_SIGNER}
    | 医师|医生|大夫|技师|护士|签名|签字|签章|联系人
    | (?i:physician|doctor|sonographer|operator|radiologist|(?:reported|signed)[ ]by) )"""
_TITLE = "(?:副?主任医师|主治医师|主任|医师|医生|教授|大夫|护士长|护士|先生|女士|小姐)"
_SIGNED = rf"""(?={_SPACE}{{0,4}}(?:$|\n|\[日期\]
    | [/、,，]?{_SPACE}{{0,4}}{_SURE_NAME}(?:{_SPACE}|[/、\[]|$|\n) ))"""

_NUMBERED = r"""(?:
    (?:住院|门诊|检查|病历|病案|病例|病人|患者|超声|影像|登记|就诊|诊疗卡|就诊卡|医保卡?|社保卡?|条码|条形码|
       申请单|申请|报告|流水|档案|标本|样本|床位|卡|序列)(?:编号|号码|号|ID)
    | 编号 | 床号
    | (?<![A-Za-z])(?:(?i:(?:patient|exam|study)[ ]?id|accession(?:[ ]?no\.?)?)
        | ID(?:号|码)? | MRN) )"""
_NUMBER = r"(?:(?=[A-Za-z#+_/-]{0,12}\d)[A-Za-z0-9#+][A-Za-z0-9_/.-]{0,40}+)"
_NO_SIZE = r"""(?![ \t]{0,2}
    (?:mm|cm|ml|m/s|kg|g\b|Hz|bpm|%|°|毫米|厘米|周|天|岁|次|个|点))"""

_YEAR, _MONTH, _DAY = r"(?:19|20)\d{2}", r"(?:1[0-2]|0?[1-9])", r"(?:3[01]|[12]\d|0?[1-9])"
_MONTH_2, _DAY_2 = r"(?:0[1-9]|1[0-2])", r"(?:0[1-9]|[12]\d|3[01])"
_MONTH_NAME = "(?i:(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\\.?)"
_HAN_DIGIT = "[一二三四五六七八九〇零○十廿卅]"
_DATE = rf"""(?:
    (?<!\d){_YEAR}[ ]?年[ ]?{_MONTH}[ ]?月(?:[ ]?{_DAY}[ ]?[日号]?)?
    | (?<!\d)(?:\d{{2}}年)?{_MONTH}[ ]?月[ ]?{_DAY}[ ]?[日号]
    | {_HAN_DIGIT}{{4}}年{_HAN_DIGIT}{{1,2}}月(?:{_HAN_DIGIT}{{1,3}}[日号]?)?
    | (?<![\d.]){_YEAR}(?P<a>[-/.])[ ]?{_MONTH}(?P=a)[ ]?{_DAY}(?!\d)
    | (?<![\d.])\d{{1,2}}(?P<b>[-/.])\d{{1,2}}(?P=b){_YEAR}(?!\d)
    | (?<![\d.-])\d{{2}}(?P<c>[-/]){_MONTH_2}(?P=c){_DAY_2}(?![\d-]){_NO_SIZE}
    | (?<![\d.]){_DAY}[- ]{_MONTH_NAME}[-, ]{{1,2}}(?:{_YEAR}|\d{{2}})(?!\d)
    | (?<![A-Za-z]){_MONTH_NAME}[ ]{_DAY},?[ ]{_YEAR}(?!\d)
    | (?<!\d){_YEAR}{_MONTH_2}{_DAY_2}(?!\d) )"""
_CLOCK = r"""(?:(?:上午|下午|凌晨|晚上?|中午)?[ ]?
    \d{1,2}[:时点]\d{1,2}(?:[:分]\d{1,2})?[分秒]?(?:[ ]?(?i:[ap]m))?)"""

_HOSPITAL = re.compile(
    rf"(?P<place>{_HAN}{{1,20}}?)"
    "(?:医院|卫生院|保健院|卫生服务中心|卫生服务站|诊所|体检中心|医学中心|医疗中心)"
    rf"(?:{_HAN}{{1,4}}(?:院区|分院))?"
)
_BEFORE_PLACE = re.compile(
    "于|在|由|至|从|到|往|赴|转|与|及|我|请|曾|外|回|去|来|建议|复查|就诊|检查|送检|来自|患者|病人|结节|囊肿|"
    "异常|报告|术后|诊断|提示|所见|名称|单位|医院|必要时|可|需"
)
_NO_PLACE = re.compile(
    "上级|当地|专科|综合|其他|其它|外地|基层|本|该|各|大|原|下级|上一级|三甲|三级|二级|大型|省级|市级|县级|"
    "专业|正规|肿瘤专科|儿童|妇幼|口腔|社区|附近|任何|多家|某|住|对口|定点|公立"
)

_PINYIN = re.compile(
    "wang|li|zhang|liu|chen|yang|zhao|huang|zhou|wu|xu|sun|hu|zhu|gao|lin|he|guo|ma|luo|liang|song|"
    "zheng|xie|han|tang|feng|yu|dong|xiao|cheng|cao|yuan|deng|fu|shen|zeng|peng|lu|su|jiang|cai|"
    "jia|ding|wei|xue|ye|yan|pan|du|dai|xia|zhong|tian|ren|fan|fang|shi|yao|tan|liao|zou|xiong|jin|"
    "hao|kong|bai|cui|kang|mao|qiu|qin|gu|hou|shao|meng|long|wan|duan|lei|qian|yin|yi|chang|qiao|"
    "lai|gong|wen"
)
_LONE_NAME = re.compile(rf"(?<!{_HAN}){_ANY_NAME}(?!{_HAN})")

_FINDERS: tuple[tuple[str, Finder], ...] = (
    ("邮箱", _finder(r"(?<![A-Za-z0-9._%+-])(?P<x>[A-Za-z0-9._%+-]++@[A-Za-z0-9.-]{3,100}+)")),
    ("证件号", _finder(
        r"(?<![A-Za-z\d])(?P<x>\d{17}[\dXx]|\d{15})(?![A-Za-z\d])",
        r"(?<!\d)(?P<x>\d{6}[ -](?:19|20)\d{6}[ -]\d{3}[\dXx])(?!\d)",
        rf"(?:身份证|护照|军官证|证件)(?:编号|号码|号)?(?:{_COLON}|{_GAP})(?P<x>{_NUMBER})",
    )),
    ("电话", _finder(
        r"(?<!\d)(?P<x>(?:\+?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4})(?!\d)",
        r"(?<![\d.])(?P<x>\(?0\d{2,3}\)?[- ]?[2-9]\d{6,7})(?![\d.])",
        r"(?<!\d)(?P<x>[48]00-\d{3,4}-\d{3,4})(?!\d)",
        rf"(?:电话|手机|联系方式|微信|QQ|(?i:tel|phone)\.?)(?:号码|号)?(?:{_COLON}|{_GAP})"
        r"(?P<x>[+(]?[A-Za-z]{0,10}\d[-() \d]{4,18}\d)",
    )),
    ("编号", _finder(
        rf"{_NUMBERED}(?:{_COLON}|{_GAP})(?P<x>{_NUMBER}){_NO_SIZE}",
        r"(?<![\d.+])(?P<x>[+加]?\d{1,3}[ ]?床)(?!旁|边)",
    )),
    ("日期", _finder(
        rf"(?P<x>(?:{_CLOCK}[ \t,，]{{1,3}})?{_DATE}(?:[ \tT,，]{{0,3}}{_CLOCK})?)",
        rf"(?:时间|(?i:time)){_COLON}(?P<x>{_CLOCK})",
    )),
    ("编号", _finder(
        r"(?<![\d.])(?P<x>[A-Za-z]{0,8}[-_]?\d{8,}+[A-Za-z0-9-]{0,20}+)",
        r"(?<![\d.])(?P<x>\d++(?:\.\d++){4,}+)",
    )),
    ("医院", _find_hospitals),
    ("地址", _finder(rf"(?:住址|地址|籍贯|户籍|单位){_COLON}(?P<x>[^\n,，。；;\[]{{2,60}})")),
    ("姓名", _finder(
        rf"""(?:{_NAMED}|{_ROLE}){_COLON}(?P<x>{_HIDDEN_NAME} | {_DOTTED_NAME}
             | {_HAN}{_SPACE}{_HAN}(?!{_HAN}) | {_HAN}{{2,4}}?{_END} | {_ANY_NAME}
             | {_LATIN_NAME})""",
        rf"""{_PATIENT}{_COLON}(?P<x>{_HIDDEN_NAME} | {_DISEASE}{_ANY_NAME}{_END}
             | {_HAN}{{2,4}}{_AGED} | {_FULL_LATIN_NAME})""",
        rf"""(?:{_NAMED}|{_ROLE}){_GAP}(?P<x>{_SURE_NAME}{_END} | {_HIDDEN_NAME}
             | {_FULL_LATIN_NAME} | {_ANY_NAME}(?={_GAP}(?:$|\n|\[|[,，;；/、]?{_GAP}{_ROLE})))""",
        rf"(?:{_NAMED}|{_SIGNER}){_SPACE}(?P<x>{_HAN}{{2,3}})(?={_SPACE}|\[|$|\n)",
        rf"""{_PATIENT}{_GAP}(?P<x>{_HIDDEN_NAME} | {_DISEASE}{_ANY_NAME}{_AGED}
             | {_SURE_NAME}(?={_NOT_HAN}|$|因|于|系|住院|自诉|自述|既往|主诉))""",
        rf"(?<!{_HAN})(?P<x>{_DISEASE}{_ANY_NAME}){_AGED}",
        rf"(?P<x>(?:{_TWO}|[{_SURE}]){_HAN}{{0,2}}?){_TITLE}",
        rf"(?:^|(?<=[。.；;\n\]])){_SPACE}{{0,4}}(?P<x>{_SURE_NAME}){_SIGNED}",
        rf"(?<=[/、])(?P<x>{_SURE_NAME})(?={_SPACE}{{0,4}}(?:$|\n|\[日期))",
    )),
)  # fmt: skip
"""Kinds in the order they are replaced: what bears a label comes before what only looks alike."""
