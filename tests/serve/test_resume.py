"""One answer from several replicas, told once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from ultra.serve import resume
from ultra.serve.events import Delta, Event, Opening, Question, Refusal, Ticket
from ultra.serve.limits import ApiError
from ultra.serve.resume import answer_through
from ultra.types import Turn

TOKENS = (7, 11, 13, 17)


def make_question(**ticket) -> Question:
    """A question that comes now, for its deadline counts from then."""
    return Question((Turn("user", "?"),), (b"",), None, ticket=Ticket(**ticket))


class Gone(Exception):
    pass


class Replicas:
    """Answers with TOKENS, going on from what is begun; dies after so many events each time."""

    def __init__(self, *lives: int, error: type[Exception] = Gone) -> None:
        self.lives = list(lives)
        self.error = error
        self.asked: list[tuple[int, ...] | None] = []
        self.closed = 0

    async def __call__(self, question: Question) -> AsyncGenerator[Event, None]:
        begun = question.ticket.begun
        self.asked.append(begun)
        life = self.lives.pop(0) if self.lives else 99
        try:
            async for event in self._events(len(begun or ())):
                if not life:
                    raise self.error
                life -= 1
                yield event
        finally:
            self.closed += 1

    async def _events(self, start: int) -> AsyncGenerator[Event, None]:
        yield Opening(0, (1.0,), 5)
        for number in range(start, len(TOKENS)):
            yield Delta(f"<{TOKENS[number]}>", number + 1, token_ids=(TOKENS[number],))
        yield Delta("", len(TOKENS), "stop")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch) -> None:
    monkeypatch.setattr(resume, "PAUSE_S", 0.0)


def read(ask, question: Question | None = None, deadline_s: float = 30) -> list[Event]:
    async def collect() -> list[Event]:
        asked = question or make_question()
        return [e async for e in answer_through(ask, asked, (Gone,), deadline_s)]

    return asyncio.run(collect())


UNDISTURBED = read(Replicas())


@pytest.mark.parametrize(
    ("lives", "asked"),
    [
        ((0,), [None, None]),  # before anything
        ((1,), [None, None]),  # after the opening
        ((2,), [None, (7,)]),
        ((5,), [None, TOKENS]),  # all told but the end
        ((3, 2, 1, 0), [None, (7, 11), (7, 11, 13), (7, 11, 13), (7, 11, 13)]),
    ],
)
def test_an_answer_is_told_once_however_often_replicas_die(lives, asked) -> None:
    replicas = Replicas(*lives)
    assert read(replicas) == UNDISTURBED
    assert replicas.asked == asked
    assert replicas.closed == len(asked)


def test_what_another_ingress_has_told_is_not_told_again() -> None:
    replicas = Replicas()
    assert read(replicas, make_question(begun=(7, 11))) == [UNDISTURBED[0], *UNDISTURBED[3:]]


def test_another_error_is_no_lost_replica() -> None:
    with pytest.raises(KeyError):
        read(Replicas(2, error=KeyError))


def test_half_an_answer_outlasts_a_busy_replica() -> None:
    replicas, busy = Replicas(3), [False, True, False]

    async def ask(question: Question) -> AsyncGenerator[Event, None]:
        if busy.pop(0):
            yield Refusal("full", busy=True)
            return
        async for event in replicas(question):
            yield event

    assert read(ask) == UNDISTURBED
    assert not busy


def test_a_busy_replica_refuses_what_has_not_begun() -> None:
    async def ask(question: Question) -> AsyncGenerator[Event, None]:
        yield Refusal("full", busy=True)

    assert read(ask) == [Refusal("full", busy=True)]


def test_a_deadline_counts_from_the_arrival() -> None:
    closed = []

    async def ask(question: Question) -> AsyncGenerator[Event, None]:
        yield Opening(0, (1.0,), 5)
        try:
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    late = make_question(created=time.time() - 9.8)
    with pytest.raises(ApiError, match="no complete answer within 10 s") as raised:
        read(ask, late, deadline_s=10)
    assert raised.value.status == 504
    assert closed == [True]


def test_replicas_that_die_for_ever_end_at_the_deadline() -> None:
    with pytest.raises(ApiError) as raised:
        read(Replicas(*[1] * 100_000), deadline_s=0.2)
    assert raised.value.code == "deadline"
