"""Rows of different lengths laid end to end, so that nothing is computed for padding.

A row that holds several keeps them apart by their positions, which begin anew with each: from those
transformers makes a mask in which no token sees another row's (or, with flash attention, the bounds
that its kernel takes).

Shapes: B rows with padding on their right, S places of the longest, P packed rows, L places of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the tokens of a padded batch stand in a packed one.

    Attributes:
        source_PL: place in the flat padded batch that each packed one takes its token from; filling
            takes the first.
        positions_PL: of each token in its own row; 0 for filling, which so sees but itself.
        target_BS: place in the flat packed batch of each token; 0 for padding.
    """

    source_PL: Tensor
    positions_PL: Tensor
    target_BS: Tensor

    def pack(self, values_BSX: Tensor) -> Tensor:
        """Return values_PLX of padded ones."""
        return values_BSX.flatten(0, 1)[self.source_PL]

    def unpack(self, values_PLX: Tensor) -> Tensor:
        """Return values_BSX of packed ones; those of padding mean nothing."""
        return values_PLX.flatten(0, 1)[self.target_BS]


def plan_packing(mask_BS: Tensor) -> Packing:
    """Return how rows are packed: into as few as the longest one's length allows, or nearly so.

    Args:
        mask_BS: True where a token is real; padding on the right. Without values, all are.
    """
    num_rows, num_places = mask_BS.shape
    lengths = [num_places] * num_rows if mask_BS.is_meta else mask_BS.sum(-1).tolist()
    rows = fit(lengths)
    source = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    positions, target = torch.zeros_like(source), torch.zeros(mask_BS.shape, dtype=torch.long)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            places = torch.arange(lengths[index])
            here = slice(start, start + lengths[index])
            source[row, here] = index * num_places + places
            positions[row, here] = places
            target[index, : lengths[index]] = row * source.shape[1] + start + places
            start += lengths[index]
    device = mask_BS.device
    return Packing(source.to(device), positions.to(device), target.to(device))


def fit(lengths: Sequence[int]) -> list[list[int]]:
    """Return which items share a row of the longest one's length: first fit, longest first."""
    room: list[int] = []
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, left in enumerate(room):
            if lengths[index] <= left:
                room[row] -= lengths[index]
                rows[row].append(index)
                break
        else:
            room.append(max(lengths) - lengths[index])
            rows.append([index])
    return rows
