"""Replicas killed, and an update rolled out, under a steady load: is any answer lost or changed?

    python -m benchmarks.failures

Every distinct question is answered once undisturbed. Then, for each kind of replica, the same
questions are asked again and again while five replicas of it are killed with SIGKILL at random
moments; and once more while a changed configuration replaces every replica. Half of the answers are
streamed, half of them sampled with a seed.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import itertools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.stand import (
    QUESTIONS,
    REPLICAS,
    Reply,
    Stand,
    ask,
    ask_all,
    make_checkpoint,
    make_question,
    serving,
    write_result,
)

CONCURRENCY = 6
NUM_EXAMS = 6
MAX_TOKENS = 48
RESUMED = "goes on with another"
"""What the endpoint logs of a request whose replica died."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200, help="of each part, at least")
    parser.add_argument("--kills", type=int, default=5, help="of each kind of replica")
    parser.add_argument("--replicas", nargs="+", default=list(REPLICAS), choices=REPLICAS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    args = parser.parse_args(argv)
    fixed = {"autoscaling_config": None, "num_replicas": 2}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(
            folder,
            make_checkpoint(folder, width=128, layers=3),
            args={"encoder_cache_mib": 0},  # or the encoders would have next to nothing to do
            deployments=dict.fromkeys(REPLICAS, fixed),
        ) as stand:
            parts = asyncio.run(run(stand, args))
    headline = {
        part["disturbance"]: {
            k: part[k] for k in ("requests", "kills", "resumed", "lost", "changed")
        }
        for part in parts
    }
    write_result("failures", {"parts": parts}, headline)


async def run(stand: Stand, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what came of every disturbance."""
    questions = make_questions()
    expected = [reply.content for reply in await ask_all(stand.url, questions, CONCURRENCY)]
    chance = random.Random(args.seed)
    parts = []
    for name in args.replicas:

        async def kill(name: str = name) -> int:
            return await kill_some(stand, name, args.kills, chance)

        parts.append(await disturb(stand, f"kill {name}", kill, questions, expected, args.requests))

    async def update() -> int:
        return await roll_out(stand)

    parts.append(await disturb(stand, "update", update, questions, expected, args.requests))
    return parts


def make_questions() -> list[dict[str, Any]]:
    """Return the distinct questions: greedy and seeded, whole and streamed, about several exams."""
    questions = []
    for exam, (number, text) in itertools.product(range(NUM_EXAMS), enumerate(QUESTIONS)):
        fields: dict[str, Any] = {"max_tokens": MAX_TOKENS, "stream": (exam + number) % 2 == 0}
        if number >= 2:
            fields |= {"temperature": 0.8, "seed": 100 * exam + number}
        questions.append(make_question(exam, text=text, num_frames=2 + exam % 3, **fields))
    return questions


async def disturb(
    stand: Stand,
    title: str,
    disturbance: Callable[[], Coroutine[Any, Any, int]],
    questions: Sequence[dict[str, Any]],
    expected: Sequence[tuple[Any, ...]],
    num_requests: int,
) -> dict[str, Any]:
    """Return how requests fared that were asked until the disturbance was over, and so many."""
    resumed = stand.count_in_logs(RESUMED)
    replies: list[tuple[int, Reply]] = []
    numbers = itertools.count()
    disturbed = asyncio.create_task(disturbance())
    async with httpx.AsyncClient(base_url=stand.url, timeout=300) as client:

        async def keep_asking() -> None:
            while not disturbed.done() or len(replies) < num_requests:
                number = next(numbers) % len(questions)
                replies.append((number, await ask(client, questions[number])))

        started = time.monotonic()
        await asyncio.gather(*(keep_asking() for _ in range(CONCURRENCY)))
        seconds = time.monotonic() - started
    lost = [r for _, r in replies if r.status != 200 or r.error]
    changed = [
        (n, r) for n, r in replies if r.status == 200 and not r.error and r.content != expected[n]
    ]
    return {
        "disturbance": title,
        "requests": len(replies),
        "kills": await disturbed,
        "resumed": stand.count_in_logs(RESUMED) - resumed,
        "lost": len(lost),
        "changed": len(changed),
        "seconds": round(seconds, 1),
        "slowest_s": round(max(r.total_s for _, r in replies), 2),
        "lost_how": dict(Counter(f"{r.status} {r.error}".strip() for r in lost)),
        "changed_how": [{"expected": expected[n], "came": r.content} for n, r in changed[:5]],
    }


async def kill_some(stand: Stand, name: str, count: int, chance: random.Random) -> int:
    """Kill so many replicas of a deployment at random moments, whatever they are doing."""
    killed: set[int] = set()
    while len(killed) < count:
        await asyncio.sleep(chance.uniform(1, 6))
        running = (await asyncio.to_thread(stand.replicas))[name]
        # Serve still lists for a moment what has been killed.
        if victims := sorted(set(running.values()) - killed):
            victim = chance.choice(victims)
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    return count


async def roll_out(stand: Stand) -> int:
    """Deploy a configuration that replaces every replica, and return how many there were."""
    before = await asyncio.to_thread(stand.replicas)
    old = {name for replicas in before.values() for name in replicas}
    config = copy.deepcopy(stand.config)
    config["applications"][0]["args"]["max_new_tokens"] -= 1
    await asyncio.to_thread(stand.deploy, config)
    while True:
        await asyncio.sleep(1)
        now = await asyncio.to_thread(stand.replicas)
        if not any(old & set(replicas) for replicas in now.values()) and all(now.values()):
            return len(old)


if __name__ == "__main__":
    main()
