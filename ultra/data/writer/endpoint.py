"""Replies of an OpenAI-compatible endpoint: asked for within a budget, and kept once paid for.

A reply is a file named by its order's digest, written as soon as it has arrived. Whoever wants a
fresh one deletes the file.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, AsyncOpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion
from pydantic import SecretStr

from ultra import storage
from ultra.config import InstructionsConfig
from ultra.data.writer.orders import Order

State = Literal["paid", "kept", "left", "failed", "refused"]

MESSAGE_TOKENS = 64
"""Room for what an endpoint adds to the texts of a request: roles, separators."""

_READERS = 16
_HOPELESS = (401, 403, 404)
"""What one request is told, all would be told."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What was paid for.

    Attributes:
        content: the text; empty where the answer held none.
        finish_reason: as the endpoint gave it.
        cost: by the prices of the run that paid.
    """

    content: str
    finish_reason: str
    cost: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order.

    Attributes:
        state: paid now, kept from before, left because it could exceed the cap, failed, or refused
            together with all others.
        detail: why, for the last two.
        cost: what it cost now.
    """

    state: State
    detail: str = ""
    cost: float = 0.0


def read_reply(folder_uri: str, digest: str) -> Reply | None:
    """Return the kept reply to an order; None where there is none."""
    uri = _reply_uri(folder_uri, digest)
    if not storage.exists(uri):
        return None
    kept = json.loads(storage.read_bytes(uri))
    return Reply(kept["content"], kept["finish_reason"], kept["cost"])


def read_costs(folder_uri: str) -> dict[str, float]:
    """Return the digest of every kept reply, with its cost."""
    files = storage.list_files(storage.join(folder_uri, "replies"), ".json")
    digests = [file.rsplit("/", 1)[-1].removesuffix(".json") for file in files]
    with ThreadPoolExecutor(_READERS) as pool:
        replies = pool.map(partial(read_reply, folder_uri), digests)
    return {d: reply.cost for d, reply in zip(digests, replies, strict=True) if reply}


def _write_reply(folder_uri: str, order: Order, reply: Reply) -> None:
    kept = {"format": 1, **asdict(reply), "request": order.body}
    text = json.dumps(kept, ensure_ascii=False)
    storage.write_bytes(_reply_uri(folder_uri, order.digest), text.encode())


def _reply_uri(folder_uri: str, digest: str) -> str:
    return storage.join(folder_uri, "replies", f"{digest}.json")


class Endpoint:
    """Asks for what is not kept yet, `max_concurrency` orders at a time, within the cap.

    The cap holds whatever the endpoint does: an order starts only when the most it can cost still
    fits. One without `usage`, or whose answer was lost on the way, counts as the most.
    """

    def __init__(self, config: InstructionsConfig, api_key: SecretStr) -> None:
        self.config = config
        self.kept = read_costs(config.replies_uri)
        self.spent = sum(self.kept.values())
        self._reserved: dict[str, float] = {}
        self._refused = ""
        self._purse = asyncio.Condition()
        self._free = asyncio.Semaphore(config.max_concurrency)
        self._under_way: dict[str, asyncio.Task[Outcome]] = {}
        self._client = AsyncOpenAI(
            base_url=config.base_url,
            api_key=api_key.get_secret_value(),
            max_retries=config.max_retries,
            timeout=config.timeout_s,
        )

    async def ask(self, order: Order) -> Outcome:
        """Pay for the reply to an order, unless it is kept or could exceed the cap."""
        if order.digest in self.kept:
            return Outcome("kept")
        task = self._under_way.get(order.digest)
        if task is not None:  # exams with one report share its reply
            outcome = await task
            return Outcome("kept") if outcome.state == "paid" else outcome
        task = asyncio.create_task(self._ask_when_free(order))
        self._under_way[order.digest] = task
        try:
            return await task
        finally:
            del self._under_way[order.digest]

    async def _ask_when_free(self, order: Order) -> Outcome:
        most = self.most(order)
        async with self._free:
            if self._refused:
                return Outcome("refused", self._refused)
            if not await self._reserve(order.digest, most):
                return Outcome("left")
            spent = 0.0
            try:
                outcome, spent = await self._pay(order, most)
                return outcome
            finally:
                await self._settle(order.digest, spent)

    async def _pay(self, order: Order, most: float) -> tuple[Outcome, float]:
        """Return what became of an order, and what it cost or may have cost."""
        try:
            completion = await self._client.chat.completions.create(
                model=order.body["model"],
                messages=order.body["messages"],
                extra_body=order.body,
                extra_headers={"Idempotency-Key": order.digest},  # for those that honour it
            )
        except APIStatusError as error:
            return self._status(error), 0.0
        except APIConnectionError as error:
            lost = "no answer in time" if isinstance(error, APITimeoutError) else "connection lost"
            return Outcome("failed", lost), most if _was_sent(error) else 0.0
        except (APIError, ValueError):  # ValueError: no JSON
            return Outcome("failed", "the answer is not JSON"), most
        if not hasattr(completion, "choices"):
            return Outcome("failed", "the answer is not JSON"), most
        reply = self._read(completion, most)
        await asyncio.to_thread(_write_reply, self.config.replies_uri, order, reply)
        self.kept[order.digest] = reply.cost
        return Outcome("paid", cost=reply.cost), reply.cost

    def most(self, order: Order) -> float:
        """Return the most an order can cost: a token is at least one byte of its texts."""
        texts = [message["content"] for message in order.body["messages"]]
        prompt = sum(len(text.encode()) + MESSAGE_TOKENS for text in texts)
        return self._price(prompt, order.body["max_tokens"])

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        prompt = prompt_tokens * self.config.prompt_price
        return (prompt + completion_tokens * self.config.completion_price) / 1e6

    def _read(self, completion: ChatCompletion, most: float) -> Reply:
        """Return the reply of an answer of whatever shape: what was paid for is kept."""
        cost = most
        if isinstance(completion.usage, CompletionUsage):
            counts = completion.usage.prompt_tokens, completion.usage.completion_tokens
            cost = self._price(*counts) if all(isinstance(n, int) for n in counts) else most
        choices = completion.choices if isinstance(completion.choices, list) else []
        message = getattr(choices[0], "message", None) if choices else None
        content = getattr(message, "content", None)
        reason = getattr(choices[0], "finish_reason", None) if choices else "no choices"
        return Reply(content if isinstance(content, str) else "", str(reason), cost)

    def _status(self, error: APIStatusError) -> Outcome:
        if error.status_code in _HOPELESS or error.code == "insufficient_quota":
            self._refused = f"status {error.status_code}: {' '.join(error.message.split())[:300]}"
            return Outcome("refused", self._refused)
        return Outcome("failed", f"status {error.status_code}")

    async def _reserve(self, digest: str, most: float) -> bool:
        """Put the most an order can cost aside; wait for others where that may make it fit."""
        cap = self.config.spend_cap

        def fits() -> bool:
            return cap is None or self.spent + sum(self._reserved.values()) + most <= cap

        async with self._purse:
            await self._purse.wait_for(lambda: fits() or not self._reserved)
            if fits():
                self._reserved[digest] = most
            return digest in self._reserved

    async def _settle(self, digest: str, spent: float) -> None:
        async with self._purse:
            self.spent += spent
            del self._reserved[digest]
            self._purse.notify_all()


def _was_sent(error: APIConnectionError) -> bool:
    """Return whether an endpoint may have worked on a request, and may ask for its price."""
    return type(error.__cause__).__name__ not in {"ConnectError", "ConnectTimeout"}
