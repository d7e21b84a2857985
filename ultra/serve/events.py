"""What passes between the parts of the endpoint: a question in, the events of its answer out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ultra.types import Turn, VisualTokens


@dataclass(frozen=True, slots=True)
class Ticket:
    """What stays the same when another replica goes on with a request.

    Attributes:
        id: names the request; of hexadecimal digits.
        created: unix time of its arrival, which its deadline counts from.
        begun: token ids of an answer whose text the client has already been sent; None before it
            has been sent anything.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)
    begun: tuple[int, ...] | None = None

    @property
    def seed(self) -> int:
        """A seed for a request that brings none."""
        return int(self.id[:15], 16)


@dataclass(frozen=True, slots=True)
class Question:
    """A checked request.

    The default is the likeliest answer, the same each time: whoever asks about an exam again must
    not read something else.

    Attributes:
        frames: those of the last turn that has any.
        num_near_duplicates: how many of them `prepare` would drop as repeats of the one before.
    """

    turns: tuple[Turn, ...]
    frames: tuple[bytes, ...]
    max_new_tokens: int | None
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    num_near_duplicates: int = 0
    stream: bool = False
    include_usage: bool = False
    model: str = ""
    ticket: Ticket = field(default_factory=Ticket)


@dataclass(frozen=True, slots=True)
class Seen:
    """What an encoder hands to the language model.

    Attributes:
        num_cached: frames that it remembered.
        replica: its name.
    """

    visual: VisualTokens
    num_cached: int
    replica: str


@dataclass(frozen=True, slots=True)
class Opening:
    """The first thing an answer says: which frame was chosen, and how long the prompt is.

    Attributes:
        replicas: part of the endpoint -> the name of the one that served; None where none has one.
        num_cached_frames: frames that the encoder had seen before.
    """

    chosen: int
    scores_K: tuple[float, ...]
    num_prompt_tokens: int
    replicas: Mapping[str, str] | None = None
    num_cached_frames: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """More of an answer.

    Attributes:
        text: what has become certain.
        token_ids: those read since the last delta; a replica that is told them goes on from here.
        num_tokens: all of the answer so far.
        finish_reason: that of the last delta.
        num_cached_tokens: tokens of the prompt that the engine remembered; of the last delta.
    """

    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Instead of an answer: why the language model cannot take the question.

    Attributes:
        busy: whether it can later.
    """

    message: str
    busy: bool = False


Event = Opening | Delta | Refusal
