"""What an endpoint is asked about an exam, and what its reply must be.

An order holds all that decides the reply, so its digest names the reply for ever: whoever has paid
for it need not pay again.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, StringConstraints, ValidationError
from pydantic import Field as Limited

from ultra.config import InstructionsConfig
from ultra.data.instructions import TASKS, questions
from ultra.types import Conversation, FrameGroup, Stage, Turn

WRITE = """你在为超声科编写看图问答。下面是一次检查的报告，有检查部位、超声所见和超声提示。
提问的人和回答的人都只看图像，没有报告在手；你照报告写出他们的对话。
一、写{number}组对话，每组一至三问。问法要多样，像同事之间说话，不提“报告”二字。
二、只问报告写明的内容。数值、单位、左右、回声、边界、良恶性都照报告说，不推断，不补充，不给建议。
三、报告说“未见”的，只能答未见；报告没有提到的，不问也不答。
四、{cue}
五、每组注明task，取其一：{tasks}。多于一问的用multi，都不合适的用other。
    normal问的是是否正常，以“是”或“否”开头回答，“是”为未见异常。
六、只输出JSON，形如
{{"conversations":[{{"task":"size","turns":[{{"question":"……","answer":"……"}}]}}]}}"""

CUE = "约一半的问题先说明检查部位；另写一组只问检查部位，该组的问题不得透露部位。"
NO_CUE = "问题一律不说检查部位；其中一组问检查部位。"

TRANSLATE = """你是影像科医师，也做医学翻译。
把下面JSON里texts的每一段英文译成通顺、规范的中文医学用语。
一、逐段翻译，段数和次序不变；问句仍是问句，一个词的回答仍是一个词。
二、数值、单位、左右、有无、可能性、良恶性一概照原文，不增不减，不作解释。
三、只输出JSON，形如{"texts":["……"]}"""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000)]

_LATIN, _HAN = re.compile("[A-Za-z]"), re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True, slots=True)
class Order:
    """One request: the body that is sent, and its digest."""

    digest: str
    body: dict[str, Any]


class Round(BaseModel):
    """A question and its answer, as a reply has them."""

    question: Text
    answer: Text


class Written(BaseModel):
    """A conversation, as a reply has it."""

    task: Literal[*TASKS, "other"]  # type: ignore[valid-type]
    turns: Annotated[list[Round], Limited(min_length=1, max_length=6)]


class WrittenReply(BaseModel):
    """The reply to an order to write; each of its conversations is judged by itself."""

    conversations: Annotated[list[Any], Limited(min_length=1, max_length=100)]


class TranslatedReply(BaseModel):
    """The reply to an order to translate."""

    texts: list[Text]


def place_order(group: FrameGroup, config: InstructionsConfig, site_cue: bool) -> Order | None:
    """Return what to ask about an exam; None where it gives nothing to ask."""
    if config.writer == "translate":
        texts = list(_texts(english_sources(group)))
        if not texts:
            return None
        return _order(TRANSLATE, json.dumps({"texts": texts}, ensure_ascii=False), config)
    if not is_chinese(group.findings + group.diagnosis):
        return None
    system = WRITE.format(
        number=config.conversations_per_exam,
        cue=CUE if site_cue else NO_CUE,
        tasks="、".join(TASKS),
    )
    report = {"检查部位": group.site, "超声所见": group.findings, "超声提示": group.diagnosis}
    return _order(system, "\n".join(f"{k}：{v}" for k, v in report.items() if v), config)


def _order(system: str, user: str, config: InstructionsConfig) -> Order:
    body = {
        "model": config.model,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
        ],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "response_format": {"type": "json_object"},
        **config.extra_body,
    }
    text = json.dumps(body, ensure_ascii=False, sort_keys=True)
    return Order(hashlib.sha256(text.encode()).hexdigest(), body)


def read_written(content: str) -> Iterator[Conversation | str]:
    """Yield the conversations of a reply, or in the place of one why it cannot be used."""
    try:
        reply = WrittenReply.model_validate_json(content)
    except ValidationError as error:
        yield explain(error)
        return
    for item in reply.conversations:
        try:
            written = Written.model_validate(item)
        except ValidationError as error:
            yield explain(error)
        else:
            rounds = ((r.question, r.answer) for r in written.turns)
            turns = tuple(t for q, a in rounds for t in (Turn("user", q), Turn("assistant", a)))
            yield Conversation("instruct", written.task, turns)


def read_translated(content: str, group: FrameGroup) -> Iterator[tuple[Conversation, Conversation]]:
    """Yield each English source of an exam with its translation.

    Raises:
        ValueError: for a reply of another shape, or of another number of texts.
    """
    sources = list(english_sources(group))
    wanted = len(list(_texts(sources)))
    try:
        texts = TranslatedReply.model_validate_json(content).texts
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if len(texts) != wanted:
        raise ValueError(f"malformed reply: {len(texts)} texts for {wanted}")
    left = iter(texts)
    for source in sources:
        turns = tuple(
            replace(turn, content=next(left)) if is_english(turn.content) else turn
            for turn in source.turns
        )
        yield source, replace(source, turns=turns, language="zh")


def _texts(sources: Iterable[Conversation]) -> Iterator[str]:
    turns = (turn for source in sources for turn in source.turns)
    return (turn.content for turn in turns if is_english(turn.content))


def english_sources(group: FrameGroup) -> Iterator[Conversation]:
    """Yield what of an exam is English: its conversations, and its report as two of them.

    What is already Chinese in them stays as it is.
    """
    yield from (c for c in group.conversations if c.language == "en")
    rng = random.Random(group.exam_id)
    stages: dict[str, Stage] = {"findings": "align", "diagnosis": "instruct"}
    for task, stage in stages.items():
        if is_english(text := getattr(group, task)):
            question = Turn("user", rng.choice(questions()[task]))
            yield Conversation(stage, task, (question, Turn("assistant", text)), language="en")


def is_english(text: str) -> bool:
    """Return whether a text has letters and nothing Chinese."""
    return bool(_LATIN.search(text)) and not is_chinese(text)


def is_chinese(text: str) -> bool:
    """Return whether a text holds Chinese."""
    return bool(_HAN.search(text))


def explain(error: ValidationError) -> str:
    """Return why a reply cannot be used."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"malformed reply: {where + ': ' if where else ''}{first['msg']}"
