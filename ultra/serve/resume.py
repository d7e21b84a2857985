"""One answer from as many replicas as it takes.

A replica that dies takes the requests with it that it has accepted, and Serve does not repeat
those. Asking again is safe: an answer depends on its question and its seed alone. What the client
has been told already goes back to the model as tokens to go on from.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from ultra.serve.events import Delta, Event, Opening, Question
from ultra.serve.limits import ApiError

logger = logging.getLogger(__name__)

PAUSE_S = 0.2
"""Before the next try, so that whoever died is known to be dead."""

Ask = Callable[[Question], AsyncGenerator[Event, None]]
"""Begins an answer, or goes on with one where the question's ticket says what has begun."""


async def answer_through(
    ask: Ask, question: Question, lost: tuple[type[Exception], ...], deadline_s: float
) -> AsyncGenerator[Event, None]:
    """Yield the events of one answer: an Opening once, then every Delta once; or a Refusal alone.

    Args:
        ask: may fail at any event with one of `lost`, and is asked again then.
        question: its ticket says when it came and what of the answer is known.
        lost: what a dead replica looks like.
        deadline_s: seconds from the request's arrival in which the answer must be complete.

    Raises:
        ApiError: when it is not.
    """
    deadline = question.ticket.created + deadline_s
    has_opening = False
    while time.time() < deadline:
        try:
            async with aclosing(ask(question)) as events:
                async for event in _until(deadline, events):
                    if isinstance(event, Opening):
                        if has_opening:
                            continue
                        has_opening = True
                    elif isinstance(event, Delta):
                        question = _go_on_from(question, event)
                    elif event.busy and (has_opening or question.ticket.begun is not None):
                        break  # whoever has heard half an answer is not sent away
                    yield event
                else:
                    return
        except TimeoutError:
            break
        except lost as error:
            logger.warning(
                "request %s lost a replica (%s) and goes on with another",
                question.ticket.id, type(error).__name__,
            )  # fmt: skip
        await asyncio.sleep(PAUSE_S)
    raise ApiError(f"no complete answer within {deadline_s:g} s", status=504, code="deadline")


def _go_on_from(question: Question, delta: Delta) -> Question:
    ticket = question.ticket
    begun = (*(ticket.begun or ()), *delta.token_ids)
    return replace(question, ticket=replace(ticket, begun=begun))


async def _until(
    deadline: float, events: AsyncGenerator[Event, None]
) -> AsyncGenerator[Event, None]:
    # Not one timeout around all of it: a generator may be read by one task after another.
    while True:
        async with asyncio.timeout(deadline - time.time()):
            try:
                event = await anext(events)
            except StopAsyncIteration:
                return
        yield event
