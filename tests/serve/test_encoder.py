"""The encoder side without Ray: frames are batched, remembered, shared and dropped."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.serve.questions import FRAMES, count_modules, encode_image, without
from ultra.model import checkpoint
from ultra.model.language import LanguageBranch
from ultra.serve.encoder import MAX_PICTURES, Encoder
from ultra.types import VisualTokens

MORE = tuple(encode_image(seed) for seed in range(10, 15))


@pytest.fixture
def encoder(random_checkpoint) -> Encoder:
    return Encoder(random_checkpoint)


class Batcher:
    """Encodes what has come in one turn of the event loop together, as Serve does in a while."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.waiting: list = []

    async def __call__(self, pixels):
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((pixels, future))
        if len(self.waiting) == 1:
            asyncio.get_running_loop().call_later(0.2, lambda: asyncio.ensure_future(self.flush()))
        return await future

    async def flush(self) -> None:
        waiting, self.waiting = [w for w in self.waiting if not w[1].cancelled()], []
        if waiting:
            pictures = await self.encoder.encode([pixels for pixels, _ in waiting])
            for (_, future), picture in zip(waiting, pictures, strict=True):
                if not future.cancelled():
                    future.set_result(picture)


def check_same(a: VisualTokens, b: VisualTokens) -> None:
    assert a.chosen == b.chosen
    assert a.scores_K == pytest.approx(b.scores_K, abs=1e-5)
    np.testing.assert_allclose(a.tokens_TD, b.tokens_TD, atol=1e-5)


def expect(uri: str, *groups: Sequence[bytes]) -> list[VisualTokens]:
    return checkpoint.load_visual(uri).look(groups)


def test_it_loads_no_language_model(random_checkpoint, random_backbones, tmp_path) -> None:
    uri = without(random_checkpoint, random_backbones, ["language"], tmp_path / "copy")
    before = count_modules(LanguageBranch)
    visual, num_cached = asyncio.run(Encoder(uri).look(FRAMES))
    assert visual.tokens_TD.shape == (4, 24)
    assert visual.tokens_TD.dtype == np.float32
    assert (len(visual.scores_K), num_cached) == (3, 0)
    assert count_modules(LanguageBranch) == before


def test_frames_of_several_requests_share_a_forward_pass(encoder, random_checkpoint) -> None:
    groups = [FRAMES, MORE[:1], (*MORE[1:3], FRAMES[0])]  # a frame that two requests have

    async def look() -> list:
        batcher = Batcher(encoder)
        return await asyncio.gather(*(encoder.look(group, batcher) for group in groups))

    looked = asyncio.run(look())
    assert encoder.batch_sizes == {6: 1}
    assert [num_cached for _, num_cached in looked] == [0, 0, 1]
    for (visual, _), expected in zip(looked, expect(random_checkpoint, *groups), strict=True):
        check_same(visual, expected)


def test_what_was_seen_is_not_encoded_again(encoder, random_checkpoint) -> None:
    (expected,) = expect(random_checkpoint, FRAMES)

    async def look() -> list:
        first = await encoder.look(FRAMES)
        again = await encoder.look(FRAMES)
        other = await encoder.look((FRAMES[2], MORE[0]))
        return [first, again, other]

    first, again, other = asyncio.run(look())
    assert [first[1], again[1], other[1]] == [0, 3, 1]
    assert encoder.batch_sizes == {1: 4}
    check_same(first[0], expected)
    assert np.array_equal(first[0].tokens_TD, again[0].tokens_TD)
    assert first[0].scores_K == again[0].scores_K


def test_the_cache_is_bounded_by_its_bytes(random_checkpoint) -> None:
    encoder = Encoder(random_checkpoint, cache_mib=0)

    async def look() -> None:
        assert [(await encoder.look(FRAMES))[1] for _ in range(2)] == [0, 0]
        room = 2 * 4 * 24 * 4  # of two pictures
        encoder._cache = type(encoder._cache)(room, getsizeof=lambda p: p.visual_TD.nbytes)
        await encoder.look(FRAMES, Batcher(encoder))

    asyncio.run(look())
    assert len(encoder._cache) == 2
    # None of them is a part of its batch, which would stay in memory as a whole.
    assert all(picture.visual_TD.base is None for picture in encoder._cache.values())


def test_who_leaves_drops_only_what_nobody_else_waits_for(encoder) -> None:
    async def leave() -> None:
        batcher = Batcher(encoder)
        leaving = asyncio.create_task(encoder.look((*FRAMES, MORE[0]), batcher))
        staying = asyncio.create_task(encoder.look((FRAMES[0], MORE[1]), batcher))
        await asyncio.sleep(0.1)
        assert encoder.num_queued == 5
        leaving.cancel()
        visual, _ = await staying
        assert len(visual.scores_K) == 2
        assert encoder.num_queued == 0

    asyncio.run(leave())
    assert encoder.batch_sizes == {2: 1}
    assert encoder.stats == {"encoded": 2, "cached": 0, "shared": 1, "dropped": 3}


@pytest.mark.parametrize("num_turns", range(4))
def test_who_comes_while_another_leaves_is_answered(encoder, monkeypatch, num_turns) -> None:
    async def call_here(function, *args):  # so that turns of the event loop can be counted
        return function(*args)

    monkeypatch.setattr(asyncio, "to_thread", call_here)

    async def leave() -> VisualTokens:
        leaving = asyncio.create_task(encoder.look(FRAMES[:1]))
        while not encoder.num_queued:
            await asyncio.sleep(0)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        coming = asyncio.create_task(encoder.look(FRAMES[:1]))
        leaving.cancel()
        return (await coming)[0]

    assert len(asyncio.run(leave()).scores_K) == 1


def test_no_more_pixels_are_held_than_two_batches(encoder, monkeypatch) -> None:
    groups = [[encode_image(100 * i + k) for k in range(20)] for i in range(5)]
    held, most = 0, 0
    prepare = encoder._prepare

    async def count(part):
        nonlocal held, most
        held, most = held + 1, max(most, held + 1)
        return await prepare(part)

    monkeypatch.setattr(encoder, "_prepare", count)

    async def look() -> None:
        nonlocal held
        batcher = Batcher(encoder)

        async def encode_one(pixels):
            nonlocal held
            picture = await batcher(pixels)
            held -= 1
            return picture

        await asyncio.gather(*(encoder.look(group, encode_one) for group in groups))

    asyncio.run(look())
    assert most == MAX_PICTURES
    assert encoder.stats["encoded"] == 100


def test_frames_that_make_one_picture(random_checkpoint, tmp_path) -> None:
    shutil.copytree(random_checkpoint, tmp_path / "composite")
    config = tmp_path / "composite" / "config.yaml"
    config.write_text(config.read_text().replace("strategy: adaptive", "strategy: composite"))
    encoder = Encoder(str(config.parent))

    async def look() -> list:
        return [await encoder.look(frames) for frames in (FRAMES, FRAMES, FRAMES[::-1])]

    first, again, turned = asyncio.run(look())
    assert [num_cached for _, num_cached in (first, again, turned)] == [0, 3, 0]
    assert encoder.batch_sizes == {1: 2}
    check_same(first[0], expect(str(config.parent), FRAMES)[0])
    assert len(set(again[0].scores_K)) == 1
    assert not np.allclose(turned[0].tokens_TD, first[0].tokens_TD)


def test_a_frame_that_fails_fails_its_own_requests_alone(encoder) -> None:
    async def look() -> list:
        groups = [FRAMES, (FRAMES[0], b"no image"), (b"no image",)]
        results = await asyncio.gather(*map(encoder.look, groups), return_exceptions=True)
        return [*results, await encoder.look(FRAMES)]

    good, mixed, bad, again = asyncio.run(look())
    assert isinstance(mixed, OSError)
    assert isinstance(bad, OSError)
    check_same(good[0], again[0])
    assert encoder.num_queued == 0


def test_a_probe_encodes_unless_something_just_was(encoder) -> None:
    async def probe() -> None:
        await encoder.probe()
        await encoder.probe()
        assert encoder.batch_sizes == {1: 1}
        working = encoder._branch
        encoder._branch = replace(working, fusion=Broken())
        with pytest.raises(RuntimeError, match="broken"):
            await encoder.look(FRAMES)
        with pytest.raises(RuntimeError, match="broken"):
            await encoder.probe()
        assert encoder.has_failed
        encoder._branch = working
        await encoder.probe()
        assert not encoder.has_failed

    asyncio.run(probe())


class Broken(torch.nn.Module):
    def forward(self, features):
        raise RuntimeError("broken")


class Slow(torch.nn.Module):
    """Takes long enough that others come meanwhile."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, features):
        time.sleep(1)
        return self.inner(features)


@pytest.fixture(scope="module")
def replica(ray_cluster, random_checkpoint) -> Iterator[Any]:
    from ray import serve

    from ultra.serve.limits import ServeArgs
    from ultra.serve.on_ray import EncoderReplica

    class SlowReplica(EncoderReplica.func_or_class):
        def __init__(self) -> None:
            super().__init__(
                ServeArgs(models={"m": random_checkpoint}, encoder_cache_mib=1), random_checkpoint
            )
            branch = self._encoder._branch
            self._encoder._branch = replace(branch, fusion=Slow(branch.fusion))

    serve.start(proxy_location="Disabled")
    deployment = EncoderReplica.options(func_or_class=SlowReplica, name="SlowReplica")
    yield serve.run(deployment.bind(), name="slow", route_prefix=None)
    serve.shutdown()


def count_new(replica, before: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """What became of pictures since then, how many forward passes there were, and the largest."""
    after = replica.stats.remote().result()
    sizes = replica.batch_sizes.remote().result()
    new = {name: after[name] - before["stats"][name] for name in after}
    passes = Counter(sizes) - Counter(before["sizes"])
    return new, passes.total(), max(passes)


def note(replica) -> dict[str, Any]:
    return {
        "stats": replica.stats.remote().result(),
        "sizes": replica.batch_sizes.remote().result(),
    }


def test_what_comes_during_a_forward_pass_shares_the_next_one(replica, random_checkpoint) -> None:
    groups = [tuple(encode_image(1000 + 10 * i + k) for k in range(1 + i % 2)) for i in range(12)]
    before, responses = note(replica), []
    for group in groups:
        responses.append(replica.look.remote(group))
        time.sleep(0.02)  # longer than Serve waits for a batch
    seen = [response.result() for response in responses]
    new, num_passes, largest = count_new(replica, before)
    assert new == {"encoded": 18, "cached": 0, "shared": 0, "dropped": 0}
    assert num_passes <= 6  # 11, were they not gathered
    assert largest >= 6
    for s, expected in zip(seen, expect(random_checkpoint, *groups), strict=True):
        check_same(s.visual, expected)
    assert {s.replica for s in seen} == {seen[0].replica} != {""}
    again = replica.look.remote(groups[3]).result()
    assert (again.num_cached, again.visual.chosen) == (2, seen[3].visual.chosen)
    assert np.array_equal(again.visual.tokens_TD, seen[3].visual.tokens_TD)


def test_frames_of_a_client_that_left_are_not_encoded(replica) -> None:
    new = [encode_image(2000 + k) for k in range(7)]
    before = note(replica)
    busy = replica.look.remote(new[:1])
    time.sleep(0.3)
    leaving = replica.look.remote(new[1:5])
    staying = replica.look.remote(new[4:])
    time.sleep(0.2)
    leaving.cancel()
    assert len(staying.result().visual.scores_K) == 3
    busy.result()
    found, num_passes, _ = count_new(replica, before)
    assert found == {"encoded": 4, "cached": 0, "shared": 1, "dropped": 3}
    assert num_passes == 2
