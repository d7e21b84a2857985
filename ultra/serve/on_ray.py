"""The endpoint on Ray Serve: an ingress, encoder replicas and language replicas, scaled apart.

    serve deploy serve_config.yaml

The ingress hands an encoder's answer on as a reference, so visual tokens go from replica to replica
through the object store and never through the ingress.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from ultra.data.schema import content_digest
from ultra.serve.api import ApiError, Event, Limits, Opening, Question
from ultra.serve.endpoint import create_app
from ultra.serve.security import load_keys
from ultra.types import Turn, VisualTokens

RETRY_AFTER_S = 5.0
PROBE_TIMEOUT_S = 5.0


class ServeArgs(Limits):
    """What serve_config.yaml says about the application; the model is the checkpoint's."""

    checkpoint: str
    """Local path or s3:// address, readable from every node."""
    api_keys_file: str = ""
    """A file on the ingress's node, one key a line; empty: ULTRA_API_KEYS of its environment."""
    encoder_device: str = "cpu"
    """`cuda` where the deployment's ray_actor_options give it a GPU."""
    language_device: str = "cpu"


@serve.deployment(max_ongoing_requests=16, max_queued_requests=64)
class EncoderReplica:
    """Looks at frame groups, several requests at a time."""

    def __init__(self, args: ServeArgs) -> None:
        from ultra.serve.replicas import Encoder  # here, so that the ingress needs no torch

        self._encoder = Encoder(args.checkpoint, args.encoder_device)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def look(self, groups: list[tuple[bytes, ...]]) -> list[tuple[VisualTokens, str]]:
        """Return the visual tokens of each group, and who looked."""
        visuals = await asyncio.to_thread(self._encoder.look, groups)
        return [(visual, _own_name()) for visual in visuals]

    async def ready(self) -> bool:
        """Return True once the weights are loaded."""
        return True


@serve.deployment(
    max_ongoing_requests=32,
    max_queued_requests=64,
    request_router_config={
        "request_router_class": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    },
)
class LanguageReplica:
    """Answers questions about visual tokens, batched continuously."""

    def __init__(self, args: ServeArgs) -> None:
        from ultra.serve.replicas import Language

        self._language = Language(args.checkpoint, args.max_new_tokens, args.language_device)

    async def answer(
        self, seen: tuple[VisualTokens, str], exam_key: str, turns: Sequence[Turn], **options: Any
    ) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer; see Language.answer."""
        visual, encoder = seen
        async with aclosing(self._language.answer(visual, exam_key, turns, **options)) as events:
            async for event in events:
                if isinstance(event, Opening):
                    replicas = {"encoder": encoder, "language": _own_name()}
                    event = replace(event, replicas=replicas)
                yield event

    async def ready(self) -> bool:
        """Return whether the engine runs."""
        return self._language.alive

    async def num_running(self) -> int:
        """Return the answers under way."""
        return self._language.num_running

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
    """The only part that hears HTTP; it loads no weights."""

    def __init__(
        self, args: ServeArgs, encoder: DeploymentHandle[Any], language: DeploymentHandle[Any]
    ) -> None:
        self._args = args
        self._encoder = encoder
        self._language = language

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._args, load_keys(self._args.api_keys_file))

    async def answer(self, question: Question) -> AsyncGenerator[Event, None]:
        """Yield the events of one answer; see endpoint.Backend."""
        exam_key = content_digest(question.frames)
        seen = self._encoder.look.remote(question.frames)
        # The session leads a question about the same exam to the replica that remembers it.
        language = self._language.options(stream=True, session_id=exam_key)
        events: Any = language.answer.remote(
            seen,
            exam_key,
            question.turns,
            max_new_tokens=question.max_new_tokens,
            stop=question.stop,
            temperature=question.temperature,
            top_p=question.top_p,
            seed=question.seed,
        )
        try:
            async for event in events:
                yield event
        except BackPressureError:
            raise ApiError(
                "too many requests, try again soon", status=429, retry_after_s=RETRY_AFTER_S
            ) from None
        except (asyncio.CancelledError, GeneratorExit):  # the client has left
            events.cancel()
            raise

    async def ready(self) -> bool:
        """Return whether both sides answer a probe in time."""
        probes = asyncio.gather(self._encoder.ready.remote(), self._language.ready.remote())
        try:
            return all(await asyncio.wait_for(probes, PROBE_TIMEOUT_S))
        except Exception:  # dead, starting or too busy: each of them is not ready
            return False


def _own_name() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def build_app(args: ServeArgs | dict[str, Any]) -> Application:
    """Return the application that serve_config.yaml names."""
    # Ray passes a plain dict where a signature's annotation is a string, as all are here.
    args = ServeArgs.model_validate(args)
    deployments: Any = Ingress, EncoderReplica, LanguageReplica
    ingress, encoder, language = deployments
    app: Application = ingress.bind(args, encoder.bind(args), language.bind(args))
    return app
