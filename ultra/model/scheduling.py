"""Which prompts the engine reads next.

transformers' schedulers read prompts in the order of their arrival, so that a short question waits
for every long conversation before it. Here the prompt with the fewest tokens left comes first, and
a pass that reads whole prompts is not filled up with a piece of a longer one. A prompt that has
waited for PATIENCE_S goes first in every second pass, so none waits for ever.
"""

from __future__ import annotations

import functools
import time
from typing import Any

PATIENCE_S = 1.0


@functools.cache
def shortest_first() -> str:
    """Return the name under which the engine finds this scheduler."""
    # Here, because transformers takes seconds to import.
    from transformers.generation.continuous_batching.requests import RequestStatus
    from transformers.generation.continuous_batching.scheduler import (
        SCHEDULER_MAPPING,
        FIFOScheduler,
    )

    class ShortestFirst(FIFOScheduler):
        """Answers under way first, then prompts by the tokens that are left of them.

        Attributes:
            num_cached: request id -> tokens of its prompt found in the cache; none where absent.
        """

        def reset(self) -> None:
            super().reset()
            self.num_cached: dict[str, int] = {}
            self._patient = True

        def clear_cancelled_requests(self) -> Any:
            cancelled = super().clear_cancelled_requests()
            if cancelled:
                # transformers lets new requests in again only when one has finished.
                self.block_new_requests = False
            return cancelled

        def _infer_request_tokens(self, state: Any, removed: set[str]) -> Any:
            before = state.position_offset
            tokens = super()._infer_request_tokens(state, removed)
            if state.position_offset > before:
                self.num_cached.setdefault(state.request_id, state.position_offset - before)
            return tokens

        def _process_candidates(
            self, candidates: list[Any], token_budget: int, cache_budget: int, removed: set[str]
        ) -> Any:
            decoding = [s for s in candidates if s.status == RequestStatus.DECODING]
            prompts = [s for s in candidates if s.status != RequestStatus.DECODING]
            prompts.sort(key=lambda state: len(state.remaining_prefill_tokens))
            self._patient = not self._patient
            overdue = [s for s in prompts if time.perf_counter() - s.created_time > PATIENCE_S]
            if overdue and not self._patient:
                first = min(overdue, key=lambda state: float(state.created_time))
                prompts.remove(first)
                prompts.insert(0, first)
            else:
                sizes = [len(state.remaining_prefill_tokens) for state in prompts]
                token_budget = _leave_pieces_out(sizes, len(decoding), token_budget)
            return super()._process_candidates(
                [*decoding, *prompts], token_budget, cache_budget, removed
            )

    SCHEDULER_MAPPING["shortest_first"] = ShortestFirst
    return "shortest_first"


def _leave_pieces_out(sizes: list[int], num_decoding: int, token_budget: int) -> int:
    """Return the budget that the prompts fill that fit into it whole; all of it where none does."""
    filled = num_decoding
    for size in sizes:
        if filled + size > token_budget:
            break
        filled += size
    return filled if filled > num_decoding else token_budget
