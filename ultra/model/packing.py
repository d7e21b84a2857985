"""Rows of different lengths laid end to end, so that nothing is computed for padding.

A packed row that holds several keeps them apart by their positions, which begin anew with each:
from those transformers makes a mask in which no token sees another row's (or, with flash attention,
the bounds that its kernel takes). Where a row holds several conversations behind what they all
begin with, their positions all go on from there, and the mask comes from here.

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
        positions_PL: of each token in its own conversation; 0 for filling.
        target_BS: place in the flat packed batch of each token; 0 for padding.
        seen_PLL: True where a token, the second axis, sees another; None where positions say it.
    """

    source_PL: Tensor
    positions_PL: Tensor
    target_BS: Tensor
    seen_PLL: Tensor | None

    def pack(self, values_BSX: Tensor) -> Tensor:
        """Return values_PLX of padded ones."""
        return values_BSX.flatten(0, 1)[self.source_PL]

    def unpack(self, values_PLX: Tensor) -> Tensor:
        """Return values_BSX of packed ones; those of padding mean nothing."""
        return values_PLX.flatten(0, 1)[self.target_BS]


def plan_packing(mask_BS: Tensor, conversation_BS: Tensor | None = None) -> Packing:
    """Return how rows are packed: into as few as the longest one's length allows, or nearly so.

    Args:
        mask_BS: True where a token is real; padding on the right. Without values, all are.
        conversation_BS: of each token, as in `Batch`; None for rows of one conversation.
    """
    num_rows, num_places = mask_BS.shape
    lengths = [num_places] * num_rows if mask_BS.is_meta else mask_BS.sum(-1).tolist()
    numbers_BS = torch.ones(mask_BS.shape, dtype=torch.long)
    if conversation_BS is not None:
        numbers_BS = conversation_BS.cpu()
    rows = fit(lengths)
    source = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    positions, owner, number = (torch.zeros_like(source) for _ in range(3))
    target = torch.zeros(mask_BS.shape, dtype=torch.long)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            length = lengths[index]
            places = torch.arange(length)
            here = slice(start, start + length)
            source[row, here] = index * num_places + places
            number[row, here] = numbers_BS[index, :length]
            positions[row, here] = _positions(number[row, here])
            owner[row, here] = index + 1
            target[index, :length] = row * source.shape[1] + start + places
            start += length
    device = mask_BS.device
    seen = _see(owner.to(device), number.to(device)) if number.max() > 1 else None
    return Packing(source.to(device), positions.to(device), target.to(device), seen)


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


def _positions(number_S: Tensor) -> Tensor:
    """Return positions_S in a row: each conversation goes on from the end of what all share."""
    begin_S = torch.searchsorted(number_S, number_S)  # where each token's conversation begins
    shared = (number_S == 0).sum()
    return torch.arange(len(number_S)) - begin_S + (number_S > 0) * shared


def _see(owner_PL: Tensor, number_PL: Tensor) -> Tensor:
    """Return seen_PLL: what stands before, in the same row, shared or of the same conversation."""
    same_row = owner_PL[:, :, None] == owner_PL[:, None]
    same = (number_PL[:, :, None] == number_PL[:, None]) | (number_PL[:, None] == 0)
    return (same_row & same).tril()
