"""The encoder side without Ray: frames are batched, remembered, shared and dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from tests.serve.questions import FRAMES, count_modules, encode_image, without
from ultra.model import checkpoint
from ultra.model.language import LanguageBranch
from ultra.serve.encoder import Encoder
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

    async def look(times: int) -> list[int]:
        return [(await encoder.look(FRAMES))[1] for _ in range(times)]

    assert asyncio.run(look(2)) == [0, 0]
    encoder._cache = type(encoder._cache)(2 * 4 * 24 * 4, getsizeof=lambda p: p.visual_TD.nbytes)
    assert asyncio.run(look(1)) == [0]
    assert len(encoder._cache) == 2  # of three


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
    async def probe_twice() -> None:
        await encoder.probe()
        await encoder.probe()

    asyncio.run(probe_twice())
    assert encoder.batch_sizes == {1: 1}
