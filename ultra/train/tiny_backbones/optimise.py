"""The training loop of the tiny backbones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SEED = 20_001
"""Of every draw; no preset uses it for its patients."""


def optimise(
    name: str,
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
) -> None:
    """Minimise the first of what `loss` gives for a batch of `draw`; print the second."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        value, score = loss(*draw(generator))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            print(f"{name} step {step + 1}: loss {value:.3f} score {score:.3f}", flush=True)
