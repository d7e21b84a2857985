from __future__ import annotations

import pytest
import torch

from ultra.model.language import LanguageBranch
from ultra.model.packing import fit, plan_packing


@pytest.fixture(scope="module")
def branch(random_config) -> LanguageBranch:  # type: ignore[no-untyped-def]
    torch.manual_seed(2)
    branch = LanguageBranch(random_config.model.language)
    for name, parameter in branch.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return branch.eval()


def mask_of(lengths: list[int]) -> torch.Tensor:
    return torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([5], [[0]]),
        ([3, 3, 3], [[0], [1], [2]]),
        ([2, 10, 4, 3, 1], [[1], [2, 3, 0, 4]]),
        ([6, 5, 4, 3, 2], [[0], [1], [2, 4], [3]]),
        ([2, 8, 2, 2, 2], [[1], [0, 2, 3, 4]]),
    ],
)
def test_the_longest_come_first_and_the_first_row_with_room_takes_them(
    lengths: list[int], rows: list[list[int]]
) -> None:
    assert fit(lengths) == rows


def test_every_token_comes_back_to_its_place() -> None:
    mask_BS = mask_of([2, 9, 4, 1])
    values = torch.arange(1.0, 37).view(4, 9, 1)
    packing = plan_packing(mask_BS)
    packed = packing.pack(values)
    assert packed.shape == (2, 9, 1)
    assert packing.positions_PL.tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 1, 2, 3, 0, 1, 0, 0, 0],
    ]
    assert packed[1, :, 0].tolist() == [19, 20, 21, 22, 1, 2, 28, 1, 1]
    torch.testing.assert_close(packing.unpack(packed)[mask_BS], values[mask_BS])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_and_gradients_are_those_of_each_row_alone(
    branch: LanguageBranch, attention: str
) -> None:
    branch.base.set_attn_implementation(attention)
    lengths = [7, 40, 12, 19, 3, 25]
    mask_BS = mask_of(lengths)
    embeds_BSD = torch.randn(6, 40, branch.width, requires_grad=True)
    assert len(fit(lengths)) < len(lengths)
    logits_BSV = branch(embeds_BSD, mask_BS)
    (gradient,) = torch.autograd.grad(1e5 * logits_BSV[mask_BS].square().mean(), embeds_BSD)
    alone = [
        branch.model(inputs_embeds=row[None, :length], use_cache=False).logits[0]
        for row, length in zip(embeds_BSD, lengths, strict=True)
    ]
    torch.testing.assert_close(logits_BSV[mask_BS], torch.cat(alone), rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(1e5 * torch.cat(alone).square().mean(), embeds_BSD)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    assert expected[mask_BS].abs().max() > 0.1
    branch.base.set_attn_implementation("sdpa")


NUMBERS = [[0] * 4 + [1] * 3 + [2] * 5 + [3] * 2, [0] * 6 + [1] * 9 + [2] * 11, [1] * 8]
"""Conversations of three rows: the two short ones fit behind each other."""


def numbered() -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of those rows, and their numbers, padded with zeros."""
    longest = max(map(len, NUMBERS))
    padded = [row + [0] * (longest - len(row)) for row in NUMBERS]
    return mask_of([len(row) for row in NUMBERS]), torch.tensor(padded)


def test_conversations_go_on_from_what_they_share() -> None:
    packing = plan_packing(*numbered())
    short = [0, 1, 2, 3, *(4, 5, 6), *(4, 5, 6, 7, 8), *(4, 5)]
    assert packing.positions_PL.tolist() == [
        [*range(6), *range(6, 15), *range(6, 17)],
        [*short, *range(8), 0, 0, 0, 0],
    ]
    assert packing.seen_PLL is not None
    seen = packing.seen_PLL[1]
    assert seen[13].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 12, 13]
    assert seen[16].nonzero()[:, 0].tolist() == [14, 15, 16]
    assert seen.any(-1).all()  # filling sees filling


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_conversations_of_a_row_are_computed_as_if_each_were_alone(
    branch: LanguageBranch, attention: str
) -> None:
    branch.base.set_attn_implementation(attention)
    mask_BS, number_BS = numbered()
    embeds_BSD = torch.randn(*mask_BS.shape, branch.width, requires_grad=True)
    logits_BSV = branch(embeds_BSD, mask_BS, number_BS)
    ours, alone = [], []
    for row, numbers in enumerate(NUMBERS):
        for number in range(1, max(numbers) + 1):
            own = [place for place, n in enumerate(numbers) if n in (0, number)]
            theirs = branch.model(inputs_embeds=embeds_BSD[row, own][None], use_cache=False)
            ours.append(logits_BSV[row, own])
            alone.append(theirs.logits[0])
    torch.testing.assert_close(torch.cat(ours), torch.cat(alone), rtol=1e-4, atol=1e-5)
    gradients = [
        torch.autograd.grad(1e5 * torch.cat(logits).square().mean(), embeds_BSD, retain_graph=True)
        for logits in (ours, alone)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert gradients[1][0][mask_BS].abs().max() > 0.1
    branch.base.set_attn_implementation("sdpa")


def test_no_conversation_sees_another_and_all_see_what_they_share(branch: LanguageBranch) -> None:
    mask_BS, number_BS = numbered()
    embeds_BSD = torch.randn(*mask_BS.shape, branch.width)
    before = branch(embeds_BSD, mask_BS, number_BS)
    for row, number in ((0, 0), (0, 1), (0, 3), (1, 2), (2, 1)):
        changed = (number_BS[row] == number) & mask_BS[row]
        other = embeds_BSD.clone()
        other[row, changed] = 1000 * torch.randn(int(changed.sum()), branch.width)
        same_BS = (branch(other, mask_BS, number_BS) == before).all(-1)
        moved = changed if number else mask_BS[row]
        assert not same_BS[row, moved].any()
        same_BS[row, moved] = True
        assert same_BS[mask_BS].all()


def test_nothing_leaks_from_one_row_into_another(branch: LanguageBranch) -> None:
    lengths = [5, 30, 6, 9]  # the three short ones share a row
    mask_BS = mask_of(lengths)
    assert [0, 2, 3] in [sorted(row) for row in fit(lengths)]
    embeds_BSD = torch.randn(4, 30, branch.width)
    before = branch(embeds_BSD, mask_BS)
    for changed in (0, 2, 3):
        other = embeds_BSD.clone()
        other[changed] = 1000 * torch.randn(30, branch.width)
        after = branch(other, mask_BS)
        for row, length in enumerate(lengths):
            same = torch.equal(before[row, :length], after[row, :length])
            assert same == (row != changed)
