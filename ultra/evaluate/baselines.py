"""What can be reached without looking at the frames, or without a model."""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from ultra.evaluate.predictions import Asked

_SIDE = 128


@dataclass(frozen=True, slots=True)
class BlindAnswers:
    """The most frequent training answers: what a model that never looks could say.

    Attributes:
        by_task: task -> its most frequent answer.
        by_question: (task, question) -> its most frequent answer.
    """

    by_task: Mapping[str, str]
    by_question: Mapping[tuple[str, str], str]

    def constant(self, task: str) -> str:
        """Return the most frequent training answer of a task; empty for a task never trained."""
        return self.by_task.get(task, "")

    def question_only(self, task: str, question: str) -> str:
        """Return the most frequent training answer to this very question, else the constant."""
        return self.by_question.get((task, question), self.constant(task))


def count_answers(counts: Mapping[Asked, int]) -> BlindAnswers:
    """Return the blind answers of counted training answers; of two equally frequent, the lesser."""
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    by_question: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for (task, question, answer), count in counts.items():
        by_task[task][answer] += count
        by_question[task, question][answer] += count
    return BlindAnswers(
        {task: _most_frequent(answers) for task, answers in by_task.items()},
        {asked: _most_frequent(answers) for asked, answers in by_question.items()},
    )


def _most_frequent(answers: Counter[str]) -> str:
    return min(answers, key=lambda answer: (-answers[answer], answer))


def find_blobs(frames: Iterable[bytes]) -> tuple[int, int]:
    """Return the frames with the brightest and with the darkest local blob, as indices.

    A blob is a difference of Gaussians on the frame at 128 pixels, 4 and 12 wide, where the picture
    is not black all around.
    """
    responses = [_blob_response(frame) for frame in frames]
    brightest = max(range(len(responses)), key=lambda i: responses[i][1])
    darkest = min(range(len(responses)), key=lambda i: responses[i][0])
    return brightest, darkest


def _blob_response(frame: bytes) -> tuple[float, float]:
    """Return the lowest and the highest response of a frame."""
    with Image.open(io.BytesIO(frame)) as image:
        small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    pixels: NDArray[np.float32] = np.asarray(small, dtype=np.float32)
    inside = gaussian_filter((pixels > 8).astype(np.float32), 12) > 0.8
    response = gaussian_filter(pixels, 4) - gaussian_filter(pixels, 12)
    seen: Sequence[float] = response[inside].tolist() or [0.0]
    return min(seen), max(seen)
