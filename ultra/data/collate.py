"""Rows of exams as padded batches.

Shapes: B samples, K frames of a group (padded) or the one picture composed of them, S text tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ultra.config import StageConfig
from ultra.data.prompts import Tokenizer, encode_conversation
from ultra.types import IGNORED, VISUAL, Batch, Conversation, FrameGroup

Features = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One exam with the conversations it is trained on.

    Attributes:
        conversations: the first is trained on, and those after it that `join` puts behind it.
        features: encoder name -> (K, T, F), or None when the frames' pixels are used.
        epoch: the pass over the exams it belongs to.
    """

    group: FrameGroup
    conversations: Sequence[Conversation]
    features: Features | None
    epoch: int = 0


class Text(NamedTuple):
    """A row of text.

    Attributes:
        ids: of its tokens, with VISUAL places.
        labels: ids of answers, IGNORED elsewhere.
        conversations: number of each token's conversation, counted from 1; 0 for what all of the
            row begin with.
    """

    ids: list[int]
    labels: list[int]
    conversations: list[int]


@dataclass(frozen=True, slots=True)
class Collator:
    """Turns samples into a batch.

    Args:
        tokenizer: the language model's.
        template: name of the conversation template.
        num_visual_tokens: number of frames -> visual tokens the language model reads.
        max_length: longest row; a longer one loses its end.
        num_pictures: number of frames -> pictures that the encoders see, which are K.
    """

    tokenizer: Tokenizer
    template: str
    num_visual_tokens: Callable[[int], int]
    max_length: int
    num_pictures: Callable[[int], int] = lambda num_frames: num_frames

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Return the padded batch.

        Raises:
            ValueError: for a sample with nothing to learn from, naming the exam.
        """
        return self._pad(samples, [self._encode(sample) for sample in samples])

    def batches(self, samples: Sequence[Sample], size: int) -> Iterator[Batch]:
        """Yield the samples as batches of a size, rows of like length in tokens together.

        Raises:
            ValueError: for a sample with nothing to learn from, naming the exam.
        """
        texts = [self._encode(sample) for sample in samples]
        order = sorted(range(len(samples)), key=lambda index: len(texts[index].ids))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield self._pad([samples[i] for i in chosen], [texts[i] for i in chosen])

    def _pad(self, samples: Sequence[Sample], texts: Sequence[Text]) -> Batch:
        findings = [self._encode_findings(sample.group) for sample in samples]
        input_ids_BS, text_mask_BS = pad([text.ids for text in texts], 0)
        labels_BS, _ = pad([text.labels for text in texts], IGNORED)
        conversation_BS, _ = pad([text.conversations for text in texts], 0)
        findings_ids_BS, findings_mask_BS = pad(findings, 0)
        counts = [self.num_pictures(len(sample.group.frame_sizes)) for sample in samples]
        frame_mask_BK = np.arange(max(counts))[None] < np.array(counts)[:, None]
        has_features = samples[0].features is not None
        return Batch(
            exam_ids=tuple(sample.group.exam_id for sample in samples),
            epochs=tuple(sample.epoch for sample in samples),
            frames=None if has_features else tuple(sample.group.frames for sample in samples),
            features=self._stack(samples, frame_mask_BK) if has_features else None,
            frame_mask_BK=frame_mask_BK,
            input_ids_BS=input_ids_BS,
            labels_BS=labels_BS,
            text_mask_BS=text_mask_BS,
            conversation_BS=conversation_BS,
            findings_ids_BS=findings_ids_BS,
            findings_mask_BS=findings_mask_BS,
        )

    def _encode(self, sample: Sample) -> Text:
        num_visual = self.num_visual_tokens(len(sample.group.frame_sizes))
        try:
            texts = [
                encode_conversation(self.tokenizer, self.template, conversation.turns, num_visual)
                for conversation in sample.conversations
            ]
        except ValueError as error:
            raise ValueError(f"exam {sample.group.exam_id}: {error}") from None
        ids, labels = (tokens[: self.max_length] for tokens in texts[0])
        if all(label == IGNORED for label in labels):
            raise ValueError(
                f"exam {sample.group.exam_id}: no answer within the first {self.max_length} tokens"
            )
        return join([(ids, labels), *texts[1:]], self.max_length)

    def _encode_findings(self, group: FrameGroup) -> list[int]:
        bos = self.tokenizer.bos_token_id
        text = self.tokenizer.encode(group.findings or group.diagnosis, add_special_tokens=False)
        # The likelihood teacher reads it after the first token and one frame.
        room = self.max_length - 1 - self.num_visual_tokens(1)
        return ([] if bos is None else [bos]) + text[:room]

    def _stack(
        self, samples: Sequence[Sample], frame_mask_BK: NDArray[np.bool_]
    ) -> dict[str, NDArray[np.generic]]:
        stacked: dict[str, NDArray[np.generic]] = {}
        for name in samples[0].features or {}:
            arrays = [(sample.features or {})[name] for sample in samples]
            shape = (*frame_mask_BK.shape, *arrays[0].shape[1:])
            stacked[name] = np.zeros(shape, dtype=arrays[0].dtype)
            for row, array in enumerate(arrays):
                stacked[name][row, : len(array)] = array
        return stacked


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return rows padded on the right to the longest, and the mask of what is real."""
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max())[None] < lengths[:, None]
    padded = np.full(mask.shape, value, dtype=np.int64)
    padded[mask] = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    return padded, mask


def join(texts: Sequence[tuple[list[int], list[int]]], max_length: int) -> Text:
    """Return conversations about the same frames as one row, what they begin with there but once.

    The first is in it whole. Of the others those are that begin as it does up to the last visual
    token, with no answer until then, as long as there is room for the whole of them.

    Args:
        texts: ids and labels of each conversation.
        max_length: of the row.
    """
    ids, labels = map(list, texts[0])
    start = _end_of_frames(ids, labels)
    numbers = [0] * start + [1] * (len(ids) - start)
    for own_ids, own_labels in texts[1:]:
        alike = own_ids[:start] == ids[:start] and _end_of_frames(own_ids, own_labels) == start
        if start and alike and len(ids) + len(own_ids) - start <= max_length:
            numbers += [numbers[-1] + 1] * (len(own_ids) - start)
            ids += own_ids[start:]
            labels += own_labels[start:]
    return Text(ids, labels, numbers)


def _end_of_frames(ids: Sequence[int], labels: Sequence[int]) -> int:
    """Return how many tokens there are up to the last visual one, 0 if one by then is learnt.

    Nor may the next one be: it could not be told from what stands before it in the row.
    """
    end = max((place + 1 for place, token in enumerate(ids) if token == VISUAL), default=0)
    return end if all(label == IGNORED for label in labels[: end + 1]) else 0


def pick_conversations(
    group: FrameGroup, stage: StageConfig, seed: int, epoch: int
) -> tuple[Conversation, ...]:
    """Return the conversations of an exam that an epoch trains on; another comes first each epoch.

    Raises:
        ValueError: when the exam has none for the stage, naming it.
    """
    fitting = [c for c in group.conversations if c.stage == stage.name]
    if not fitting:
        raise ValueError(
            f"exam {group.exam_id}: no conversation for stage {stage.name!r}; run "
            "ray_jobs.instructions"
        )
    digest = hashlib.sha256(f"{seed} {group.exam_id}".encode()).digest()
    first = (int.from_bytes(digest[:8], "big") + epoch) % len(fitting)
    count = 1 if stage.conversations == "one" else len(fitting)
    return tuple((fitting[first:] + fitting[:first])[:count])
