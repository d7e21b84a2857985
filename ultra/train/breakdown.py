"""What a profile of a stage's steps says: a line, a table and a picture.

Matplotlib is imported where something is drawn: machines that only train need none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ultra.model.drawing import CHOSEN_COLOUR, VALID_COLOUR
from ultra.train.loop import Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Device = Literal["CPU", "GPU"]

NUM_OPERATORS = 10
"""Operators in the picture; the table has all."""
OPERATOR_COLOUR = "#7570b3"
MAX_NAME = 34
"""Characters of an operator's name in the picture; a longer one loses its middle."""
TEXT_ROOM = 1.5
"""Width of a panel over that of its longest bar."""
IDLE = {Span.DATA, Span.OTHER}
"""Parts in which the model waits."""


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator: how often it ran, and what it took itself, without those that it called."""

    name: str
    calls: int
    ms: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Where the time of a stage's steps goes.

    Attributes:
        stage: its name.
        step: steps of the stage that were made by then.
        num_steps: steps that the parts are the mean of.
        parts_ms: part -> milliseconds of a step; they add up to the whole step.
        operators: of one forward pass and what follows it to the end of its step, longest first.
        device: whose time that of the operators is.
    """

    stage: str
    step: int
    num_steps: int
    parts_ms: Mapping[Span, float]
    operators: Sequence[Operator]
    device: Device

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step."""
        return sum(self.parts_ms.values())

    @property
    def operators_ms(self) -> float:
        """Milliseconds of all operators."""
        return sum(operator.ms for operator in self.operators)

    def describe(self) -> str:
        """Return one line: what a step takes, and its parts of a percent at least."""
        shares = {span: 100 * ms / self.step_ms for span, ms in self.parts_ms.items()}
        ranked = sorted(shares, key=lambda span: -shares[span])
        shown = ", ".join(f"{shares[span]:.0f} % {span}" for span in ranked if shares[span] >= 1)
        return f"{self.stage}: of {self.step_ms:.0f} ms a step {shown}"

    def rows(self) -> list[dict[str, Any]]:
        """Return the table: parts, then operators; `percent` is of the kind's sum.

        A table of MLflow grows: after a restart within the stage it has rows of another `step` too.
        """
        parts = [
            {"kind": "part", "name": str(span), "ms": ms, "percent": 100 * ms / self.step_ms}
            for span, ms in self.parts_ms.items()
        ]
        operators = [
            {
                "kind": "operator", "name": o.name, "calls": o.calls, "ms": o.ms,
                "percent": 100 * o.ms / self.operators_ms,
            }
            for o in self.operators
        ]  # fmt: skip
        return [{"step": self.step, "calls": None, **row} for row in (*parts, *operators)]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of the picture; `note` comes after its milliseconds and percent."""

    label: str
    ms: float
    note: str
    colour: str


def draw_breakdown(found: Breakdown) -> Figure:
    """Return one figure: the parts of a step above, the operators that took longest below."""
    from matplotlib.figure import Figure

    operators = found.operators[:NUM_OPERATORS]
    heights = [len(found.parts_ms) + 1.0, len(operators) + 1.0]
    figure = Figure(figsize=(7.5, 0.26 * sum(heights) + 0.4), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights)
    figure.suptitle(f"{found.stage}: {found.step_ms:.0f} ms a step", fontsize=11)
    parts = [
        Bar(str(span), ms, "", CHOSEN_COLOUR if span in IDLE else VALID_COLOUR)
        for span, ms in found.parts_ms.items()
    ]
    title = f"mean of {found.num_steps}, to step {found.step}; orange: the model waits"
    _draw_bars(above, title, parts, found.step_ms)
    ran = [Bar(_shorten(o.name), o.ms, f", {o.calls} calls", OPERATOR_COLOUR) for o in operators]
    title = f"{found.device} time of operators alone, in one forward pass and what follows"
    _draw_bars(below, title, ran, found.operators_ms)
    return figure


def _draw_bars(axis: Axes, title: str, bars: Sequence[Bar], whole_ms: float) -> None:
    axis.barh(range(len(bars)), [bar.ms for bar in bars], color=[bar.colour for bar in bars])
    for place, bar in enumerate(bars):
        text = f"{bar.ms:.1f} ms, {100 * bar.ms / whole_ms:.0f} %{bar.note}"
        axis.annotate(
            text, (bar.ms, place), (4, 0), textcoords="offset points", va="center", size=8
        )
    axis.set_title(title, fontsize=9, loc="left", x=0)
    axis.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, TEXT_ROOM * max((bar.ms for bar in bars), default=1))
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _shorten(name: str) -> str:
    name, half = name.removeprefix("aten::"), MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[:half]}…{name[-half:]}"
