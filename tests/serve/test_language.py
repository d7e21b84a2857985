"""The language side without Ray: it loads its own weights only, and text comes out whole."""

from __future__ import annotations

import asyncio
import itertools
import random
from contextlib import aclosing
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.serve.questions import FRAMES, count_modules, without
from ultra.model import checkpoint
from ultra.model.encoders import VisionEncoder
from ultra.serve.events import Delta, Opening, Question, Refusal, Ticket
from ultra.serve.language import Language, TextStream
from ultra.types import Turn


def test_the_language_side_has_no_vision(random_checkpoint, random_backbones, tmp_path) -> None:
    (visual,) = checkpoint.load_visual(random_checkpoint).look([FRAMES])
    names = ["clip", "sam.pth"]
    uri = without(random_checkpoint, random_backbones, names, tmp_path / "copy")
    connector = Path(uri) / "connector.safetensors"
    connector.write_bytes(bytes(connector.stat().st_size))  # as long as it was, and not to be read
    before = count_modules(VisionEncoder)
    language = Language(uri, max_new_tokens=5)
    try:
        assert language.alive
        assert count_modules(VisionEncoder) == before
        opening, *deltas = ask(language, visual, "左叶见囊肿？")
        assert opening == Opening(visual.chosen, visual.scores_K, opening.num_prompt_tokens)
        assert deltas[-1].num_tokens == 5  # what max_new_tokens allows without being asked
        assert deltas[-1].finish_reason == "length"
        (refusal,) = ask(language, visual, "左" * 400)
        assert isinstance(refusal, Refusal)
        assert "at most 400 fit together" in refusal.message
        fitting = ask(language, visual, "左" * 388)
        assert fitting[0].num_prompt_tokens == 398  # so the answer is as long as there is room
        assert fitting[-1].num_tokens == 2
    finally:
        language.stop()
    assert not language.alive


def make_question(text: str, max_new_tokens: int | None = None, **fields) -> Question:
    return Question((Turn("user", text),), (), max_new_tokens, **fields)


def ask(language: Language, visual, text: str) -> list:
    async def collect() -> list:
        return [event async for event in language.answer(visual, text, make_question(text))]

    return asyncio.run(collect())


async def until_idle(language: Language) -> None:
    """Wait until the engine has dropped every request."""
    scheduler = language._generator._manager.batch_processor.scheduler
    async with asyncio.timeout(60):
        while scheduler.active_requests or scheduler.waiting_requests:
            await asyncio.sleep(0.01)


def test_answers_with_and_without_stop_strings(random_checkpoint) -> None:
    (visual,) = checkpoint.load_visual(random_checkpoint).look([FRAMES])
    language = Language(random_checkpoint, max_new_tokens=30)

    async def collect(*stop: str) -> list[Delta]:
        events = language.answer(visual, "x", make_question("左叶", stop=stop))
        return [event async for event in events][1:]

    async def collect_all() -> None:
        whole = await collect()
        text = "".join(d.text for d in whole)
        unmet = await collect("never met")
        assert "".join(d.text for d in unmet) == text
        stop = text[9:12]
        stopped = await collect(stop, "never met")
        assert "".join(d.text for d in stopped) == text[: text.find(stop)]
        assert stopped[-1].finish_reason == "stop"
        # As many tokens as it took to write the stop string, and no more.
        sizes = itertools.accumulate(len(d.text) for d in whole)
        end = text.find(stop) + len(stop)
        needed = next(d.num_tokens for d, size in zip(whole, sizes, strict=True) if size >= end)
        assert stopped[-1].num_tokens == needed
        await until_idle(language)  # what it still says needs the event loop

    try:
        asyncio.run(collect_all())
    finally:
        language.stop()


def test_a_probe_takes_a_token_from_the_engine_unless_one_just_came(random_checkpoint) -> None:
    language = Language(random_checkpoint, max_new_tokens=5)
    passes = []
    add = language._generator._add
    language._generator._add = lambda *args, **options: (passes.append(args), add(*args, **options))

    async def probe_twice() -> None:
        await language.probe()
        await language.probe()

    try:
        asyncio.run(probe_twice())
        assert len(passes) == 1
        language._heard_at -= 100
        language._generator._manager._generation_step = None  # the engine dies of it
        with pytest.raises(RuntimeError):
            asyncio.run(language.probe())
    finally:
        language.stop()


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.2, "seed": 5}, {"temperature": 1.2}])
def test_an_answer_goes_on_from_wherever_it_broke_off(random_checkpoint, fields) -> None:
    (visual,) = checkpoint.load_visual(random_checkpoint).look([FRAMES])
    language = Language(random_checkpoint, max_new_tokens=20)
    ticket = Ticket()

    async def collect(begun: tuple[int, ...] | None, **more) -> list[Delta]:
        question = make_question(
            "左叶", ticket=Ticket(ticket.id, ticket.created, begun), **fields, **more
        )
        return [event async for event in language.answer(visual, "x", question)][1:]

    async def collect_all() -> None:
        whole = await collect(None)
        stop = "".join(d.text for d in whole)[8:11]
        for expected, more in ((whole, {}), (await collect(None, stop=(stop,)), {"stop": (stop,)})):
            for told in range(len(expected)):
                begun = tuple(i for delta in expected[:told] for i in delta.token_ids)
                rest = await collect(begun, **more)
                assert "".join(d.text for d in rest) == "".join(d.text for d in expected[told:])
                assert rest[-1].num_tokens == expected[-1].num_tokens
                assert rest[-1].finish_reason == expected[-1].finish_reason
                ids = [i for delta in rest for i in delta.token_ids]
                assert ids == [i for delta in expected[told:] for i in delta.token_ids]

    try:
        asyncio.run(collect_all())
    finally:
        language.stop()


def test_a_stop_string_ends_the_request_before_it_is_told(random_checkpoint) -> None:
    (visual,) = checkpoint.load_visual(random_checkpoint).look([FRAMES])
    language = Language(random_checkpoint, max_new_tokens=300)

    async def read() -> None:
        whole = [e async for e in language.answer(visual, "x", make_question("左叶", 20))][1:]
        stop = "".join(d.text for d in whole)[3:6]
        answer = language.answer(visual, "x", make_question("左叶", stop=(stop,)))
        async with aclosing(answer):
            while getattr(event := await anext(answer), "finish_reason", None) is None:
                pass
            assert event.finish_reason == "stop"
            assert language.stats["answers"] == 0  # and nobody has asked for the end yet
            await until_idle(language)

    try:
        asyncio.run(read())
    finally:
        language.stop()


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are single bytes, so that a character takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TEXT = "肝左叶见囊肿 3.2×1.5 cm。🩺 ok"


def test_no_character_is_ever_broken(byte_tokenizer) -> None:
    ids = byte_tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(ids) == len(TEXT.encode())
    stream = TextStream(byte_tokenizer)
    pieces = [stream.add([i]) for i in ids]
    assert [p for p in pieces if p] == list(TEXT)
    assert stream.add([byte_tokenizer.eos_token_id]) == ""
    assert stream.finish() == ""


def test_bytes_that_never_become_a_character_come_at_the_end(byte_tokenizer) -> None:
    ids = byte_tokenizer.encode("a肝", add_special_tokens=False)[:-1]
    stream = TextStream(byte_tokenizer)
    assert [stream.add([i]) for i in ids] == ["a", "", ""]
    assert stream.finish() == byte_tokenizer.decode(ids)[1:] != ""


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["囊肿"], "肝左叶见"),
        (["囊x", "。"], "肝左叶见囊肿 3.2×1.5 cm"),
        (["肝"], ""),
        ([" ok"], TEXT[:-3]),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_stop_strings(byte_tokenizer, stop, text, size) -> None:
    ids = byte_tokenizer.encode(TEXT, add_special_tokens=False)
    stream = TextStream(byte_tokenizer, stop)
    out = ""
    for start in range(0, len(ids), size):
        out += stream.add(ids[start : start + size])
        if stream.stopped:
            break
    assert stream.stopped
    assert out == text


def test_a_stop_string_that_is_only_begun_is_text(byte_tokenizer) -> None:
    ids = byte_tokenizer.encode("abc", add_special_tokens=False)
    stream = TextStream(byte_tokenizer, ["cd"])
    assert [stream.add([i]) for i in ids] == ["a", "b", ""]
    assert stream.finish() == "c"
    assert not stream.stopped


def read_by_characters(text: str, stop: list[str]) -> tuple[str, bool]:
    """What may be told of a text, and whether it has ended, by looking at every place in it."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    begun = [i for i in range(len(text)) if any(s.startswith(text[i:]) for s in stop)]
    return text[: min(begun, default=len(text))], False


@pytest.mark.parametrize("seed", range(40))
def test_stop_strings_in_any_pieces(byte_tokenizer, seed) -> None:
    # Few characters, so that beginnings overlap: 囊肿 in 囊囊肿, and one stop string in another.
    draw = random.Random(seed)
    letters = "囊肿。a"
    text = "".join(draw.choices(letters, k=40))
    stop = ["".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(draw.randint(1, 4))]
    ids = byte_tokenizer.encode(text, add_special_tokens=False)
    expected, is_stopped = read_by_characters(text, stop)
    stream, out, start = TextStream(byte_tokenizer, stop), "", 0
    while start < len(ids) and not stream.stopped:
        size = draw.randint(1, 7)
        out += stream.add(ids[start : start + size])
        start += size
        if not stream.stopped:
            come = byte_tokenizer.decode(ids[:start]).rstrip("\ufffd")
            assert out == read_by_characters(come, stop)[0]
    assert stream.stopped == is_stopped
    if is_stopped:
        assert out == expected
        read = byte_tokenizer.decode(stream.ids)
        assert any(read.endswith(s) for s in stop)
    else:
        assert out + stream.finish() == text
        assert stream.ids == ids
