"""What a stage trains, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ultra.config import Part

PARTS: Mapping[Part, Callable[[str], bool]] = {
    "projectors": lambda name: name.startswith("fusion.projectors."),
    "alpha": lambda name: name == "fusion.alpha",
    "scorer": lambda name: name.startswith("scorer."),
    "lora": lambda name: name.startswith("language.") and ".lora_" in name,
    "language": lambda name: name.startswith("language.") and ".lora_" not in name,
}
"""Part of the model -> whether a parameter of that name belongs to it; each to exactly one."""


@dataclass(frozen=True, slots=True)
class PartCount:
    """How many parameters a part has and whether they train."""

    part: Part
    parameters: int
    trainable: bool


def select_trainable(model: nn.Module, parts: Iterable[Part]) -> dict[Part, list[str]]:
    """Make exactly the named parts trainable and return their parameters' names by part.

    Raises:
        ValueError: when a named part has no parameters in this model.
    """
    chosen: dict[Part, list[str]] = {part: [] for part in parts}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in chosen)
        if part in chosen:
            chosen[part].append(name)
    for part, names in chosen.items():
        if not names:
            raise ValueError(f"trainable: this model has no parameters in {part!r}")
    return chosen


def part_of(name: str) -> Part:
    """Return the part a parameter belongs to.

    Raises:
        ValueError: for a parameter of no part or of two.
    """
    parts = [part for part, matches in PARTS.items() if matches(name)]
    if len(parts) != 1:
        raise ValueError(f"parameter {name} belongs to {parts or 'no part'}")
    return parts[0]


def count_parts(model: nn.Module) -> list[PartCount]:
    """Return a line for each part that has parameters."""
    counts = []
    for part in PARTS:
        parameters = [p for n, p in model.named_parameters() if part_of(n) == part]
        if parameters:
            # Under ZeRO-3 a parameter's own shape is empty; its true size is in ds_numel.
            total = sum(int(getattr(p, "ds_numel", p.numel())) for p in parameters)
            counts.append(PartCount(part, total, parameters[0].requires_grad))
    return counts
