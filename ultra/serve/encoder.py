"""The encoder side of the model behind the endpoint, without Ray: frames in, visual tokens out.

Frames of all requests meet in one queue, and each is encoded once while it is remembered: by its
content, whoever sends it, and also while it is under way. It loads no weight of the language model.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cachetools import LRUCache
from PIL import Image

from ultra.data.schema import content_digest
from ultra.model import checkpoint
from ultra.model.encoders import Pixels
from ultra.model.llava_ultra import Picture
from ultra.model.strategies import find_strategy
from ultra.types import VisualTokens

NUM_DECODERS = 4
"""Threads that decode; Pillow lets go of the interpreter's lock meanwhile."""

MAX_PICTURES = 64
"""Pictures whose pixels are held: one batch is encoded while the next one is decoded."""

PROBE_AFTER_S = 10.0
"""What was encoded within this time shows as well that the encoders work."""

EncodeOne = Callable[[Pixels], Awaitable[Picture]]


@dataclass(slots=True)
class _Shared:
    """A picture under way, and how many requests wait for it."""

    task: asyncio.Task[Picture]
    num_waiting: int = 0


class Encoder:
    """Looks at frame groups and hands on the visual tokens of the chosen frame.

    All of it runs on one event loop, beside threads that decode and one that encodes.

    Args:
        checkpoint_uri: the model.
        device: where torch runs, `cpu` or `cuda`.
        cache_mib: room for what is remembered of pictures; 0 remembers none.

    Attributes:
        has_failed: whether the last forward pass did.
        batch_sizes: number of pictures -> how many forward passes had so many.
    """

    def __init__(self, checkpoint_uri: str, device: str = "cpu", cache_mib: int = 1024) -> None:
        self._branch = checkpoint.load_visual(checkpoint_uri, device)
        self._strategy = find_strategy(self._branch.config)
        self._cache: LRUCache[str, Picture] = LRUCache(
            cache_mib * 2**20, getsizeof=lambda picture: picture.visual_TD.nbytes
        )
        self._under_way: dict[str, _Shared] = {}
        self._decoders = ThreadPoolExecutor(NUM_DECODERS)
        self._worker = ThreadPoolExecutor(1)
        self._places = asyncio.Semaphore(MAX_PICTURES)
        self._idle = asyncio.Event()
        self._idle.set()
        self._encoded_at = 0.0
        self._counts = Counter(encoded=0, cached=0, shared=0, dropped=0)
        self.has_failed = False
        self.batch_sizes: Counter[int] = Counter()

    @property
    def stats(self) -> dict[str, int]:
        """Pictures encoded, found in the cache, found under way, and dropped because nobody waits.

        What was dropped while it was being encoded counts among the encoded ones as well.
        """
        return dict(self._counts)

    @property
    def num_queued(self) -> int:
        """Pictures that wait or are being encoded."""
        return len(self._under_way)

    async def look(
        self, frames: Sequence[bytes], encode_one: EncodeOne | None = None
    ) -> tuple[VisualTokens, int]:
        """Return the visual tokens of a group of encoded frames, and how many were remembered.

        Args:
            frames: JPEG or PNG bytes.
            encode_one: encodes a picture in a batch with others; by itself where it is None.
        """
        parts = self._strategy.parts(frames)
        encode = encode_one or self._encode_alone
        # Digests of frames and copies of tokens take long enough to hold up everybody else.
        keys = await asyncio.to_thread(list, map(content_digest, parts))
        found = await asyncio.gather(
            *(self._remember(key, part, encode) for key, part in zip(keys, parts, strict=True))
        )
        pictures = [picture for picture, _ in found]
        visual = await asyncio.to_thread(self._branch.show, pictures, frames)
        per_part = len(frames) // len(parts)
        return visual, per_part * sum(remembered for _, remembered in found)

    async def encode(self, pixels: Sequence[Pixels]) -> list[Picture]:
        """Return the pictures of one forward pass."""
        loop = asyncio.get_running_loop()
        self._idle.clear()
        try:
            pictures = await loop.run_in_executor(self._worker, self._branch.encode, pixels)
        except Exception:
            self.has_failed = True
            raise
        finally:
            self._idle.set()
        self.has_failed = False
        self._encoded_at = time.monotonic()
        self._counts["encoded"] += len(pixels)
        self.batch_sizes[len(pixels)] += 1
        return pictures

    async def probe(self) -> None:
        """Return once the encoders have shown that they work.

        Raises:
            Exception: whatever keeps them from it.
        """
        if self.has_failed or time.monotonic() - self._encoded_at > PROBE_AFTER_S:
            await self.encode([await self._prepare(Image.new("RGB", (32, 32)))])

    async def _encode_alone(self, pixels: Pixels) -> Picture:
        return (await self.encode([pixels]))[0]

    async def _remember(
        self, key: str, part: tuple[bytes, ...], encode_one: EncodeOne
    ) -> tuple[Picture, bool]:
        if (picture := self._cache.get(key)) is not None:
            self._counts["cached"] += 1
            return picture, True
        shared = self._under_way.get(key)
        is_new = shared is None
        if shared is None:
            shared = _Shared(asyncio.create_task(self._make(key, part, encode_one)))
            self._under_way[key] = shared
        else:
            self._counts["shared"] += 1
        shared.num_waiting += 1
        try:
            # Whoever leaves does not take the picture from the others.
            return await asyncio.shield(shared.task), not is_new
        finally:
            shared.num_waiting -= 1
            if not shared.num_waiting:
                del self._under_way[key]  # first, so that nobody waits for what is given up
                self._counts["dropped"] += shared.task.cancel()

    async def _make(self, key: str, part: tuple[bytes, ...], encode_one: EncodeOne) -> Picture:
        async with self._places:
            pixels = await self._prepare(part)
            # Serve makes a batch of what comes within its wait, also while another is computed,
            # and would queue many small ones: what comes meanwhile must come at once.
            await self._idle.wait()
            picture = await encode_one(pixels)
        if picture.visual_TD.nbytes <= self._cache.maxsize:
            self._cache[key] = picture
        return picture

    async def _prepare(self, source: tuple[bytes, ...] | Image.Image) -> Pixels:
        assert self._branch.encoders is not None
        preprocess = self._branch.encoders.preprocess

        def prepare() -> Pixels:
            image = self._strategy.picture(source) if isinstance(source, tuple) else source
            return preprocess(image)

        return await asyncio.get_running_loop().run_in_executor(self._decoders, prepare)
