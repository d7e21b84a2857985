"""An input embedding with visual tokens beyond the vocabulary.

Continuous batching takes token ids only, so visual tokens get ids too. A frame's tokens fill one
slot of a table, and each refill of a slot gives new ids: whoever remembers something by ids, as
the engine's prefix cache does, never takes one image for another.

Shapes: V visual tokens of a request, T of a frame, D width of the language model, R rows of the
table.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

MAX_ID = 2**31 - 1
"""The engine keeps ids as int32."""


@dataclass(slots=True)
class _Exam:
    slots: list[int]
    ids: list[int]
    num_holders: int = 0


class VisualTable(nn.Module):
    """An input embedding with visual tokens beyond the vocabulary.

    Args:
        embedding: the language model's own.
        num_slots: frames the table holds.
        tokens_per_frame: T.
    """

    rows_RD: Tensor

    def __init__(self, embedding: nn.Module, num_slots: int, tokens_per_frame: int) -> None:
        super().__init__()
        self.text = embedding
        weight: Any = embedding.weight
        self.vocab_size, width = weight.shape
        self.tokens_per_frame = tokens_per_frame
        num_rows = num_slots * tokens_per_frame
        rows = torch.zeros(num_rows, width, dtype=weight.dtype, device=weight.device)
        self.register_buffer("rows_RD", rows, persistent=False)
        self._max_fills = (MAX_ID + 1 - self.vocab_size) // num_rows
        self._fills = [0] * num_slots
        self._free = deque(range(num_slots))
        self._exams: OrderedDict[str, _Exam] = OrderedDict()  # longest unused first

    def forward(self, ids: Tensor) -> Tensor:
        """Return embeddings (..., D) of ids of text and visual tokens."""
        is_visual = ids >= self.vocab_size
        text = self.text(ids.masked_fill(is_visual, 0))
        rows = (ids - self.vocab_size).clamp(min=0) % len(self.rows_RD)
        return torch.where(is_visual.unsqueeze(-1), self.rows_RD[rows], text)

    @property
    def in_use(self) -> bool:
        """Whether anyone holds an exam."""
        return any(exam.num_holders for exam in self._exams.values())

    def acquire(self, key: str, tokens_VD: NDArray[np.float32]) -> list[int] | None:
        """Return the ids of an exam's visual tokens, or None while there is no room for them.

        They stay valid until as many `release` as `acquire` calls were made for the exam.
        """
        exam = self._exams.get(key)
        if exam is None:
            slots = self._take_slots(len(tokens_VD) // self.tokens_per_frame)
            if slots is None:
                return None
            exam = _Exam(slots, self._fill(slots, tokens_VD))
            self._exams[key] = exam
        if len(exam.ids) != len(tokens_VD):
            raise ValueError(
                f"exam {key}: {len(tokens_VD)} visual tokens now, {len(exam.ids)} before"
            )
        exam.num_holders += 1
        self._exams.move_to_end(key)
        return exam.ids

    def release(self, key: str) -> None:
        """Let go of an exam; it stays until its slots are needed."""
        self._exams[key].num_holders -= 1

    def _take_slots(self, count: int) -> list[int] | None:
        unused = [key for key, exam in self._exams.items() if not exam.num_holders]
        while len(self._free) < count and unused:
            # A slot whose ids have run out is not given back: the Generator begins anew.
            slots = self._exams.pop(unused.pop(0)).slots
            self._free.extend(s for s in slots if self._fills[s] < self._max_fills)
        if len(self._free) < count:
            return None
        return [self._free.popleft() for _ in range(count)]

    @torch.no_grad()
    def _fill(self, slots: list[int], tokens_VD: NDArray[np.float32]) -> list[int]:
        size = self.tokens_per_frame
        ids: list[int] = []
        for index, slot in enumerate(slots):
            frame_TD = torch.tensor(tokens_VD[index * size : (index + 1) * size])
            self.rows_RD[slot * size : (slot + 1) * size] = frame_TD.to(self.rows_RD)
            first = self.vocab_size + self._fills[slot] * len(self.rows_RD) + slot * size
            ids += range(first, first + size)
            self._fills[slot] += 1
        if self.rows_RD.is_cuda:  # the engine reads on a stream of its own
            torch.cuda.current_stream().synchronize()
        return ids
