"""The generation engine beside transformers' generate, on the same weights in the same run.

    python -m benchmarks.engine
    python -m benchmarks.engine --weights PATH    # a transformers directory or a .gguf file
    python -m benchmarks.engine --quick           # small; prints its result and keeps nothing

At each number of concurrent requests the same requests are answered one at a time, in one
left-padded batch, and by the Generator, one after the other, five times; equal answers are all 48
tokens long, unequal ones 8 to 128. Only tokens that were asked for count: a static batch also
computes what follows the end of its shorter answers. Then streams are read for the time to the
first token and between tokens, and a short prompt is asked while long ones are being read.

Shapes: V visual tokens of a request, B rows, S tokens, D width of the language model.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.stand import make_language, percentiles, spread, write_result
from ultra.config import LanguageConfig
from ultra.model.generation import Generator, Request
from ultra.model.language import LanguageBranch
from ultra.model.splice import splice
from ultra.types import VISUAL

TOKENS_PER_FRAME = 16
SHORT = 40
"""Tokens of the prompt that is asked behind long ones."""

Answers = list[list[int]]
Answerer = Callable[[Sequence[Request]], tuple[Answers, float]]
"""Returns answers, and the seconds they took."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        levels: numbers of concurrent requests.
        equal: new tokens of each request; `unequal` are the fewest and the most.
        behind: numbers of long prompts that the short one is asked behind.
        delays_s: when it is asked, after the long ones.
    """

    width: int = 512
    layers: int = 8
    max_length: int = 1536
    levels: tuple[int, ...] = (1, 4, 8, 16, 32)
    repeats: int = 5
    equal: int = 48
    unequal: tuple[int, int] = (8, 128)
    behind: tuple[int, ...] = (1, 4, 16)
    delays_s: tuple[float, ...] = (0.05, 0.3, 0.7, 1.3, 2.1)


QUICK = Plan(
    width=64, layers=2, max_length=256, levels=(1, 4), repeats=1, equal=6, unequal=(2, 9),
    behind=(1, 2), delays_s=(0.0,),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="default: a random LLaMA made here")
    parser.add_argument("--levels", type=int, nargs="+", help="default: 1 4 8 16 32")
    parser.add_argument("--repeats", type=int, help="default: 5")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    plan = QUICK if args.quick else Plan()
    plan = replace(
        plan,
        levels=tuple(args.levels or plan.levels),
        repeats=args.repeats or plan.repeats,
        behind=() if args.weights else plan.behind,  # takes too long with real weights
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = args.weights or make_language(Path(folder), plan.width, plan.layers)
        result = measure(weights, plan)
    result["weights"] = str(args.weights.name if args.weights else "random LLaMA")
    if args.quick:
        print(json.dumps(result))
    else:
        name = f"engine-{args.weights.stem}".lower() if args.weights else "engine"
        write_result(name, result, headline(result))


def measure(weights: Path, plan: Plan) -> dict[str, Any]:
    """Return every figure; `identical` of the answers of each kind and level counts `of` all."""
    config = LanguageConfig(weights=str(weights), lora=None, max_length=plan.max_length)
    language = LanguageBranch(config).eval()
    answer_in_turn(language, make_requests(language, 2, 98, (2, 2)))  # the first time takes longer
    shapes = {"equal": (plan.equal, plan.equal), "unequal": plan.unequal}
    return {
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in language.parameters()),
        "tokens_per_s": {
            name: {str(level): compare(language, level, new, plan.repeats) for level in plan.levels}
            for name, new in shapes.items()
        },
        "latency_s": {
            str(level): measure_latency(language, make_requests(language, level, 99, plan.unequal))
            for level in plan.levels
        },
        "short_behind_long": measure_fairness(language, plan),
    }


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """Return the ratios that matter, at 16 requests."""
    equal, unequal = (result["tokens_per_s"][kind]["16"] for kind in ("equal", "unequal"))
    rows = [row for kind in result["tokens_per_s"].values() for row in kind.values()]
    return {
        "over_one_at_a_time": equal["over_one_at_a_time"],
        "over_static_equal": equal["over_static"],
        "over_static_unequal": unequal["over_static"],
        "identical": f"{sum(r['identical'] for r in rows)} of {sum(r['of'] for r in rows)}",
        "short_over_alone": result["short_behind_long"]["over_alone"],
    }


def make_requests(
    language: LanguageBranch, count: int, seed: int, new: tuple[int, int]
) -> list[Request]:
    """Return requests about different exams, with prompts of 40 to 100 tokens."""
    draw = np.random.default_rng([seed, count])
    lengths = np.linspace(*new, count).round().astype(int)
    draw.shuffle(lengths)
    return [
        make_request(language, int(draw.integers(2**31)), int(draw.integers(40, 101)), int(length))
        for length in lengths
    ]


def make_request(language: LanguageBranch, seed: int, size: int, new: int) -> Request:
    """Return a request with a random prompt of `size` tokens."""
    draw = np.random.default_rng(seed)
    config = language.base.config.get_text_config()
    shape = (TOKENS_PER_FRAME, language.width)
    tokens_VD = draw.normal(0, config.initializer_range, shape).astype(np.float32)
    text = draw.integers(5, config.vocab_size, size - TOKENS_PER_FRAME).tolist()
    return Request([*text[:4], *[VISUAL] * TOKENS_PER_FRAME, *text[4:]], tokens_VD, str(seed), new)


def compare(
    language: LanguageBranch, level: int, new: tuple[int, int], repeats: int
) -> dict[str, Any]:
    """Return tokens per second of the three ways, and how many answers agree in all three."""
    ways: dict[str, Answerer] = {
        "one_at_a_time": lambda requests: answer_in_turn(language, requests),
        "static": lambda requests: answer_as_batch(language, requests),
        "engine": lambda requests: answer_with_engine(language, requests),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    identical = 0
    for repeat in range(repeats):
        requests = make_requests(language, level, repeat, new)
        answers = {}
        for name, answer in ways.items():
            answers[name], seconds = answer(requests)
            rates[name].append(sum(map(len, answers[name])) / seconds)
        identical += sum(a == b == c for a, b, c in zip(*answers.values(), strict=True))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    return {
        **{name: spread(values, 1) for name, values in rates.items()},
        "over_one_at_a_time": round(medians["engine"] / medians["one_at_a_time"], 2),
        "over_static": round(medians["engine"] / medians["static"], 2),
        "identical": identical,
        "of": repeats * level,
    }


def answer_in_turn(language: LanguageBranch, requests: Sequence[Request]) -> tuple[Answers, float]:
    """Answer by transformers' generate, one request after another."""
    begun = time.perf_counter()
    answers = [_generate(language, [request])[0] for request in requests]
    return answers, time.perf_counter() - begun


def answer_as_batch(language: LanguageBranch, requests: Sequence[Request]) -> tuple[Answers, float]:
    """Answer by transformers' generate, all in one left-padded batch."""
    begun = time.perf_counter()
    answers = _generate(language, requests)
    return answers, time.perf_counter() - begun


@torch.no_grad()
def _generate(language: LanguageBranch, requests: Sequence[Request]) -> Answers:
    longest = max(len(request.prompt_ids) for request in requests)
    embeds_BSD = torch.zeros(len(requests), longest, language.width)
    mask_BS = torch.zeros(len(requests), longest, dtype=torch.long)
    for row, request in enumerate(requests):
        ids_1S = torch.tensor([list(request.prompt_ids)])
        start = longest - ids_1S.shape[1]
        visual_VD = torch.from_numpy(request.tokens_VD)
        embeds_BSD[row, start:] = splice(language.embedding, ids_1S, visual_VD)[0]
        mask_BS[row, start:] = 1
    end = language.tokenizer.eos_token_id
    ids_BS = language.base.generate(
        inputs_embeds=embeds_BSD,
        attention_mask=mask_BS,
        max_new_tokens=max(request.max_new_tokens for request in requests),
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    return [
        _until_end(ids[: request.max_new_tokens], end)
        for ids, request in zip(ids_BS.tolist(), requests, strict=True)
    ]


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


@contextmanager
def _engine(language: LanguageBranch) -> Iterator[Generator]:
    # A fresh one each time, so that nothing is remembered, and warm.
    with Generator(language, tokens_per_frame=TOKENS_PER_FRAME) as generator:
        generator.generate([make_request(language, 2**32, SHORT, 2)])
        yield generator


def answer_with_engine(
    language: LanguageBranch, requests: Sequence[Request]
) -> tuple[Answers, float]:
    """Answer by the Generator, its start not counted."""
    with _engine(language) as generator:
        begun = time.perf_counter()
        completions = generator.generate(requests)
        seconds = time.perf_counter() - begun
    return [list(completion.token_ids) for completion in completions], seconds


def measure_latency(language: LanguageBranch, requests: Sequence[Request]) -> dict[str, Any]:
    """Return percentiles of the seconds to the first token and between tokens, all at once."""

    async def ask_all(generator: Generator) -> list[list[float]]:
        return await asyncio.gather(*(_read_times(generator, r) for r in requests))

    with _engine(language) as generator:
        times = asyncio.run(ask_all(generator))
    gaps = [b - a for moments in times for a, b in itertools.pairwise(moments)]
    return {
        "first_token": percentiles([moments[0] for moments in times]),
        "between_tokens": percentiles(gaps),
    }


async def _read_times(generator: Generator, request: Request) -> list[float]:
    """Return when each piece of an answer came, in seconds since it was asked."""
    begun = time.perf_counter()
    return [time.perf_counter() - begun async for _ in generator.stream(request)]


def measure_fairness(language: LanguageBranch, plan: Plan) -> dict[str, Any]:
    """Return the seconds to a short prompt's first token, alone and behind long ones."""
    seeds = itertools.count(10**6)
    first_s: dict[str, list[float]] = {}
    with _engine(language) as generator:
        for count in (0, *plan.behind):
            first_s[str(count)] = [
                asyncio.run(_ask_behind(generator, language, plan, count, delay_s, seeds))
                for delay_s in plan.delays_s
            ]
    alone_s = float(np.median(first_s["0"]))
    return {
        "prompt_tokens": {"short": SHORT, "long": plan.max_length - 4},
        "first_token_s": {count: spread(values, 4) for count, values in first_s.items()},
        "over_alone": {
            count: round(float(np.median(values)) / alone_s, 2) for count, values in first_s.items()
        },
    }


async def _ask_behind(
    generator: Generator,
    language: LanguageBranch,
    plan: Plan,
    count: int,
    delay_s: float,
    seeds: Iterator[int],
) -> float:
    long = [make_request(language, next(seeds), plan.max_length - 4, 4) for _ in range(count)]
    short = make_request(language, next(seeds), SHORT, 1)
    tasks = [asyncio.create_task(_read_times(generator, request)) for request in long]
    await asyncio.sleep(delay_s)
    (first_s,) = await _read_times(generator, short)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return first_s


if __name__ == "__main__":
    main()
