"""The values that pass from one part of ultra to another.

Shapes: B groups, K frames of a group (padded, with a mask), T visual tokens of a frame,
S text tokens, D width of the language model. A composite is a frame of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role = Literal["system", "user", "assistant"]
Stage = Literal["align", "instruct"]
Split = Literal["train", "validation", "test"]

VISUAL = -1
"""The id that holds the place of one visual token in a row of token ids."""

IGNORED = -100
"""The label of a token that takes no part in the loss."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        has_frames: whether it came with frames. Visual tokens stand before the last user turn that
            did, or before the first one where none says so.
    """

    role: Role
    content: str
    has_frames: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns about one exam, for one stage; `task` names what is asked, for per-task scores.

    Attributes:
        language: of its texts, `zh` or `en`.
        closed: whether the set it comes from says that a few answers are possible (yes or no);
            None where it says nothing.
        question_id: how the set it comes from names the question, for answers given elsewhere.
    """

    stage: Stage
    task: str
    turns: tuple[Turn, ...]
    language: str = "zh"
    closed: bool | None = None
    question_id: str = ""


@dataclass(frozen=True, slots=True)
class FrameGroup:
    """One report and the k frames of its sweep.

    Attributes:
        frames: encoded JPEG or PNG, already de-identified.
        frame_sizes: (width, height) of each frame in pixels.
        frame_sources: where each frame came from: the place of its file in the exam's list,
            counted from 1, with the frame's number in a cine, e.g. `3#12`. File names may hold
            names of people, and stay behind.
        valid: whether each frame shows what the report says; None where nobody knows.
    """

    exam_id: str
    patient_key: str
    site: str
    findings: str
    diagnosis: str
    frames: tuple[bytes, ...]
    frame_sizes: tuple[tuple[int, int], ...]
    frame_sources: tuple[str, ...]
    history: str = ""
    modality: str = "US"
    valid: tuple[bool, ...] | None = None
    conversations: tuple[Conversation, ...] = ()
    split: Split = "train"


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded samples of one step, as numpy arrays; a sample is an exam with a row of text.

    Attributes:
        epochs: the pass over the exams that each sample belongs to.
        frames: encoded frames of each sample, or None when `features` are given.
        features: encoder name -> (B, K, T, F) features of the frozen encoder.
        frame_mask_BK: True where a frame is real.
        input_ids_BS: text ids with VISUAL where visual tokens go.
        labels_BS: the id on assistant turns, IGNORED elsewhere.
        text_mask_BS: True where a token is real.
        conversation_BS: number of the conversation that a token belongs to, counted from 1; 0 for
            what all of a row begin with. They stand in order, padding last.
        findings_ids_BS: ids of the report's findings, the text the redundancy teacher reads.
        findings_mask_BS: True where a findings token is real.
    """

    exam_ids: tuple[str, ...]
    epochs: tuple[int, ...]
    frames: tuple[tuple[bytes, ...], ...] | None
    features: Mapping[str, NDArray[Any]] | None
    frame_mask_BK: NDArray[np.bool_]
    input_ids_BS: NDArray[np.int64]
    labels_BS: NDArray[np.int64]
    text_mask_BS: NDArray[np.bool_]
    conversation_BS: NDArray[np.int64]
    findings_ids_BS: NDArray[np.int64]
    findings_mask_BS: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class VisualTokens:
    """What the encoder side hands to the language side: H_v of the chosen frame.

    Attributes:
        tokens_TD: float32 visual tokens, in the language model's width.
        chosen: index of the chosen frame; for strategies that use every frame, the best scored.
        scores_K: feature score of every frame; those of a composite share its score.
    """

    tokens_TD: NDArray[np.float32]
    chosen: int
    scores_K: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer and how it came about."""

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    chosen: int
    scores_K: tuple[float, ...] = field(default=())
