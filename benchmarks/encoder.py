"""The encoder replica: frames per second of sixteen requests at once, of 4 to 16 frames each.

    python -m benchmarks.encoder
    python -m benchmarks.encoder --quick   # small; prints its result and keeps nothing

The tiny preset's encoders, one replica on a local Ray: one request after another, each in a forward
pass of its own; then frames batched across requests, which are decoded meanwhile; then the same
frames again, which are remembered. Each round has frames of its own, and is first answered one by
one. What is chosen must be the same each time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from benchmarks.stand import make_checkpoint, make_frames, spread, write_result
from ultra.serve.events import Seen
from ultra.serve.limits import ServeArgs
from ultra.serve.on_ray import EncoderReplica
from ultra.types import VisualTokens

NUM_REQUESTS = 16
SIDE = 384
"""Pixels; the encoders read 64 and 128."""

Groups = list[tuple[bytes, ...]]


@serve.deployment(max_ongoing_requests=1)
class OneByOne:
    """Looks at one request at a time."""

    def __init__(self, checkpoint_uri: str) -> None:
        from ultra.model import checkpoint

        self._branch = checkpoint.load_visual(checkpoint_uri)

    def look(self, frames: Sequence[bytes]) -> Seen:
        """Return the visual tokens of a group of encoded frames."""
        return Seen(self._branch.look([frames])[0], 0, "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as name:
            uri = make_checkpoint(Path(name), width=128, layers=1)
            result = measure(
                uri, num_rounds=1 if args.quick else 5, side=64 if args.quick else SIDE
            )
    finally:
        serve.shutdown()
        ray.shutdown()
    headline = {
        **{way: rate["median"] for way, rate in result["frames_per_s"].items()},
        **{f"{way}_ratio": ratio["median"] for way, ratio in result["ratio"].items()},
        "same_choice": result["same_choice"],
        "largest_difference": result["largest_difference"],
    }
    if args.quick:
        print(json.dumps({"benchmark": "encoder", **headline}))
    else:
        write_result("encoder", result, headline)


def measure(checkpoint_uri: str, num_rounds: int, side: int) -> dict[str, Any]:
    """Return frames per second and their ratios to one by one, and whether answers are equal."""
    alone, batched = _start(checkpoint_uri)
    ways = {"one_by_one": alone, "batched": batched, "cached": batched}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[Seen]] = {way: [] for way in ways}
    for number in range(-1, num_rounds):  # the first one only warms them
        groups = make_groups(number + 1, side)
        for way, handle in ways.items():
            seen, seconds = asyncio.run(ask_at_once(handle, groups))
            if number >= 0:
                rates[way].append(sum(map(len, groups)) / seconds)
                answers[way] += seen
    pairs = [
        (a.visual, b.visual)
        for way in ("batched", "cached")
        for a, b in zip(answers["one_by_one"], answers[way], strict=True)
    ]
    ratios = {
        way: [rate / one for rate, one in zip(rates[way], rates["one_by_one"], strict=True)]
        for way in ("batched", "cached")
    }
    sizes: dict[int, int] = batched.batch_sizes.remote().result()
    return {
        "frames_per_s": {way: spread(found, 1) for way, found in rates.items()},
        "ratio": {way: spread(found, 2) for way, found in ratios.items()},
        "cached_frames": sum(seen.num_cached for seen in answers["cached"]),
        "batch_sizes": {str(size): sizes[size] for size in sorted(sizes)},
        "answers": len(pairs),
        "same_choice": sum(a.chosen == b.chosen for a, b in pairs),
        "largest_difference": max(_difference(a, b) for a, b in pairs),
    }


def make_groups(number: int, side: int) -> Groups:
    """Return the requests of a round: 4 to 16 frames each, 157 together."""
    counts = [4 + 5 * request % 13 for request in range(NUM_REQUESTS)]
    return [make_frames(n, 100 * number + i, side) for i, n in enumerate(counts)]


async def ask_at_once(handle: DeploymentHandle[Any], groups: Groups) -> tuple[list[Seen], float]:
    """Return what a replica sees in each group, and the seconds that all took together."""
    start = time.perf_counter()
    responses = [handle.look.remote(frames) for frames in groups]
    return list(await asyncio.gather(*responses)), time.perf_counter() - start


def _start(checkpoint_uri: str) -> tuple[DeploymentHandle[Any], DeploymentHandle[Any]]:
    serve.start(proxy_location="Disabled")
    options = {"ray_actor_options": {"num_cpus": 0.05}}
    args = ServeArgs(models={"ultra": checkpoint_uri})
    one_by_one: Any = OneByOne
    replica: Any = EncoderReplica
    apps = (
        one_by_one.options(**options).bind(checkpoint_uri),
        replica.options(**options).bind(args, checkpoint_uri),
    )
    alone, batched = (
        serve.run(app, name=f"encoder{number}", route_prefix=None)
        for number, app in enumerate(apps)
    )
    return alone, batched


def _difference(a: VisualTokens, b: VisualTokens) -> float:
    return float(abs(a.tokens_TD - b.tokens_TD).max())


if __name__ == "__main__":
    main()
