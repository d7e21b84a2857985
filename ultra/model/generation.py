"""Many answers at once: transformers' continuous batching, fed with visual tokens.

The engine takes token ids only; see `visual_table` for how visual tokens become ids. An exam asked
about again while it is still in the table keeps its ids, so the engine's prefix cache serves what
both prompts begin with.

Shapes: V visual tokens of a request, T of a frame, D width of the language model.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ultra.model.attention import by_request
from ultra.model.language import LanguageBranch
from ultra.model.sampling import make_processors
from ultra.model.scheduling import shortest_first
from ultra.model.visual_table import VisualTable
from ultra.types import VISUAL

FinishReason = Literal["stop", "length"]

_ALIVE_CHECK_S = 5.0
"""How soon a stream notices that the engine has died without a word."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt about one exam.

    Attributes:
        prompt_ids: token ids with VISUAL where the visual tokens go.
        tokens_VD: the visual tokens, of one frame or of several in a row.
        exam_key: names the visual tokens: equal keys must mean equal tokens.
        max_new_tokens: where the answer is cut.
        temperature: 0 takes the likeliest token each time; else tokens are drawn from
            softmax(logits / temperature).
        top_p: tokens are drawn from the likeliest ones alone that have this probability together.
        seed: the same seed draws the same tokens, whatever else is being answered. None is a
            fresh one each time.
        begun: token ids that the answer begins with, from whoever cannot go on with it. They are
            read like the prompt, and what follows is what would have followed there; it takes a
            seed where tokens are drawn.
    """

    prompt_ids: Sequence[int]
    tokens_VD: NDArray[np.float32]
    exam_key: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    begun: Sequence[int] = ()


class Busy(Exception):
    """Too much is waiting to be read; a request may come again later."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer's token ids, the end token among them when `finish_reason` is `stop`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Generator:
    """Answers many requests at a time, greedy and sampled ones; a context manager.

    It owns the language model between `start` and `stop`. `generate` may be called from any
    thread, `stream` on any event loop.

    Args:
        language: the model, with LoRA or without.
        tokens_per_frame: T.
        num_slots: frames whose visual tokens are held, which bounds the requests in flight.
        max_requests: requests that share a forward pass. The default is `num_slots` on a GPU and
            16 on a CPU, where more slow each other down: each also reads the others' cache.
        max_batch_tokens: tokens of one forward pass; longer prompts are cut into such pieces, and
            a short one waits for one of them at most. The default is 512 on a GPU and 128 on a
            CPU, which needs as long for twice the tokens as for one alone twice.
        max_prefill_tokens: tokens of prompts that may wait to be read; a stream that would add to
            more is Busy. The default is as many prompts of `max_length` as share a forward pass.
        page_size: tokens of a cache page; only whole pages of a prefix are reused.
        num_blocks: pages of the cache. The default holds 16 requests of `max_length` tokens, in
            at most 1 GiB on a CPU and half of what is free on a GPU, and never less than one.
    """

    def __init__(
        self,
        language: LanguageBranch,
        *,
        tokens_per_frame: int,
        num_slots: int = 64,
        max_requests: int | None = None,
        max_batch_tokens: int | None = None,
        max_prefill_tokens: int | None = None,
        page_size: int = 16,
        num_blocks: int | None = None,
    ) -> None:
        if isinstance(language.embedding, VisualTable):
            raise ValueError("this language model already has a generator")
        self._language = language
        self._tokens_per_frame = tokens_per_frame
        self._num_slots = num_slots
        on_cpu = language.base.device.type == "cpu"
        self._max_requests = max_requests or (min(16, num_slots) if on_cpu else num_slots)
        self._max_batch_tokens = max_batch_tokens or (128 if on_cpu else 512)
        longest = self._max_requests * language.config.max_length
        self._max_prefill_tokens = max_prefill_tokens or longest
        self._page_size = page_size
        self._num_blocks = num_blocks or _default_num_blocks(language, page_size)
        own = language.base.generation_config.eos_token_id
        self._end_ids = {language.tokenizer.eos_token_id, *np.atleast_1d(own if own else [])}
        weight: Any = language.embedding.weight
        self._vocab_size, self._dtype = len(weight), weight.dtype
        self._numbers = itertools.count()
        self._lock = threading.RLock()  # of the table and the dicts below
        self._one_caller = threading.Lock()  # the engine has one queue of finished answers
        self._running: dict[str, str] = {}  # request id -> exam key
        self._cancelled: dict[str, str] = {}
        self._unread: dict[str, int] = {}  # request id -> tokens to read before its first new one
        self._num_cancelled = 0
        self._table: VisualTable
        self._manager: Any = None

    @property
    def capacity(self) -> int:
        """The most tokens a prompt and its answer may have together."""
        return min(self._num_blocks * self._page_size, self._language.config.max_length)

    @property
    def alive(self) -> bool:
        """Whether the engine runs and takes requests."""
        manager = self._manager
        if manager is None or not manager.is_running():
            return False
        return manager.background_thread_status.can_accept_new_requests() is None

    @property
    def num_running(self) -> int:
        """Requests begun and neither finished nor cancelled."""
        return len(self._running)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the prompts of streams that have no new token yet."""
        return sum(list(self._unread.values()))

    @property
    def num_cancelled(self) -> int:
        """Requests so far that were not read to their end."""
        return self._num_cancelled

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the engine's thread."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        base = self._language.base.eval()
        text = base.get_input_embeddings()
        self._table = VisualTable(text, self._num_slots, self._tokens_per_frame)
        base.set_input_embeddings(self._table)
        self._own_attention = base.config._attn_implementation
        base.set_attn_implementation(by_request())
        # A fresh config: the model's own may ask for sampling or penalties.
        greedy: Any = GenerationConfig
        self._manager = base.init_continuous_batching(
            greedy(do_sample=False, eos_token_id=sorted(self._end_ids)),
            ContinuousBatchingConfig(
                page_size=self._page_size,
                num_blocks=self._num_blocks,
                max_batch_tokens=self._max_batch_tokens,
                max_requests_per_batch=self._max_requests,
                scheduler_type=shortest_first(),
                auto_switch_to_flash=False,  # it would fetch code from a hub
                use_cuda_graph=False,  # it would replay the noise of the first tokens
            ),
        )
        # The engine's choice stays greedy: drawing is noise in what it chooses from.
        self._manager.logit_processor = make_processors()
        router = self._manager.output_router
        router.deliver_batch = partial(_deliver_each, router)
        self._manager.warmup()  # makes the cache here, where an error can be seen
        self._manager.start()

    def stop(self) -> None:
        """Stop the thread, failing what still runs, and give the model its own embedding back."""
        if self._manager is None:
            return
        self._manager.stop(hard_stop=True)
        self._manager.destroy()
        self._manager = None
        self._language.base.set_input_embeddings(self._table.text)
        self._language.base.set_attn_implementation(self._own_attention)
        self._running.clear()
        self._cancelled.clear()
        self._unread.clear()

    def check(self, request: Request) -> None:
        """Return if the engine can take a request.

        Raises:
            ValueError: if it cannot; some such requests would stop the engine for all.
        """
        ids, tokens_VD = np.asarray(request.prompt_ids, dtype=np.int64), request.tokens_VD
        per_frame, width = self._tokens_per_frame, self._language.width
        places = ids == VISUAL
        if not len(ids) or request.max_new_tokens < 1:
            raise ValueError("a request needs a prompt and at least one new token")
        if tokens_VD.ndim != 2 or tokens_VD.shape[1] != width or len(tokens_VD) % per_frame:
            raise ValueError(
                f"visual tokens of shape {tokens_VD.shape}, "
                f"not (a multiple of {per_frame}, {width})"
            )
        if len(tokens_VD) > self._num_slots * per_frame:
            raise ValueError(f"{len(tokens_VD) // per_frame} frames, at most {self._num_slots} fit")
        if places.sum() != len(tokens_VD):
            raise ValueError(f"{len(tokens_VD)} visual tokens for {places.sum()} places")
        # They would reach the answers beside this one, through the mask of the attention.
        if not torch.tensor(tokens_VD).to(self._dtype).isfinite().all():
            raise ValueError("visual tokens hold NaN, infinity or more than their type can")
        # Ids beyond the vocabulary would read another exam's visual tokens.
        text = np.array([*ids[~places], *request.begun], dtype=np.int64)
        if not np.all((text >= 0) & (text < self._vocab_size)):
            raise ValueError(f"token ids must lie between 0 and {self._vocab_size - 1}")
        if not (0 <= request.temperature < inf and 0 < request.top_p <= 1):
            raise ValueError(
                f"temperature {request.temperature} and top_p {request.top_p}, but they must be "
                "finite and not below 0, and above 0 and at most 1"
            )
        if not -(2**63) <= (request.seed or 0) < 2**63:
            raise ValueError("a seed has at most 64 bits, one of them for the sign")
        if len(request.begun) > request.max_new_tokens:
            raise ValueError(
                f"{len(request.begun)} tokens of an answer of at most {request.max_new_tokens}"
            )
        size = len(request.prompt_ids)
        if size + request.max_new_tokens > self.capacity:
            raise ValueError(
                f"a prompt of {size} tokens and {request.max_new_tokens} new ones, but at "
                f"most {self.capacity} fit together"
            )

    def finish_reason(self, token_ids: Sequence[int]) -> FinishReason:
        """Return why an answer ended where it did."""
        return "stop" if token_ids and token_ids[-1] in self._end_ids else "length"

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the answers to all requests, in their order.

        Raises:
            ValueError: for a request the engine cannot take; none is started then.
            RuntimeError: when the engine has stopped.
        """
        for request in requests:
            self.check(request)
        waiting = deque(enumerate(requests))
        running: dict[str, int] = {}
        answers: list[tuple[int, ...]] = [()] * len(requests)
        number = next(self._numbers)
        with self._one_caller:
            try:
                while waiting or running:
                    while waiting and (prompt := self._reserve(str(number), waiting[0][1])):
                        index, request = waiting.popleft()
                        running[str(number)] = index
                        self._add(str(number), prompt, request, streaming=False)
                        number = next(self._numbers)
                    if not running:  # others hold all slots
                        time.sleep(0.01)
                        continue
                    output = self._manager.get_result(timeout=0.1)
                    if output is None:
                        self._check_alive()
                    elif output.request_id in running:
                        answers[running[output.request_id]] = tuple(_tokens_of(output))
                        del running[output.request_id]
                        self._let_go(output.request_id, finished=True)
            finally:
                for request_id in running:
                    self._let_go(request_id, finished=False)
        return [Completion(ids, self.finish_reason(ids)) for ids in answers]

    def stream(self, request: Request) -> Stream:
        """Return the answer's new token ids, to be read as they come; close it in any case.

        Raises:
            ValueError: for a request the engine cannot take.
            Busy: when too much waits before it.
            RuntimeError: when the engine has stopped.
        """
        self.check(request)
        size = len(request.prompt_ids) + len(request.begun)
        with self._lock:
            self._check_alive()
            waiting = self.num_prefill_tokens
            if waiting and waiting + size > self._max_prefill_tokens:
                raise Busy(f"{waiting} tokens of prompts are waiting to be read")
            request_id = str(next(self._numbers))
            self._unread[request_id] = size
        return Stream(self, request_id, request)

    def _reserve(self, request_id: str, request: Request) -> list[int] | None:
        """Return the engine's prompt, or None while the table is full."""
        with self._lock:
            self._check_alive()
            self._forget_cancelled()
            visual_ids = self._table.acquire(request.exam_key, request.tokens_VD)
            if visual_ids is None and not self._table.in_use:
                # The slots have given out all their ids: begin anew with an empty cache.
                waiting = dict(self._unread)
                self.stop()
                self.start()
                self._unread = waiting
                visual_ids = self._table.acquire(request.exam_key, request.tokens_VD)
            if visual_ids is None:
                return None
            self._running[request_id] = request.exam_key
        rest = iter(visual_ids)
        prompt = [next(rest) if i == VISUAL else int(i) for i in request.prompt_ids]
        return [*prompt, *map(int, request.begun)]

    def _add(self, request_id: str, prompt: list[int], request: Request, streaming: bool) -> None:
        options: dict[str, Any] = {}
        if request.temperature:
            seed = secrets.randbits(63) if request.seed is None else request.seed
            options = {
                "temperature": float(request.temperature),
                "top_p": float(request.top_p),
                "seed": seed,
            }
        added = self._manager.add_request(
            prompt,
            request_id=request_id,
            max_new_tokens=request.max_new_tokens - len(request.begun),
            streaming=streaming,
            **options,
        )
        if added is None:
            raise RuntimeError("the generation engine has stopped")
        self._check_alive()  # or nobody would ever take it out of the queue

    def _let_go(self, request_id: str, finished: bool) -> None:
        with self._lock:
            self._num_cancelled += not finished
            self._unread.pop(request_id, None)
            exam_key = self._running.pop(request_id, None)
            if exam_key is None:  # not begun, or the engine was stopped in between
                return
            self._scheduler.num_cached.pop(request_id, None)
            if finished:
                self._manager.output_router.result_handlers.pop(request_id, None)
                self._table.release(exam_key)
            else:
                self._cancelled[request_id] = exam_key
                again = _Again(self._manager, request_id)
                self._manager.output_router.result_handlers[request_id] = (None, again)
                self._manager.cancel_request(request_id)

    @property
    def _scheduler(self) -> Any:
        return self._manager.batch_processor.scheduler

    def _forget_cancelled(self) -> None:
        # The engine reports no end of a cancelled request, and reads its slots until it drops it.
        scheduler = self._scheduler
        for request_id, exam_key in list(self._cancelled.items()):
            if request_id in scheduler.active_requests or request_id in scheduler.waiting_requests:
                continue
            self._manager.output_router.result_handlers.pop(request_id, None)
            del self._cancelled[request_id]
            self._table.release(exam_key)

    def _listen(self, request_id: str, hear: Callable[[Any], None]) -> None:
        """Have the running event loop told what the engine makes of a request."""
        loop = asyncio.get_running_loop()
        handlers = self._manager.output_router.result_handlers
        handlers[request_id] = (hear, _Ear(loop, self, request_id))

    async def _next_of(self, arrived: asyncio.Queue[Any]) -> Any:
        while True:
            try:
                async with asyncio.timeout(_ALIVE_CHECK_S):
                    return await arrived.get()
            except TimeoutError:
                self._check_alive()

    def _begin(self, request_id: str) -> int:
        """Note that a prompt has been read, and return how much of it was remembered."""
        self._unread.pop(request_id, None)
        return int(self._scheduler.num_cached.get(request_id, 0))

    def _check_alive(self) -> None:
        if not self.alive:
            status = self._manager and self._manager.background_thread_status
            raise RuntimeError("the generation engine does not run") from (
                status and status.fatal_error
            )


@dataclass(frozen=True, slots=True)
class _Ear:
    """An event loop as the engine knows it, whose end is not the engine's."""

    loop: asyncio.AbstractEventLoop
    generator: Generator
    request_id: str

    def call_soon_threadsafe(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # it was closed, so nobody listens any more
            self.generator._let_go(self.request_id, finished=False)


@dataclass(frozen=True, slots=True)
class _Again:
    """Cancels a request at its next token, should the engine have heard of its end first."""

    manager: Any
    request_id: str

    def call_soon_threadsafe(self, callback: None, output: Any) -> None:
        if not output.is_finished():
            self.manager.cancel_request(self.request_id)


class Stream:
    """An answer's new token ids, in pieces as they come.

    Attributes:
        num_cached_tokens: tokens of the prompt that the engine remembered; known with the first
            piece.
    """

    def __init__(self, generator: Generator, request_id: str, request: Request) -> None:
        self.num_cached_tokens = 0
        self._generator, self._id, self._request = generator, request_id, request
        self._is_over = False
        self._pieces = self._read()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[int]:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Cancel what is left; the engine drops it before its next forward pass."""
        try:
            await self._pieces.aclose()
        finally:
            self._end(finished=False)

    async def _read(self) -> AsyncGenerator[list[int], None]:
        generator, request = self._generator, self._request
        if len(request.begun) == request.max_new_tokens or (
            generator.finish_reason(request.begun) == "stop"
        ):
            self._end(finished=True)
            return
        while (prompt := generator._reserve(self._id, request)) is None:
            await asyncio.sleep(0.01)
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        generator._listen(self._id, arrived.put_nowait)
        generator._add(self._id, prompt, request, streaming=True)
        finished, num_sent = False, 0
        while not finished:
            output = await generator._next_of(arrived)
            finished = output.is_finished()
            new_ids = _tokens_of(output)[num_sent:]
            if new_ids and not num_sent:
                self.num_cached_tokens = generator._begin(self._id)
            num_sent += len(new_ids)
            if finished:
                self._end(finished=True)
            if new_ids:
                yield new_ids

    def _end(self, finished: bool) -> None:
        if not self._is_over:
            self._is_over = True
            self._generator._let_go(self._id, finished)


def _deliver_each(router: Any, outputs: Sequence[Any]) -> None:
    # transformers tells a whole batch to the event loop of one of its requests.
    for output in outputs:
        router.deliver(output)


def _tokens_of(output: Any) -> list[int]:
    if output.error is not None:
        raise RuntimeError(f"the generation engine failed: {output.error}")
    tokens: list[int] = output.generated_tokens
    return tokens


def _default_num_blocks(language: LanguageBranch, page_size: int) -> int:
    config = language.base.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or language.width // config.num_attention_heads
    weight: Any = language.embedding.weight
    token_bytes: int = 2 * config.num_hidden_layers * num_heads * head_dim * weight.element_size()
    room = int(torch.cuda.mem_get_info(weight.device)[0]) // 2 if weight.is_cuda else 2**30
    longest: int = language.config.max_length
    return ceil(max(longest, min(16 * longest, room // token_bytes)) / page_size)
