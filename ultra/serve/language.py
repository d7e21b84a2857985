"""The language side of the model behind the endpoint, without Ray: visual tokens in, text out.

It loads no weight of the vision side.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import numpy as np

from ultra.data.prompts import Tokenizer, encode_prompt
from ultra.model import checkpoint
from ultra.model.generation import Busy, Generator, Request
from ultra.serve.events import Delta, Event, Opening, Question, Refusal
from ultra.types import VisualTokens

PROBE_AFTER_S = 10.0
"""A token within this time shows as well that the engine works."""


class Language:
    """Answers questions about visual tokens, many at a time."""

    def __init__(
        self,
        checkpoint_uri: str,
        max_new_tokens: int,
        device: str = "cpu",
        max_prefill_tokens: int | None = None,
    ) -> None:
        config = checkpoint.read(checkpoint_uri).config.model
        branch = checkpoint.load_language(checkpoint_uri, device)
        self._template = config.language.template
        self._tokenizer: Tokenizer = branch.tokenizer
        self._control_tokens: list[str] = branch.tokenizer.all_special_tokens
        self._max_new_tokens = max_new_tokens
        self._width = branch.width
        self._heard_at = -PROBE_AFTER_S  # when the engine last gave a token
        self._generator = Generator(
            branch,
            tokens_per_frame=config.tokens_per_frame,
            max_prefill_tokens=max_prefill_tokens,
        )
        self._generator.start()

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        return self._generator.alive

    @property
    def stats(self) -> dict[str, int]:
        """Answers under way, tokens of prompts that wait to be read, and answers cut off so far."""
        return {
            "answers": self._generator.num_running,
            "prefill_tokens": self._generator.num_prefill_tokens,
            "cancelled": self._generator.num_cancelled,
        }

    async def probe(self) -> None:
        """Return once the engine has shown that it works, by a token if none came of late.

        Raises:
            Busy: when it has no room for a question.
            RuntimeError: when it has died.
        """
        if time.monotonic() - self._heard_at > PROBE_AFTER_S:
            no_frame_VD = np.zeros((0, self._width), np.float32)
            request = Request([self._tokenizer.eos_token_id], no_frame_VD, "", 1)
            async with aclosing(self._generator.stream(request)) as stream:
                async for _ in stream:
                    self._heard_at = time.monotonic()

    def stop(self) -> None:
        """End the engine; what it still answers fails."""
        self._generator.stop()

    async def answer(
        self,
        visual: VisualTokens,
        exam_key: str,
        question: Question,
    ) -> AsyncGenerator[Event, None]:
        """Yield an Opening, then Deltas of which the last is finished; or a Refusal alone.

        An answer that the question's ticket knows the beginning of is gone on with. Closing the
        iterator early cancels the generation.

        Args:
            visual: what the encoder saw.
            exam_key: digest of the frames.
            question: its frames are not read.
        """
        begun = question.ticket.begun or ()
        try:
            self._check_text(question)
            request = self._request(visual, exam_key, question)
            stream = self._generator.stream(request)
        except (ValueError, Busy) as error:
            yield Refusal(str(error), busy=isinstance(error, Busy))
            return
        text = TextStream(self._tokenizer, question.stop)
        text.add(begun)
        num_told = len(begun)
        async with aclosing(stream):
            yield Opening(visual.chosen, visual.scores_K, len(request.prompt_ids))
            async for new_ids in stream:
                self._heard_at = time.monotonic()
                piece = text.add(new_ids)
                if text.stopped:
                    break
                if piece:
                    yield Delta(piece, len(text.ids), token_ids=tuple(text.ids[num_told:]))
                    num_told = len(text.ids)
            else:
                piece = text.finish()
        # The engine is rid of a stopped request by now, however slowly this is read.
        yield Delta(
            piece,
            len(text.ids),
            "stop" if text.stopped else self._generator.finish_reason(text.ids),
            token_ids=tuple(text.ids[num_told:]),
            num_cached_tokens=stream.num_cached_tokens,
        )

    def _check_text(self, question: Question) -> None:
        # Whoever may write them could end the turn and speak in another role.
        text = "\n".join(turn.content for turn in question.turns)
        for token in self._control_tokens:
            if token in text:
                raise ValueError(f"{token} is a control token of the model; no text may hold it")

    def _request(self, visual: VisualTokens, exam_key: str, question: Question) -> Request:
        prompt = encode_prompt(
            self._tokenizer, self._template, question.turns, len(visual.tokens_TD)
        )
        room = self._generator.capacity - len(prompt)
        limit = question.max_new_tokens or max(1, min(self._max_new_tokens, room))
        seed = question.ticket.seed if question.seed is None else question.seed
        return Request(
            prompt,
            visual.tokens_TD,
            exam_key,
            limit,
            question.temperature,
            question.top_p,
            seed,
            begun=question.ticket.begun or (),
        )


class TextStream:
    """Token ids in, text out as soon as it is certain.

    Text is held back while a character's bytes are not complete, and while it may be the
    beginning of a stop string. Of several stop strings the one that is complete first counts.

    Attributes:
        ids: those read so far; those after a stop string are not.
        stopped: whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._before = 0  # ids decoded again, because the text of an id depends on its neighbours
        self._read = 0  # ids whose text is in _text
        self._text = ""  # not given out yet

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that has become certain with these ids."""
        return "".join(self._add(token) for token in ids if not self.stopped)

    def finish(self) -> str:
        """Return the rest of the text; no more ids come."""
        self._text += self._unread()
        self._before = self._read = len(self.ids)
        return self._take(hold=0)

    def _add(self, token: int) -> str:
        self.ids.append(token)
        text = self._unread()
        if text.endswith("\ufffd"):  # a character whose bytes have not all come
            return ""
        self._before, self._read = self._read, len(self.ids)
        self._text += text
        begun = (n for s in self._stop for n in range(1, len(s)) if self._text.endswith(s[:n]))
        return self._take(hold=max(begun, default=0))

    def _unread(self) -> str:
        old = self._tokenizer.decode(self.ids[self._before : self._read], skip_special_tokens=True)
        new = self._tokenizer.decode(self.ids[self._before :], skip_special_tokens=True)
        return new[len(old) :]

    def _take(self, hold: int) -> str:
        count = len(self._text) - hold
        starts = [(i + len(s), i) for s in self._stop if (i := self._text.find(s)) >= 0]
        if starts:
            self.stopped = True
            _, count = min(starts)
        text, self._text = self._text[:count], self._text[count:]
        return text
