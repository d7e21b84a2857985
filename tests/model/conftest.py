"""A small model, groups of unequal size for it, and numpy's own layer norm.

B=2 groups, K=3 frames, T=4 tokens, D=24, 20 clip and 36 sam channels: all different.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.encoder_weights import write_encoders
from ultra.config import ModelConfig
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.types import IGNORED, VISUAL

T, CLIP, SAM = 4, 20, 36
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Random weights of every family of encoders, with a grid of 4 x 4."""
    folder: Path = tmp_path_factory.mktemp("weights")
    write_encoders(folder)
    return folder


@pytest.fixture(scope="session")
def read_recipe() -> Callable[[str], Any]:
    """The block of code in CONTRIBUTING.md that holds a text, compiled."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)

    def read(part: str) -> Any:
        (block,) = [block for block in blocks if part in block]
        return compile(block, "CONTRIBUTING.md", "exec")

    return read


@pytest.fixture(scope="session")
def make_config(random_config) -> Callable[..., ModelConfig]:
    """The model's section with some keys replaced: `make_config(selection={"pool": "mean"})`."""

    def make(**changes: Any) -> ModelConfig:
        raw = random_config.model.model_dump()
        for key, change in changes.items():
            raw[key] = {**raw[key], **change}
        return ModelConfig.model_validate(raw)

    return make


@pytest.fixture(scope="session")
def make_model(make_config) -> Callable[..., LlavaUltra]:
    """A model with random weights everywhere, LoRA's second factor and the biases among them."""

    def make(**changes: Any) -> LlavaUltra:
        config = make_config(**changes)
        torch.manual_seed(2)
        model = LlavaUltra(config, LanguageBranch(config.language))
        for name, parameter in model.named_parameters():
            if ".lora_B." in name or name.startswith("scorer."):
                torch.nn.init.normal_(parameter, std=0.2)
            elif name.startswith("fusion.projectors."):
                torch.nn.init.normal_(parameter, std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, Any]]:
    """Inputs of a model: groups of `counts` frames, with places for `places(k)` visual tokens."""

    def make(counts: tuple[int, ...] = (3, 2), strategy: str = "adaptive") -> dict[str, Any]:
        rng = np.random.default_rng(7)
        rows, findings = [], []
        for i, count in enumerate(counts):
            places = T * (count if strategy == "all" else 1)  # a composite has one frame
            question, answer = rng.integers(3, 90, 5 + i), rng.integers(3, 90, 4 + 3 * i)
            rows.append(
                (
                    [1, 9, *[VISUAL] * places, *question, *answer],
                    [IGNORED] * (2 + places + len(question)) + [*answer],
                )
            )
            findings.append([1, *rng.integers(3, 90, 7 - 2 * i)])
        mask_BK = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
        features = {
            name: torch.from_numpy(rng.normal(size=(*mask_BK.shape, T, width)).astype(np.float32))
            for name, width in (("clip", CLIP), ("sam", SAM))
        }
        ids, text_mask = pad([ids for ids, _ in rows], 0)
        labels, _ = pad([labels for _, labels in rows], IGNORED)
        findings_ids, findings_mask = pad(findings, 0)
        return {
            "features": features,
            "frame_mask_BK": mask_BK,
            "input_ids_BS": ids,
            "labels_BS": labels,
            "text_mask_BS": text_mask,
            "findings_ids_BS": findings_ids,
            "findings_mask_BS": findings_mask,
        }

    return make


@pytest.fixture(scope="session")
def take_one() -> Callable[[dict[str, Any], int], dict[str, Any]]:
    """One group out of a batch, without any padding."""

    def take(inputs: dict[str, Any], row: int) -> dict[str, Any]:
        num_frames = int(inputs["frame_mask_BK"][row].sum())
        num_tokens = int(inputs["text_mask_BS"][row].sum())
        num_findings = int(inputs["findings_mask_BS"][row].sum())
        return {
            "features": {n: f[row : row + 1, :num_frames] for n, f in inputs["features"].items()},
            "frame_mask_BK": inputs["frame_mask_BK"][row : row + 1, :num_frames],
            **{
                name: inputs[name][row : row + 1, :num_tokens]
                for name in ("input_ids_BS", "labels_BS", "text_mask_BS")
            },
            **{
                name: inputs[name][row : row + 1, :num_findings]
                for name in ("findings_ids_BS", "findings_mask_BS")
            },
        }

    return take


def pad(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    padded = [[*row, *[value] * (longest - len(row))] for row in rows]
    mask = [[True] * len(row) + [False] * (longest - len(row)) for row in rows]
    return torch.tensor([[int(v) for v in row] for row in padded]), torch.tensor(mask)


@pytest.fixture(scope="session")
def normalise() -> Callable[[Any], Any]:
    """Layer norm over the last axis in numpy, float64."""

    def layer_norm(x: Any) -> Any:
        x = np.asarray(x, dtype=np.float64)
        mean = x.mean(-1, keepdims=True)
        return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)

    return layer_norm
