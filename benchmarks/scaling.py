"""Encoder and language model scale apart: which replicas come under which load.

    python -m benchmarks.scaling

The policy of serve_config.yaml, with smaller targets and shorter delays, first under long answers
about exams that the encoder knows, then, on a fresh endpoint, under answers of one token about many
new frames.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.stand import Stand, ask, make_checkpoint, make_question, serving, write_result

PUSH_S = "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S"
MORE_S = 15.0
"""Under load after a replica was added, to see that the other part stays as it is."""

TARGETS = {
    "EncoderReplica": {"queued_frames": 48},
    "LanguageReplica": {"answers": 8, "prefill_tokens": 4096},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="of load, each; at most")
    args = parser.parse_args(argv)
    os.environ[PUSH_S] = "1"
    parts = {}
    for title, (concurrency, question) in LOADS.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with serving(
                folder, make_checkpoint(folder, width=256, layers=4), deployments=_deployments()
            ) as stand:
                parts[title] = asyncio.run(watch(stand, concurrency, question, args.seconds))
    headline = {title: part["most_replicas"] for title, part in parts.items()}
    write_result("scaling", {"targets": TARGETS, "loads": parts}, headline)


def _long_answers(number: int) -> dict[str, Any]:
    return make_question(number % 4, num_frames=2, max_tokens=250, stream=True)


def _many_frames(number: int) -> dict[str, Any]:
    return make_question(1000 + number, num_frames=16, max_tokens=1)


LOADS: dict[str, tuple[int, Callable[[int], dict[str, Any]]]] = {
    "long answers": (24, _long_answers),
    "many frames": (12, _many_frames),
}
"""Title -> how many ask at a time, and what."""


def _deployments() -> dict[str, dict[str, Any]]:
    return {
        name: {
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": 2,
                "policy": {
                    "policy_function": "ultra.serve.scaling:ScaleBySignals",
                    "policy_kwargs": {"targets": targets},
                },
                "look_back_period_s": 8,
                "upscale_delay_s": 4,
            }
        }
        for name, targets in TARGETS.items()
    }


async def watch(
    stand: Stand, concurrency: int, question: Callable[[int], dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Return the replicas there were under a load, until some time after one was added."""
    numbers, statuses = itertools.count(), []
    end = time.monotonic() + seconds
    seen: list[dict[str, Any]] = []
    async with httpx.AsyncClient(base_url=stand.url, timeout=300) as client:

        async def keep_asking() -> None:
            while time.monotonic() < end:
                reply = await ask(client, question(next(numbers)))
                statuses.append(reply.error or reply.status)

        async def look() -> None:
            nonlocal end
            start = time.monotonic()
            while time.monotonic() < end:
                replicas = await asyncio.to_thread(stand.replicas)
                counts = {name: len(names) for name, names in replicas.items()}
                if not seen or seen[-1]["replicas"] != counts:
                    seen.append({"s": round(time.monotonic() - start, 1), "replicas": counts})
                    if any(counts.get(name, 0) > 1 for name in TARGETS):
                        end = min(end, time.monotonic() + MORE_S)
                await asyncio.sleep(1)

        await asyncio.gather(look(), *(keep_asking() for _ in range(concurrency)))
    return {
        "concurrency": concurrency,
        "requests": len(statuses),
        "failed": sum(status != 200 for status in statuses),
        "replicas": seen,
        "most_replicas": {
            name: max(moment["replicas"].get(name, 0) for moment in seen) for name in TARGETS
        },
    }


if __name__ == "__main__":
    main()
