"""The endpoint on Ray Serve: an ingress, encoder replicas and language replicas, scaled apart.

    serve deploy serve_config.yaml

The ingress hands an encoder's answer on as a reference, so visual tokens go from replica to replica
through the object store and never through the ingress.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Gauge

from ultra.data.schema import content_digest
from ultra.registry import resolve_version
from ultra.serve.endpoint import create_app
from ultra.serve.events import Event, Opening, Question, Refusal, Seen
from ultra.serve.limits import RETRY_AFTER_S, ServeArgs
from ultra.serve.resume import answer_through
from ultra.serve.security import load_keys

PROBE_TIMEOUT_S = 5.0


class EngineDied(Exception):
    """A language replica can answer no more, and Serve has not replaced it yet."""


LOST = (RayActorError, ObjectLostError, WorkerCrashedError, RayServeException, EngineDied)
"""What the death of a replica looks like; RayServeException stands for that of an encoder."""

BY_SESSION = {
    "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
}
"""Leads what is asked about an exam to the replicas that remember it."""


@serve.deployment(max_ongoing_requests=64, max_queued_requests=64, request_router_config=BY_SESSION)
class EncoderReplica:
    """Looks at frame groups, the frames of several requests at a time."""

    def __init__(self, args: ServeArgs, checkpoint: str) -> None:
        from ultra.serve.encoder import Encoder  # here, so that the ingress needs no torch

        self._gauge = _make_gauge("ultra_encoder_replica")
        self._encoder = Encoder(checkpoint, args.encoder_device, args.encoder_cache_mib)

    async def look(self, frames: Sequence[bytes]) -> Seen:
        """Return the visual tokens of a group, and who looked."""
        visual, num_cached = await self._encoder.look(frames, self._encode)
        return Seen(visual, num_cached, _own_name())

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def _encode(self, pixels: list[Any]) -> list[Any]:
        return await self._encoder.encode(pixels)

    async def ready(self) -> bool:
        """Return True once the encoders have encoded something."""
        await self._encoder.probe()
        return True

    async def batch_sizes(self) -> dict[int, int]:
        """Return number of frames -> how many forward passes had so many."""
        return self._encoder.batch_sizes

    async def stats(self) -> dict[str, int]:
        """Return what became of frames; see Encoder.stats."""
        return self._encoder.stats

    async def check_health(self) -> None:
        """Raise when the encoders fail again and again, so that Serve replaces this replica."""
        if self._encoder.has_failed:
            await self._encoder.probe()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ScaleBySignals goes by."""
        stats = {**self._encoder.stats, "queued_frames": self._encoder.num_queued}
        return _show(self._gauge, stats)


@serve.deployment(max_ongoing_requests=32, max_queued_requests=64, request_router_config=BY_SESSION)
class LanguageReplica:
    """Answers questions about visual tokens, batched continuously."""

    def __init__(self, args: ServeArgs, checkpoint: str) -> None:
        from ultra.serve.language import Language

        self._gauge = _make_gauge("ultra_language_replica")
        self._language = Language(
            checkpoint, args.max_new_tokens, args.language_device, args.max_prefill_tokens
        )

    async def answer(
        self, seen: Seen, exam_key: str, question: Question
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer; see Language.answer."""
        try:
            async with aclosing(self._language.answer(seen.visual, exam_key, question)) as events:
                async for event in events:
                    if isinstance(event, Opening):
                        replicas = {"encoder": seen.replica, "language": _own_name()}
                        event = replace(event, replicas=replicas, num_cached_frames=seen.num_cached)
                    yield event
        except RuntimeError as error:
            if self._language.alive:
                raise
            raise EngineDied from error

    async def ready(self) -> bool:
        """Return True once the engine has given a token."""
        await self._language.probe()
        return True

    async def stats(self) -> dict[str, int]:
        """Return what the replica does and did; see Language.stats."""
        return self._language.stats

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ScaleBySignals goes by."""
        return _show(self._gauge, self._language.stats)

    def check_health(self) -> None:
        """Raise when the engine has died, so that Serve replaces this replica."""
        if not self._language.alive:
            raise RuntimeError("the generation engine has died")

    def __del__(self) -> None:
        if language := getattr(self, "_language", None):
            language.stop()  # its thread would keep the process


@serve.deployment(
    max_ongoing_requests=64,
    max_queued_requests=128,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_AFTER_S),
)
@serve.ingress()
class Ingress:
    """The only part that hears HTTP; it loads no weights.

    Args:
        args: what serve_config.yaml says.
        models: name of a model -> its encoder and its language model.
    """

    def __init__(
        self, args: ServeArgs, models: Mapping[str, Sequence[DeploymentHandle[Any]]]
    ) -> None:
        self._args = args
        self._models = models

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._args, load_keys(self._args.api_keys_file))

    def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer; see endpoint.Backend."""
        return answer_through(self._ask, question, LOST, self._args.deadline_s)

    async def _ask(self, question: Question) -> AsyncGenerator[Event, None]:
        encoder, language = self._models[question.model]
        exam_key = await asyncio.to_thread(content_digest, question.frames)
        # The session leads a question about the same exam to the replicas that remember it.
        seen: Any = encoder.options(session_id=exam_key).look.remote(question.frames)
        asked = language.options(stream=True, session_id=exam_key)
        events: Any = asked.answer.remote(seen, exam_key, replace(question, frames=()))
        try:
            async for event in events:
                yield event
        except BackPressureError:
            yield Refusal("full", busy=True)
        except (asyncio.CancelledError, GeneratorExit):  # the client has left, or time is up
            seen.cancel()
            events.cancel()
            raise

    async def ready(self) -> bool:
        """Return whether every part of every model answers a probe in time."""
        probes = [part.ready.remote() for parts in self._models.values() for part in parts]
        try:
            return all(await asyncio.wait_for(asyncio.gather(*probes), PROBE_TIMEOUT_S))
        except Exception:  # dead, starting or too busy: each of them is not ready
            return False


def _make_gauge(name: str) -> Gauge:
    return Gauge(name, "What a replica does and did, by name.", ("what",))


def _show(gauge: Gauge, stats: Mapping[str, float]) -> dict[str, float]:
    """Return the same, told to Prometheus through Ray as well."""
    for name, value in stats.items():
        gauge.set(value, {"what": name})
    return dict(stats)


def _own_name() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def build_app(args: ServeArgs | dict[str, Any]) -> Application:
    """Return the application that serve_config.yaml names.

    The first model's deployments are called as their classes are; those of any other model have
    its name behind that, and scale by themselves.

    Raises:
        ConfigError: for a version of a registered model that MLflow does not know.
    """
    # Ray passes a plain dict where a signature's annotation is a string, as all are here.
    args = ServeArgs.model_validate(args)
    classes: Any = EncoderReplica, LanguageReplica
    models = {}
    tracking_uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    for number, (name, uri) in enumerate(args.models.items()):
        suffix = f"-{name}" if number else ""
        checkpoint = resolve_version(uri, tracking_uri)
        models[name] = [c.options(name=c.name + suffix).bind(args, checkpoint) for c in classes]
    ingress: Any = Ingress
    app: Application = ingress.bind(args, models)
    return app
