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
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ultra.model.language import LanguageBranch
from ultra.model.sampling import make_processors
from ultra.model.visual_table import VisualTable
from ultra.types import VISUAL

FinishReason = Literal["stop", "length"]


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
    """

    prompt_ids: Sequence[int]
    tokens_VD: NDArray[np.float32]
    exam_key: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer's token ids, the end token among them when `finish_reason` is `stop`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


class Generator:
    """Answers many requests at a time, greedy and sampled ones; a context manager.

    It owns the language model between `start` and `stop`. `generate` may be called from any
    thread; all `stream`s must run on one event loop.

    Args:
        language: the model, with LoRA or without.
        tokens_per_frame: T.
        num_slots: frames whose visual tokens are held, which bounds the requests in flight.
        max_requests: requests that share a forward pass. The default is `num_slots` on a GPU and
            16 on a CPU, where more slow each other down: each also reads the others' cache.
        max_batch_tokens: tokens of one forward pass; longer prompts are cut into such pieces.
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
        max_batch_tokens: int = 512,
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
        self._max_batch_tokens = max_batch_tokens
        self._page_size = page_size
        self._num_blocks = num_blocks or _default_num_blocks(language, page_size)
        own = language.base.generation_config.eos_token_id
        self._end_ids = {language.tokenizer.eos_token_id, *np.atleast_1d(own if own else [])}
        self._vocab_size = len(language.base.get_input_embeddings().weight)
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # of the table and the two dicts below
        self._one_caller = threading.Lock()  # the engine has one queue of finished answers
        self._running: dict[str, str] = {}  # request id -> exam key
        self._cancelled: dict[str, str] = {}
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
        # A fresh config: the model's own may ask for sampling or penalties.
        greedy: Any = GenerationConfig
        self._manager = base.init_continuous_batching(
            greedy(do_sample=False, eos_token_id=sorted(self._end_ids)),
            ContinuousBatchingConfig(
                page_size=self._page_size,
                num_blocks=self._num_blocks,
                max_batch_tokens=self._max_batch_tokens,
                max_requests_per_batch=self._max_requests,
                auto_switch_to_flash=False,  # it would fetch code from a hub
                use_cuda_graph=False,  # it would replay the noise of the first tokens
            ),
        )
        # The engine's choice stays greedy: drawing is noise in what it chooses from.
        self._manager.logit_processor = make_processors()
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
        self._running.clear()
        self._cancelled.clear()

    def check(self, request: Request) -> None:
        """Return if the engine can take a request.

        Raises:
            ValueError: if it cannot; some such requests would stop the engine for all.
        """
        ids, tokens_VD = np.asarray(request.prompt_ids, dtype=np.int64), request.tokens_VD
        size, width = self._tokens_per_frame, self._language.width
        places = ids == VISUAL
        if not len(ids) or request.max_new_tokens < 1:
            raise ValueError("a request needs a prompt and at least one new token")
        if tokens_VD.ndim != 2 or tokens_VD.shape[1] != width or len(tokens_VD) % size:
            raise ValueError(
                f"visual tokens of shape {tokens_VD.shape}, not (a multiple of {size}, {width})"
            )
        if len(tokens_VD) > self._num_slots * size:
            raise ValueError(f"{len(tokens_VD) // size} frames, at most {self._num_slots} fit")
        if places.sum() != len(tokens_VD):
            raise ValueError(f"{len(tokens_VD)} visual tokens for {places.sum()} places")
        # Ids beyond the vocabulary would read another exam's visual tokens.
        if not np.all(places | ((ids >= 0) & (ids < self._vocab_size))):
            raise ValueError(f"token ids must lie between 0 and {self._vocab_size - 1}")
        if not (0 <= request.temperature < inf and 0 < request.top_p <= 1):
            raise ValueError(
                f"temperature {request.temperature} and top_p {request.top_p}, but they must be "
                "finite and not below 0, and above 0 and at most 1"
            )
        if not -(2**63) <= (request.seed or 0) < 2**63:
            raise ValueError("a seed has at most 64 bits, one of them for the sign")
        if len(ids) + request.max_new_tokens > self.capacity:
            raise ValueError(
                f"a prompt of {len(ids)} tokens and {request.max_new_tokens} new ones, but at "
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
        with self._one_caller:
            try:
                while waiting or running:
                    while waiting and (reserved := self._reserve(waiting[0][1])):
                        index, request = waiting.popleft()
                        running[reserved[0]] = index
                        self._add(*reserved, request, streaming=False)
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

    async def stream(self, request: Request) -> AsyncGenerator[list[int], None]:
        """Yield the answer's new token ids as they come; closing the iterator cancels the rest.

        Raises:
            ValueError: for a request the engine cannot take.
            RuntimeError: when the engine has stopped.
        """
        self.check(request)
        while (reserved := self._reserve(request)) is None:
            await asyncio.sleep(0.01)
        arrived: asyncio.Queue[Any] = asyncio.Queue()
        finished, num_sent = False, 0
        try:
            self._manager.register_result_handler(reserved[0], arrived.put_nowait)
            self._add(*reserved, request, streaming=True)
            while not finished:
                output = await arrived.get()
                finished = output.is_finished()
                new_ids = _tokens_of(output)[num_sent:]
                num_sent += len(new_ids)
                if new_ids:
                    yield new_ids
        finally:
            self._let_go(reserved[0], finished)

    def _reserve(self, request: Request) -> tuple[str, list[int]] | None:
        """Return a fresh request id and the engine's prompt, or None while the table is full."""
        with self._lock:
            self._check_alive()
            self._forget_cancelled()
            visual_ids = self._table.acquire(request.exam_key, request.tokens_VD)
            if visual_ids is None and not self._table.in_use:
                # The slots have given out all their ids: begin anew with an empty cache.
                self.stop()
                self.start()
                visual_ids = self._table.acquire(request.exam_key, request.tokens_VD)
            if visual_ids is None:
                return None
            request_id = str(next(self._numbers))
            self._running[request_id] = request.exam_key
        rest = iter(visual_ids)
        return request_id, [next(rest) if i == VISUAL else int(i) for i in request.prompt_ids]

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
            max_new_tokens=request.max_new_tokens,
            streaming=streaming,
            **options,
        )
        if added is None:
            raise RuntimeError("the generation engine has stopped")

    def _let_go(self, request_id: str, finished: bool) -> None:
        with self._lock:
            exam_key = self._running.pop(request_id, None)
            if exam_key is None:  # stopped in between
                return
            if finished:
                self._table.release(exam_key)
            else:
                self._cancelled[request_id] = exam_key
                self._manager.cancel_request(request_id)

    def _forget_cancelled(self) -> None:
        # The engine reports no end of a cancelled request, and reads its slots until it drops it.
        scheduler = self._manager.batch_processor.scheduler
        for request_id, exam_key in list(self._cancelled.items()):
            if request_id in scheduler.active_requests or request_id in scheduler.waiting_requests:
                continue
            self._manager.output_router.result_handlers.pop(request_id, None)
            del self._cancelled[request_id]
            self._table.release(exam_key)

    def _check_alive(self) -> None:
        if not self.alive:
            status = self._manager and self._manager.background_thread_status
            raise RuntimeError("the generation engine does not run") from (
                status and status.fatal_error
            )


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
