"""Twice what the endpoint can take, for ten minutes.

    python -m benchmarks.overload
    python -m benchmarks.overload --seconds 60

What it can take is measured first, by as many clients as it has places, each asking again as soon
as it is answered. Then questions come at twice that rate, whether or not those before are answered.
The memory is that of every process of the Ray head together and of each replica, in the first and
the last quarter of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.stand import (
    Reply,
    Stand,
    ask,
    make_checkpoint,
    make_question,
    percentiles,
    serving,
    write_result,
)

DEADLINE_S = 60
NUM_EXAMS = 64
LIMITS: dict[str, dict[str, Any]] = {
    # One replica each, and a queue that is full well before the deadline.
    "Ingress": {"autoscaling_config": None, "num_replicas": 1},
    "EncoderReplica": {"autoscaling_config": None, "num_replicas": 1},
    "LanguageReplica": {
        "autoscaling_config": None,
        "num_replicas": 1,
        "max_ongoing_requests": 24,
        "max_queued_requests": 16,
    },
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(
            folder,
            make_checkpoint(folder, width=128, layers=4),
            args={"deadline_s": DEADLINE_S, "encoder_cache_mib": 64, "max_open_questions": 40},
            deployments=LIMITS,
        ) as stand:
            result = asyncio.run(run(stand, args.seconds))
    names = ("accepted", "refused", "other", "without_retry_after", "accepted_s", "memory_mib")
    write_result("overload", result, {name: result[name] for name in names})


def _question(number: int) -> dict[str, Any]:
    return make_question(number % NUM_EXAMS, max_tokens=32, stream=number % 2 == 0)


async def run(stand: Stand, seconds: float) -> dict[str, Any]:
    """Return what came of an overload that lasts so long."""
    numbers = itertools.count()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stand.url, timeout=300, limits=limits) as client:
        capacity = await measure_capacity(client, min(seconds, 30))
        replies: list[Reply] = []
        memory: list[tuple[float, dict[str, float]]] = []
        tasks: set[asyncio.Task[None]] = set()

        async def ask_one() -> None:
            replies.append(await ask(client, _question(next(numbers))))

        start = time.monotonic()
        for due in itertools.count():
            moment = due / (2 * capacity)
            if moment > seconds:
                break
            await asyncio.sleep(max(0.0, start + moment - time.monotonic()))
            task = asyncio.create_task(ask_one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if moment >= len(memory) * seconds / 80:
                memory.append((moment, await asyncio.to_thread(measure_memory, stand)))
        await asyncio.gather(*tasks)
    return {"capacity_per_s": round(capacity, 2), "deadline_s": DEADLINE_S, "seconds": seconds} | (
        summarise(replies, memory, seconds)
    )


async def measure_capacity(client: httpx.AsyncClient, seconds: float) -> float:
    """Return the questions answered a second by 24 clients that wait for their answers."""
    end, done = time.monotonic() + seconds, 0

    async def keep_asking(number: int) -> None:
        nonlocal done
        while time.monotonic() < end:
            await ask(client, _question(number))
            done += 1

    await asyncio.gather(*map(keep_asking, range(8)))  # warm
    done, end = 0, time.monotonic() + seconds
    await asyncio.gather(*map(keep_asking, range(24)))
    return done / seconds


def measure_memory(stand: Stand) -> dict[str, float]:
    """Return MiB of each replica, and of the proxy."""
    pids = {name: pid for name, replicas in stand.replicas().items() for pid in replicas.values()}
    for process in psutil.process_iter(["name", "cmdline"]):
        if "ProxyActor" in " ".join(process.info["cmdline"] or ()):
            pids["proxy"] = process.pid
    return {
        name: psutil.Process(pid).memory_info().rss / 2**20
        for name, pid in pids.items()
        if psutil.pid_exists(pid)
    }


def summarise(
    replies: Sequence[Reply], memory: Sequence[tuple[float, dict[str, float]]], seconds: float
) -> dict[str, Any]:
    """Return what the replies and the memory come to."""
    accepted = [r for r in replies if r.status == 200 and not r.error]
    refused = [r for r in replies if r.status == 429]
    other = Counter(
        f"{r.status} {r.error}" for r in replies if r not in accepted and r.status != 429
    )
    quarters: dict[str, dict[str, float]] = {}
    for name in sorted({name for _, sizes in memory for name in sizes}):
        first = [s[name] for t, s in memory if name in s and seconds / 8 <= t <= seconds / 4]
        last = [s[name] for t, s in memory if name in s and t >= 3 * seconds / 4]
        if first and last:
            quarters[name] = {
                "early": round(statistics.median(first), 1),
                "late": round(statistics.median(last), 1),
            }
    return {
        "asked": len(replies),
        "accepted": len(accepted),
        "refused": len(refused),
        "other": dict(other),
        "without_retry_after": sum("retry-after" not in r.headers for r in refused),
        "accepted_s": percentiles([r.total_s for r in accepted], 2),
        "refused_s": percentiles([r.total_s for r in refused], 2),
        "memory_mib": quarters,
    }


if __name__ == "__main__":
    main()
