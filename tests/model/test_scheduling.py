"""Which prompts come first, by what the engine's own scheduler puts into its passes."""

from __future__ import annotations

import time

import pytest

from ultra.model import checkpoint
from ultra.model.generation import Generator
from ultra.model.scheduling import PATIENCE_S, _leave_pieces_out

BUDGET = 32


@pytest.fixture(scope="module")
def idle_scheduler(random_checkpoint):
    """The scheduler of an engine whose thread has ended, with its cache."""
    generator = Generator(checkpoint.load_language(random_checkpoint), tokens_per_frame=4)
    generator.start()
    scheduler = generator._scheduler
    generator.stop()
    return scheduler


@pytest.fixture
def scheduler(idle_scheduler):
    idle_scheduler.reset()
    idle_scheduler.cache.free_all_requests()
    return idle_scheduler


def add(scheduler, name: str, size: int, waited_s: float = 0.0) -> None:
    from transformers.generation.continuous_batching.requests import RequestState

    start = 3 + len(scheduler.waiting_requests)  # no two share a prefix
    state = RequestState(name, [start, *range(100, 99 + size)])
    state.created_time = time.perf_counter() - waited_s
    scheduler.add_waiting_request(state)


def run_pass(scheduler) -> list[tuple[str, int]]:
    """Schedule a pass as the engine does; return each request in it with its tokens."""
    batch, *_ = scheduler.schedule_batch(BUDGET, scheduler.cache.max_tokens_read)
    for future in batch:
        future.state.position_offset += future.query_length
        if future.has_new_token:
            future.state.update_and_check_completion(7, None)
    return [(future.state.request_id, future.query_length) for future in batch]


def test_the_fewest_tokens_first_and_answers_before_them(scheduler) -> None:
    add(scheduler, "long", 70)
    assert run_pass(scheduler) == [("long", 32)]
    add(scheduler, "short", 10)
    add(scheduler, "shorter", 6)
    # Whole prompts alone: sixteen more tokens of the long one would make both wait.
    assert run_pass(scheduler) == [("shorter", 6), ("short", 10)]
    assert sorted(run_pass(scheduler)) == [("long", 30), ("short", 1), ("shorter", 1)]
    assert scheduler.active_requests["long"].position_offset == 62


def test_who_has_waited_too_long_goes_first_every_second_time(scheduler) -> None:
    add(scheduler, "older", 90, waited_s=2 * PATIENCE_S + 1)
    add(scheduler, "old", 80, waited_s=PATIENCE_S + 1)
    for number in range(4):
        add(scheduler, f"new-{number}", 20 + number)
    first = [run_pass(scheduler) for _ in range(4)]
    prompts = [[item for item in one if item[1] > 1] for one in first]
    assert prompts[0] == [("older", 32)]
    assert prompts[1] == [("new-0", 20)]
    assert prompts[2] == [("older", 31)]
    assert prompts[3] == [("new-1", 21)]


@pytest.mark.parametrize(
    ("sizes", "num_decoding", "budget"),
    [
        ([], 5, 32),
        ([40], 5, 32),  # none fits whole: a piece
        ([10, 12, 40], 5, 27),
        ([10, 12, 40], 16, 26),
        ([10], 30, 32),
        ([16, 16], 0, 32),
    ],
)
def test_a_pass_of_whole_prompts_has_no_piece(sizes, num_decoding, budget) -> None:
    assert _leave_pieces_out(sizes, num_decoding, 32) == budget
