"""The endpoint end to end: throughput, latency, what Serve adds, follow-ups, short behind long.

    python -m benchmarks.endpoint

A random language model of 256 channels and 6 layers behind the tiny encoders, one replica of each
part, answers of 64 tokens over SSE. `benchmarks.engine` has the bare engine's side.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx

from benchmarks.stand import (
    QUESTIONS,
    Reply,
    Stand,
    ask,
    ask_all,
    make_checkpoint,
    make_frames,
    make_question,
    percentiles,
    serving,
    spread,
    write_result,
)
from ultra.data.schema import content_digest
from ultra.serve.encoder import Encoder
from ultra.serve.events import Delta, Question
from ultra.serve.language import Language
from ultra.types import Turn

LEVELS = (1, 4, 8, 16, 32)
NUM_EXAMS = 8
MAX_TOKENS = 64
HEAD_START_S = 0.1
"""Of long prompts: they are in the engine by then, and not all of them read."""

LONG_TEXT = "请结合既往检查描述超声所见。" * 90
"""About 1,260 characters, each a token of the tiny tokenizer."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = make_checkpoint(folder)
        # Before Serve starts, so that neither takes time from the other.
        bare_s, answers = asyncio.run(ask_bare(uri, args.rounds))
        with serving(folder, uri) as stand:
            asyncio.run(ask_all(stand.url, _questions(NUM_EXAMS), 4))  # warm
            throughput = asyncio.run(measure_levels(stand, answers, args.rounds))
            result = {
                "throughput": throughput,
                "alone": asyncio.run(compare_with_bare(stand, bare_s, args.rounds)),
                "short_behind_long": asyncio.run(ask_behind_long(stand, args.rounds)),
                "follow_ups": asyncio.run(follow_up(stand, 4 * args.rounds)),
            }
    speedup = throughput["levels"]["16"]["against_one_stream"]["median"]
    write_result(
        "endpoint",
        result,
        {
            "16_streams_against_one": speedup,
            "identical": throughput["identical"],
            "serve_adds_ms": result["alone"]["serve_adds_ms"],
            "short_behind_long": {
                count: found["ratio"]
                for count, found in result["short_behind_long"]["behind"].items()
            },
            "follow_up_ttft": result["follow_ups"]["ratio"]["median"],
        },
    )


def _questions(count: int, **fields: Any) -> list[dict[str, Any]]:
    fields = {"max_tokens": MAX_TOKENS, "stream": True, **fields}
    return [make_question(number % NUM_EXAMS, **fields) for number in range(count)]


async def measure_levels(stand: Stand, answers: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return tokens per second and latencies at each level, in rounds over all of them."""
    rates: dict[int, list[float]] = {level: [] for level in LEVELS}
    replies: dict[int, list[Reply]] = {level: [] for level in LEVELS}
    for _ in range(rounds):
        for level in LEVELS:
            questions = _questions(max(level, 4))
            start = time.perf_counter()
            came = await ask_all(stand.url, questions, level)
            seconds = time.perf_counter() - start
            rates[level].append(sum(r.usage["completion_tokens"] for r in came) / seconds)
            replies[level] += came
    every = [r for level in LEVELS for r in replies[level]]
    wrong = sum(r.text not in answers or r.error != "" for r in every)
    levels = {}
    for level in LEVELS:
        ratios = [rate / one for rate, one in zip(rates[level], rates[1], strict=True)]
        levels[str(level)] = {
            "tokens_per_s": spread(rates[level], 1),
            "against_one_stream": spread(ratios, 2),
            "first_text_s": percentiles([r.first_s for r in replies[level]]),
            "between_texts_s": percentiles([g for r in replies[level] for g in r.gaps_s]),
        }
    return {"answers": len(every), "identical": len(every) - wrong, "levels": levels}


async def ask_bare(checkpoint_uri: str, rounds: int) -> tuple[list[float], list[str]]:
    """Return the seconds to the first text, and the texts, of encoder and engine without Serve."""
    encoder, language = Encoder(checkpoint_uri), Language(checkpoint_uri, 256)
    firsts, texts = [], []
    try:
        for number in range(max(4 * rounds, 2 * NUM_EXAMS)):  # every exam, and warm
            frames = make_frames(4, number % NUM_EXAMS)
            turns = (Turn("user", QUESTIONS[0], has_frames=True),)
            question = Question(turns, (), MAX_TOKENS)
            start, text = time.perf_counter(), ""
            visual, _ = await encoder.look(frames)
            events = language.answer(visual, content_digest(frames), question)
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Delta):
                        if not text:
                            firsts.append(time.perf_counter() - start)
                        text += event.text
            texts.append(text)
    finally:
        language.stop()
    return firsts[len(firsts) // 2 :], texts  # those of warm exams


async def compare_with_bare(stand: Stand, bare_s: Sequence[float], rounds: int) -> dict[str, Any]:
    """Return the first text's delay of one request at a time, with Serve and without."""
    replies = await ask_all(stand.url, _questions(4 * rounds), 1)
    served_s = [reply.first_s for reply in replies]
    adds = statistics.median(served_s) - statistics.median(bare_s)
    return {
        "bare_first_text_s": percentiles(bare_s),
        "served_first_text_s": percentiles(served_s),
        "serve_adds_ms": round(1000 * adds, 1),
    }


async def ask_behind_long(stand: Stand, rounds: int) -> dict[str, Any]:
    """Return the first text's delay of a short question alone and behind long prompts."""
    alone: list[float] = []
    behind: dict[int, list[float]] = {1: [], 4: [], 8: []}
    overtaken: dict[int, int] = dict.fromkeys(behind, 0)
    async with httpx.AsyncClient(base_url=stand.url, timeout=300) as client:
        for turn in range(4 * rounds):
            alone.append((await ask(client, _short(turn))).first_s)
        for turn in range(rounds):
            for count, seconds in behind.items():
                asked = [_long(100 * turn + 10 * count + number) for number in range(count)]
                long = [asyncio.create_task(ask(client, question)) for question in asked]
                await asyncio.sleep(HEAD_START_S)
                seconds.append((await ask(client, _short(turn))).first_s)
                for reply in await asyncio.gather(*long):
                    overtaken[count] += reply.first_s > HEAD_START_S + seconds[-1]
    median = statistics.median(alone)
    return {
        "alone_s": spread(alone),
        "behind": {
            str(count): {
                "first_text_s": spread(seconds),
                "ratio": round(statistics.median(seconds) / median, 2),
                "long_overtaken": f"{overtaken[count]} of {count * rounds}",
            }
            for count, seconds in behind.items()
        },
    }


def _short(turn: int) -> dict[str, Any]:
    return make_question(
        turn % NUM_EXAMS, text=f"{turn}。{QUESTIONS[2]}", max_tokens=8, stream=True
    )


def _long(number: int) -> dict[str, Any]:
    # Another beginning each time, so that no prompt is remembered.
    return make_question(
        number % NUM_EXAMS, text=f"{number}。{LONG_TEXT}", max_tokens=16, stream=True
    )


async def follow_up(stand: Stand, num_exams: int) -> dict[str, Any]:
    """Return how much sooner the second question about an exam of 16 frames is answered."""
    first, second, cached_frames, cached_tokens = [], [], 0, 0
    async with httpx.AsyncClient(base_url=stand.url, timeout=300) as client:
        for number in range(num_exams):
            question = make_question(10_000 + number, num_frames=16, max_tokens=8, stream=True)
            reply = await ask(client, question)
            first.append(reply.first_s)
            asked = [
                *question["messages"],
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": QUESTIONS[1]},
            ]
            again = await ask(client, {**question, "messages": asked})
            second.append(again.first_s)
            cached_frames += again.ultra["num_cached_frames"]
            cached_tokens += again.usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "exams": num_exams,
        "first_s": spread(first),
        "follow_up_s": spread(second),
        "ratio": spread([b / a for a, b in zip(first, second, strict=True)]),
        "frames_not_encoded_again": cached_frames / (16 * num_exams),
        "prompt_tokens_remembered": round(cached_tokens / num_exams, 1),
    }


if __name__ == "__main__":
    main()
