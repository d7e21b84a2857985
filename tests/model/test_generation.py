"""The Generator answers as transformers' own generate does, whatever else it is doing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ultra.model import checkpoint, visual_table
from ultra.model.generation import Busy, Generator, Request
from ultra.model.splice import splice
from ultra.model.visual_table import VisualTable
from ultra.types import VISUAL

T, D = 4, 24


@pytest.fixture(scope="module")
def language(random_checkpoint):
    return checkpoint.load_language(random_checkpoint)


@pytest.fixture(scope="module")
def generator(random_checkpoint):
    with Generator(checkpoint.load_language(random_checkpoint), tokens_per_frame=T) as generator:
        yield generator


def make_request(
    seed: int, exam: int | None = None, num_frames: int = 1, new: int = 24, words: int = 9
) -> Request:
    """A random prompt; the same exam has the same visual tokens and the same opening."""
    exam = seed if exam is None else exam
    of_exam = np.random.default_rng(exam)
    tokens_VD = of_exam.normal(size=(num_frames * T, D)).astype(np.float32)
    opening = of_exam.integers(3, 90, 3).tolist()
    text = np.random.default_rng([seed, 1]).integers(3, 90, words).tolist()
    prompt = [1, *opening, *[VISUAL] * (num_frames * T), *text]
    return Request(prompt, tokens_VD, f"exam-{exam}-{num_frames}", new)


@torch.no_grad()
def answer_alone(language, request: Request) -> list[int]:
    """What transformers gives for the same embeddings, one prompt at a time."""
    ids_1S = torch.tensor([list(request.prompt_ids)])
    embeds_1SD = splice(language.embedding, ids_1S, torch.from_numpy(request.tokens_VD))
    ids = language.model.generate(
        inputs_embeds=embeds_1SD,
        attention_mask=torch.ones_like(ids_1S),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
        eos_token_id=language.tokenizer.eos_token_id,
        pad_token_id=0,
    )
    return ids[0].tolist()


def expect(language, requests) -> list[list[int]]:
    return [answer_alone(language, r) for r in requests]


def check_answers(expected, completions) -> None:
    assert [list(c.token_ids) for c in completions] == expected
    for completion in completions:
        stopped = completion.token_ids[-1] == 2
        assert completion.finish_reason == ("stop" if stopped else "length")


def test_the_same_tokens_as_generate(language, generator) -> None:
    requests = [make_request(i, words=3 + 5 * (i % 4), new=8 + i) for i in range(10)]
    requests += [make_request(i, exam=i % 3) for i in range(10, 16)]  # exams asked again
    requests += [make_request(i, num_frames=2) for i in range(16, 19)]
    expected = expect(language, requests)
    assert len({tuple(ids) for ids in expected}) > 12  # the images and texts do matter
    check_answers(expected, generator.generate(requests))
    check_answers(expected, generator.generate(requests))  # now from cached prefixes


def make_small(language) -> Generator:
    """An engine with 96 tokens of cache: requests of up to 80 are thrown out and begun again."""
    return Generator(
        language,
        tokens_per_frame=T,
        num_slots=5,
        max_requests=3,
        max_batch_tokens=16,
        page_size=4,
        num_blocks=24,
    )


def sampled(request: Request, seed: int | None, temperature: float = 1.5, top_p: float = 0.95):
    return replace(request, temperature=temperature, top_p=top_p, seed=seed)


def token_ids(completions) -> list[list[int]]:
    return [list(c.token_ids) for c in completions]


@torch.no_grad()
def first_logits(language, request: Request) -> np.ndarray:
    """The logits of an answer's first token, by transformers alone."""
    ids_1S = torch.tensor([list(request.prompt_ids)])
    embeds_1SD = splice(language.embedding, ids_1S, torch.from_numpy(request.tokens_VD))
    return language.model(inputs_embeds=embeds_1SD).logits[0, -1].double().numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 1.0), (0.5, 0.5)])
def test_tokens_are_drawn_with_their_probabilities(language, generator, temperature, top_p) -> None:
    request = make_request(3, new=1)
    logits = first_logits(language, request) / temperature
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-probs)
    num_kept = int(np.searchsorted(np.cumsum(probs[order]), top_p) + 1)
    kept = order[:num_kept]
    completions = generator.generate(
        [sampled(request, seed, temperature, top_p) for seed in range(1500)]
    )
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=len(probs))
    if top_p < 1:
        assert 3 < num_kept < len(probs)
        assert counts[kept].sum() == 1500
    expected = 1500 * probs[kept] / probs[kept].sum()
    often = expected > 5  # chi-square wants enough of each; the others are one
    pooled = [[*values[often], values[~often].sum()] for values in (counts[kept], expected)]
    observed, wanted = (p if p[-1] > 0 else p[:-1] for p in pooled)
    assert often.sum() > 3
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_a_seed_draws_the_same_alone_and_among_others(language, generator) -> None:
    requests = [make_request(i, exam=i % 3, words=3 + 4 * i, new=20 + i) for i in range(8)]
    drawn = [sampled(r, seed=i - 3) for i, r in enumerate(requests)]
    alone = [ids for r in drawn for ids in token_ids(generator.generate([r]))]
    greedy = expect(language, requests)
    assert alone != greedy
    mixed = token_ids(
        generator.generate([r for pair in zip(drawn, requests, strict=True) for r in pair])
    )
    assert mixed[::2] == alone
    assert mixed[1::2] == greedy  # beside sampled ones as ever
    others = token_ids(generator.generate([sampled(r, seed=7 + i) for i, r in enumerate(requests)]))
    assert all(a != b for a, b in zip(others, alone, strict=True))


def test_a_seed_draws_the_same_from_a_prompt_read_again(language, generator) -> None:
    requests = [sampled(make_request(i, words=20 + i, new=30), seed=i) for i in range(10)]
    expected = token_ids(generator.generate(requests))
    # What was sent already becomes the end of the prompt.
    for request, ids in list(zip(requests, expected, strict=True))[:4]:
        for sent in (1, 13, len(ids) - 1):
            resumed = replace(
                request, prompt_ids=[*request.prompt_ids, *ids[:sent]], max_new_tokens=30 - sent
            )
            assert token_ids(generator.generate([resumed])) == [ids[sent:]]
    # Here the engine itself throws requests out and begins them again.
    with make_small(language) as small:
        assert token_ids(small.generate(requests)) == expected


def test_what_is_greedy_and_what_is_fresh(language, generator) -> None:
    request = make_request(1)
    (greedy,) = expect(language, [request])
    for change in (
        {"temperature": 0.0, "top_p": 0.1, "seed": 5},
        {"temperature": 2.0, "top_p": 1e-9},
    ):
        check_answers([greedy], generator.generate([replace(request, **change)]))
    fresh = token_ids(generator.generate([sampled(request, seed=None) for _ in range(4)]))
    assert len(set(map(tuple, fresh))) == 4


def test_an_exam_asked_again_reuses_its_prefix(language, generator) -> None:
    first, second, other = (make_request(i, exam=e) for i, e in ((0, 50), (1, 50), (0, 51)))
    long = [
        Request([*r.prompt_ids[:8], *range(3, 63), *r.prompt_ids[8:]], r.tokens_VD, r.exam_key, 2)
        for r in (first, second, other)
    ]
    expected = expect(language, long)
    num_read: list[int] = []
    hook = generator._table.register_forward_hook(
        lambda _, ids, __: num_read.append(ids[0].numel())
    )
    for request, ids in zip(long, expected, strict=True):
        check_answers([ids], generator.generate([request]))
    hook.remove()
    # 77 tokens and one more; the second shares 68 with the first: four whole pages of 16.
    assert num_read == [77, 1, 77 - 64, 1, 77, 1]


def test_few_slots_small_batches_and_a_small_cache(language) -> None:
    requests = [make_request(i, exam=i % 7, words=20 + i, new=30) for i in range(14)]
    requests += [make_request(i, num_frames=2, new=30) for i in range(14, 17)]
    expected = expect(language, requests)
    with make_small(language) as generator:
        check_answers(expected, generator.generate(requests))


def test_an_answer_that_ends_by_itself(language) -> None:
    request = make_request(0)
    first = answer_alone(language, request)[0]
    tokenizer = language.tokenizer
    eos = tokenizer.eos_token_id
    tokenizer.eos_token_id = first
    try:
        with Generator(language, tokens_per_frame=T) as generator:
            (completion,) = generator.generate([request])
    finally:
        tokenizer.eos_token_id = eos
    assert completion.token_ids == (first,)
    assert completion.finish_reason == "stop"


def test_streams_beside_a_blocking_caller(language) -> None:
    requests = [make_request(i, exam=i % 4, new=12 + i) for i in range(8)]
    expected = expect(language, requests)
    blocking: list = []

    async def collect(generator, request) -> list[int]:
        return [i async for new_ids in generator.stream(request) for i in new_ids]

    async def collect_all(generator) -> list[list[int]]:
        return await asyncio.gather(*(collect(generator, r) for r in requests))

    with Generator(language, tokens_per_frame=T, num_slots=6) as generator:
        thread = threading.Thread(target=lambda: blocking.extend(generator.generate(requests)))
        thread.start()
        streamed = asyncio.run(collect_all(generator))
        thread.join()
        check_answers(expected, blocking)
    assert streamed == expected


def test_a_stream_left_early_frees_its_slot(language) -> None:
    long = [make_request(i, new=300) for i in range(3)]
    after = make_request(9, new=5)
    expected = expect(language, [after])[0]

    async def leave(generator, request) -> None:
        async with contextlib.aclosing(generator.stream(request)) as stream:
            async for _ in stream:
                return

    async def run(generator) -> list[int]:
        for request in long:  # with one slot, each waits for the one before to be dropped
            await leave(generator, request)
        return [i async for new_ids in generator.stream(after) for i in new_ids]

    with Generator(language, tokens_per_frame=T, num_slots=1) as generator:
        assert asyncio.run(run(generator)) == expected
        router = generator._manager.output_router
        assert not router.result_handlers
        assert router.output_queue.empty()


async def read(stream) -> list[int]:
    async with contextlib.aclosing(stream):
        return [token async for new_ids in stream for token in new_ids]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.1, "top_p": 0.95, "seed": 9}])
def test_an_answer_goes_on_from_every_token_of_it(generator, options) -> None:
    request = replace(make_request(3, new=20), **options)
    (whole,) = generator.generate([request])
    ids = whole.token_ids
    assert len(ids) == 20

    async def go_on() -> None:
        # Together, so that each begins at another place of the same forward passes.
        cuts = range(len(ids) + 1)
        streams = [generator.stream(replace(request, begun=ids[:cut])) for cut in cuts]
        for cut, rest in zip(cuts, await asyncio.gather(*map(read, streams)), strict=True):
            assert rest == list(ids[cut:])

    asyncio.run(go_on())


def test_nothing_follows_an_answer_that_has_ended(generator) -> None:
    ended = replace(make_request(3, new=20), begun=(5, 2))
    assert asyncio.run(read(generator.stream(ended))) == []
    assert generator.num_prefill_tokens == 0
    with pytest.raises(ValueError, match="token ids must lie between"):
        generator.stream(replace(ended, begun=(10_000,)))
    with pytest.raises(ValueError, match="21 tokens of an answer of at most 20"):
        generator.stream(replace(ended, begun=(5,) * 21))


def test_how_much_of_a_prompt_is_remembered(language) -> None:
    first = make_request(50, words=40)
    texts = np.random.default_rng(1).integers(3, 90, (2, 7)).tolist()
    follow_up = replace(first, prompt_ids=[*first.prompt_ids, *texts[0]])
    other = replace(make_request(51), prompt_ids=first.prompt_ids)  # the same text, other frames

    async def ask(generator: Generator, request: Request) -> int:
        stream = generator.stream(request)
        await read(stream)
        return stream.num_cached_tokens

    with Generator(language, tokens_per_frame=T, page_size=4) as generator:
        assert asyncio.run(ask(generator, first)) == 0
        assert asyncio.run(ask(generator, follow_up)) == len(first.prompt_ids) // 4 * 4
        assert asyncio.run(ask(generator, other)) == 4  # the page before the frame


def test_too_much_to_read_is_refused_at_once(language) -> None:
    requests = [make_request(i, words=100, new=4) for i in range(6)]
    size = len(requests[0].prompt_ids)

    async def crowd(generator: Generator) -> None:
        streams = [generator.stream(request) for request in requests[:2]]
        assert generator.num_prefill_tokens == 2 * size
        with pytest.raises(Busy, match=f"{2 * size} tokens of prompts are waiting"):
            generator.stream(requests[2])
        await asyncio.gather(*map(read, streams))
        assert generator.num_prefill_tokens == 0
        kept = generator.stream(requests[2])
        await kept.aclose()  # never read
        assert (generator.num_prefill_tokens, generator.num_cancelled) == (0, 1)

    with Generator(language, tokens_per_frame=T, max_prefill_tokens=2 * size + 5) as generator:
        asyncio.run(crowd(generator))
    with Generator(language, tokens_per_frame=T, max_prefill_tokens=5) as generator:
        assert len(asyncio.run(read(generator.stream(requests[0])))) == 4  # one always comes in


def test_short_prompts_are_read_before_long_ones_that_came_first(language) -> None:
    # Read in pieces of 32, the four take some forty forward passes.
    long = [make_request(i, words=300, new=2) for i in range(4)]
    short = make_request(9, words=3, new=2)
    ended: list[str] = []

    async def note(name: str, stream) -> None:
        await read(stream)
        ended.append(name)

    async def race(generator: Generator) -> None:
        waiting = [note("long", generator.stream(request)) for request in long]
        await asyncio.gather(*waiting, note("short", generator.stream(short)))
        assert ended == ["short", *["long"] * 4]

    with Generator(language, tokens_per_frame=T, max_batch_tokens=32) as generator:
        asyncio.run(race(generator))


def test_a_cancelled_request_frees_its_slot_wherever_it_is(language) -> None:
    # One is being answered, one being read in pieces, one waits for a slot.
    requests = [make_request(0, new=300), make_request(1, words=300), make_request(2)]

    async def leave(generator: Generator) -> None:
        streams = [generator.stream(r) for r in requests]
        tasks = [asyncio.create_task(read(stream)) for stream in streams]
        await asyncio.sleep(0.1)
        assert generator.num_running == 2
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert generator.num_running == generator.num_prefill_tokens == 0
        assert generator.num_cancelled == 3
        again = [
            replace(r, exam_key=f"again-{i}", max_new_tokens=5) for i, r in enumerate(requests)
        ]
        answers = await asyncio.wait_for(
            asyncio.gather(*map(read, map(generator.stream, again))), 60
        )
        assert [len(a) for a in answers] == [5, 5, 5]

    with Generator(language, tokens_per_frame=T, num_slots=2, max_batch_tokens=8) as generator:
        asyncio.run(leave(generator))


def test_an_end_that_the_engine_hears_of_before_the_beginning(language) -> None:
    async def leave(generator: Generator) -> None:
        stream = generator.stream(make_request(0, new=300))
        await anext(stream)
        manager = generator._manager
        cancel, manager.cancel_request = manager.cancel_request, lambda _: None  # is lost
        await stream.aclose()
        manager.cancel_request = cancel
        async with asyncio.timeout(20):
            while generator._scheduler.active_requests:
                await asyncio.sleep(0.001)
        lengths.append(num_passes())

    def num_passes() -> int:
        return len(seen)

    seen: list = []
    lengths: list[int] = []
    with Generator(language, tokens_per_frame=T) as generator:
        deliver = generator._manager.output_router.deliver
        generator._manager.output_router.deliver = lambda output: (
            seen.append(output),
            deliver(output),
        )
        asyncio.run(leave(generator))
    assert lengths[0] < 100  # of 300


def test_requests_are_let_in_after_all_that_filled_the_cache_were_cancelled(language) -> None:
    options = {"num_slots": 9, "max_requests": 3, "max_batch_tokens": 16, "page_size": 4}
    requests = [make_request(i, new=60) for i in range(3)]

    async def fill(generator: Generator) -> None:
        tasks = [asyncio.create_task(read(generator.stream(r))) for r in requests]
        scheduler = generator._scheduler
        async with asyncio.timeout(60):
            while not scheduler.block_new_requests:
                await asyncio.sleep(0.001)
        waiting = set(scheduler.waiting_requests)
        for task, number in zip(tasks, range(3), strict=True):
            if str(number) not in waiting:
                task.cancel()
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        assert [len(d) for d in done if isinstance(d, list)] == [60] * len(waiting)

    with Generator(language, tokens_per_frame=T, num_blocks=100, **options) as generator:
        generator._num_blocks = 24  # too few for what the check lets in, as under offloading
        generator.stop()
        generator.start()
        asyncio.run(fill(generator))


def test_an_event_loop_that_ends_is_not_the_engines_end(language) -> None:
    async def abandon(generator: Generator) -> None:
        stream = generator.stream(make_request(0, new=300))
        await anext(stream)
        streams.append(stream)

    streams: list = []
    with Generator(language, tokens_per_frame=T) as generator:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(abandon(generator))
        loop.close()
        assert len(asyncio.run(read(generator.stream(make_request(1, new=5))))) == 5
        assert generator.alive


def test_ids_run_out_and_begin_anew(language, monkeypatch) -> None:
    # Room for two fills of each of two slots beyond the vocabulary.
    monkeypatch.setattr(visual_table, "MAX_ID", len(language.embedding.weight) + 2 * 2 * T)
    requests = [make_request(i) for i in range(5)]
    expected = expect(language, requests)
    with Generator(language, tokens_per_frame=T, num_slots=2) as generator:
        check_answers(expected, generator.generate(requests))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": []}, "needs a prompt"),
        ({"max_new_tokens": 0}, "at least one new token"),
        ({"max_new_tokens": 384}, "prompt of 17 tokens and 384 new ones, but at most 400 fit"),
        ({"prompt_ids": [VISUAL] * 3}, "4 visual tokens for 3 places"),
        ({"prompt_ids": [VISUAL] * T + [10_000]}, "token ids must lie between 0 and"),
        ({"prompt_ids": [VISUAL] * T + [-2]}, "token ids must lie between 0 and"),
        ({"temperature": -0.1}, "temperature -0.1 and top_p 1.0, but"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": 0.0}, "top_p 0.0, but they must be .* above 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"seed": 2**63}, "a seed has at most 64 bits"),
        ({"tokens_VD": np.zeros((5, D), np.float32)}, r"shape \(5, 24\), not \(a multiple of 4"),
        ({"tokens_VD": np.zeros((T, 3), np.float32)}, r"shape \(4, 3\)"),
        ({"tokens_VD": np.zeros((65 * T, D), np.float32)}, "65 frames, at most 64 fit"),
    ],
)
def test_what_would_stop_the_engine_is_refused(generator, change, message) -> None:
    good = make_request(0)
    with pytest.raises(ValueError, match=message):
        generator.generate([good, replace(good, **change)])
    assert generator.alive


def test_the_longest_request_that_fits(language) -> None:
    request = make_request(0, new=32 * 4 - 17)
    expected = expect(language, [request])
    with Generator(language, tokens_per_frame=T, page_size=4, num_blocks=32) as generator:
        assert generator.capacity == 128
        check_answers(expected, generator.generate([request]))
        with pytest.raises(ValueError, match="17 tokens and 112 new ones, but at most 128 fit"):
            generator.generate([make_request(0, new=112)])


def test_the_model_gets_its_embedding_back(language) -> None:
    own = language.embedding
    with Generator(language, tokens_per_frame=T) as generator:
        assert generator.alive
        assert language.embedding is not own
        with pytest.raises(ValueError, match="already has a generator"):
            Generator(language, tokens_per_frame=T)
    assert not generator.alive
    assert language.embedding is own


def test_a_dead_engine_says_so(language) -> None:
    request = make_request(0)
    with Generator(language, tokens_per_frame=T) as generator:
        generator._manager._generation_step = None  # not callable: the loop dies on it
        with pytest.raises(RuntimeError, match="engine failed: 'NoneType' object is not callable"):
            generator.generate([request])
        assert not generator.alive
        with pytest.raises(RuntimeError, match="does not run"):
            generator.generate([request])


def test_streams_fail_when_the_engine_dies(language) -> None:
    requests = [make_request(i, new=300) for i in range(3)]

    async def die(generator: Generator) -> list:
        streams = [generator.stream(request) for request in requests]
        reads = [asyncio.create_task(read(stream)) for stream in streams]
        while len(generator._unread) > 1:  # two are being answered, the third has no slot
            await asyncio.sleep(0.001)
        generator._manager._generation_step = None
        async with asyncio.timeout(30):
            return await asyncio.gather(*reads, return_exceptions=True)

    with Generator(language, tokens_per_frame=T, num_slots=2) as generator:
        failures = asyncio.run(die(generator))
        assert [type(failure) for failure in failures] == [RuntimeError] * 3
        assert not generator.alive
        assert generator.num_prefill_tokens == generator.num_running == 0
        with pytest.raises(RuntimeError, match="does not run"):
            generator.stream(requests[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_visual_tokens_that_are_no_numbers_are_refused(language, generator, value) -> None:
    request = make_request(0)
    tokens_VD = request.tokens_VD.copy()
    tokens_VD[1, 2] = value
    with pytest.raises(ValueError, match="visual tokens hold NaN, infinity or more"):
        generator.stream(replace(request, tokens_VD=tokens_VD, exam_key="broken"))
    check_answers([answer_alone(language, request)], generator.generate([request]))


def test_a_refilled_slot_has_new_ids() -> None:
    table = VisualTable(torch.nn.Embedding(10, D), num_slots=2, tokens_per_frame=T)
    a, b, c = (np.full((T, D), value, np.float32) for value in (1, 2, 3))
    ids_a, ids_b = table.acquire("a", a), table.acquire("b", b)
    assert (ids_a, ids_b) == ([10, 11, 12, 13], [14, 15, 16, 17])
    assert table.acquire("c", c) is None  # both are held
    table.release("a")
    assert table.acquire("a", a) == ids_a  # still there
    table.release("a")
    ids_c = table.acquire("c", c)
    assert ids_c == [18, 19, 20, 21]  # the slot of a, on its second round
    out = table(torch.tensor([ids_b + ids_c + [7]], dtype=torch.int32))
    assert torch.equal(out[0, :T], torch.from_numpy(b))
    assert torch.equal(out[0, T : 2 * T], torch.from_numpy(c))
    assert torch.equal(out[0, -1], table.text.weight[7])
    table.release("b")
    assert table.in_use
    with pytest.raises(ValueError, match="exam c: 8 visual tokens now, 4 before"):
        table.acquire("c", np.zeros((2 * T, D), np.float32))
