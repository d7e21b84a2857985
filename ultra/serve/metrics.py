"""What the endpoint counts and times, for Prometheus."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as render_metrics
from starlette.responses import Response

from ultra.serve.events import Delta, Event, Opening


class Metrics:
    """Counters of this process; a scrape of several ingress processes tells them apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.process = uuid.uuid4().hex[:8]
        self._requests = self._counter("requests", "Chat requests by status.", "status")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that the engine remembered."
        )
        self._frames = self._counter("frames", "Frames asked about.", "source")
        self._answer_tokens = self._counter("answer_tokens", "Tokens of answers.")
        self._first = self._histogram("first_text_seconds", "Until the first text.")
        self._total = self._histogram("request_seconds", "Until the whole answer.")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ultra_{name}", text, ["process", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        buckets = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
        return Histogram(
            f"ultra_{name}", text, ["process"], registry=self.registry, buckets=buckets
        )

    def show(self) -> Response:
        """Return what a scrape reads."""
        return Response(render_metrics(self.registry), media_type=CONTENT_TYPE_LATEST)

    def refused(self, status: int) -> None:
        """Count a request that got no answer, or not all of it."""
        self._requests.labels(self.process, str(status)).inc()

    async def watch(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer, counting and timing it."""
        start = time.monotonic()
        has_text = False
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Opening):
                    self._opened(event)
                elif isinstance(event, Delta):
                    if not has_text:
                        self._first.labels(self.process).observe(time.monotonic() - start)
                    has_text = True
                    if event.finish_reason:
                        self._answered(event, time.monotonic() - start)
                yield event

    def _opened(self, opening: Opening) -> None:
        self._prompt_tokens.labels(self.process).inc(opening.num_prompt_tokens)
        num_cached = opening.num_cached_frames
        self._frames.labels(self.process, "cache").inc(num_cached)
        self._frames.labels(self.process, "encoder").inc(len(opening.scores_K) - num_cached)

    def _answered(self, last: Delta, seconds: float) -> None:
        self._cached_tokens.labels(self.process).inc(last.num_cached_tokens)
        self._answer_tokens.labels(self.process).inc(last.num_tokens)
        self._total.labels(self.process).observe(seconds)
        self._requests.labels(self.process, "200").inc()
