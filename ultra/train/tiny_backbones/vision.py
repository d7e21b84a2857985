"""The tiny encoders, CLIP and SAM, and the simulated frames they learn from.

Shapes: N frames, W words of captions, C H W pixels, M side of the masks, G side of SAM's grid.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ultra.config import SimulatorConfig
from ultra.data.synthetic import SITES, SimulatedExam, Truth, simulate, simulated_exams
from ultra.model.clip import CLIP_MEAN, CLIP_STD
from ultra.model.pictures import decode
from ultra.model.sam import SAM_MEAN, SAM_STD, build_sam_encoder
from ultra.train.tiny_backbones.optimise import SEED, optimise
from ultra.types import FrameGroup

CLIP_SIZE, SAM_SIZE, MASK_SIZE, PATCH = 64, 128, 64, 16
GRID = CLIP_SIZE // PATCH
KINDS = ("cyst", "haemangioma", "nodule", "stone")
WORDS = (*SITES, "left", "right", "normal", *KINDS)
"""What a caption is made of."""
SIZES_MM = sorted({size for site in SITES.values() for size in site.sizes_mm})
MARGINS = ("clear", "unclear")
UNKNOWN = -1


@dataclass(frozen=True, slots=True)
class Frames:
    """Simulated frames with what CLIP and SAM learn from, and the groups they belong to.

    Attributes:
        masks_NMM: True on objects, lesions and artefacts alike.
        sizes_NMM: place in SIZES_MM, UNKNOWN off the lesion and in frames that cut its rim alone.
        margins_NMM: place in MARGINS, UNKNOWN there too, and where a report states none.
    """

    pixels_NHW: NDArray[np.uint8]
    captions_NW: NDArray[np.bool_]
    masks_NMM: NDArray[np.bool_]
    sizes_NMM: NDArray[np.int8]
    margins_NMM: NDArray[np.int8]
    groups: list[FrameGroup]


def simulate_frames(num_patients: int) -> Frames:
    """Return the frames of simulated patients, made by two processes."""
    config = SimulatorConfig(num_patients=num_patients, frame_size=SAM_SIZE)
    pairs = list(simulated_exams(config, SEED))
    with get_context("spawn").Pool(2) as pool:
        parts = pool.map(functools.partial(_simulate_one, config), pairs, chunksize=16)
    groups, pixels, captions, masks, sizes, margins = zip(*parts, strict=True)
    return Frames(
        np.concatenate(pixels),
        np.concatenate(captions),
        np.concatenate(masks),
        np.concatenate(sizes),
        np.concatenate(margins),
        list(groups),
    )


def _simulate_one(config: SimulatorConfig, pair: tuple[int, int]) -> tuple[Any, ...]:
    exam = simulate(config, SEED, *pair)
    pixels = np.stack([np.array(decode(frame).convert("L")) for frame in exam.group.frames])
    valid = exam.group.valid or ()
    captions = np.array([np.isin(WORDS, _caption(exam.truth, v)) for v in valid])
    return exam.group, pixels, captions, *_label_pixels(exam)


def _caption(truth: Truth, valid: bool) -> list[str]:
    """Return the words for what a frame shows; the lesion only where it shows."""
    return [truth.site, truth.side, *([truth.kind] if valid else [])]


def _label_pixels(exam: SimulatedExam) -> tuple[NDArray[Any], ...]:
    """Return masks, sizes and margins as Frames has them."""
    step = SAM_SIZE // MASK_SIZE
    truth, lesions = exam.truth, exam.lesion_masks_KHW

    def shrink(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        shares = masks.reshape(len(masks), MASK_SIZE, step, MASK_SIZE, step).mean((2, 4))
        large: NDArray[np.bool_] = shares > 0.5
        return large

    known = shrink(lesions) & np.array(exam.group.valid)[:, None, None]
    size = UNKNOWN if truth.size_mm is None else SIZES_MM.index(truth.size_mm)
    margin = UNKNOWN if truth.margin is None else MARGINS.index(truth.margin)
    return (
        shrink(lesions | exam.artefact_masks_KHW),
        np.where(known, size, UNKNOWN).astype(np.int8),
        np.where(known, margin, UNKNOWN).astype(np.int8),
    )


def train_clip(frames: Frames, steps: int) -> Any:
    """Return a CLIP vision model trained against embeddings of the captions."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(SEED)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
            image_size=CLIP_SIZE, patch_size=PATCH,
        )
    )  # fmt: skip
    words = nn.Parameter(torch.randn(len(WORDS), 96) * 0.1)
    project = nn.Linear(96, 96)
    captions_NW = torch.from_numpy(frames.captions_NW).float()

    def loss(rows: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        small = functional.interpolate(pixels, size=CLIP_SIZE, mode="area")
        # The patch tokens are what ultra reads, below the last layer, so they carry the meaning.
        normalised = _normalise(small, CLIP_MEAN, CLIP_STD)
        output = model(pixel_values=normalised, output_hidden_states=True)
        hidden = output.hidden_states[-2][:, 1:]
        pooled = project(functional.layer_norm(hidden, hidden.shape[-1:]).mean(1))
        # A caption is the sum of its words; the batch's own captions are what it may be.
        captions, target = torch.unique(captions_NW[rows], dim=0, return_inverse=True)
        text = functional.normalize(captions @ words, dim=-1)
        match = functional.normalize(pooled, dim=-1) @ text.T
        right = (match.argmax(-1) == target).float().mean()
        return functional.cross_entropy(16 * match, target), right

    parameters = [*model.parameters(), words, *project.parameters()]
    optimise("clip", parameters, loss, _pictures(frames, 96), steps)
    return model.half()


def train_sam(frames: Frames, steps: int) -> Any:
    """Return a SAM image encoder trained to outline objects and to tell their size and edge."""
    from segment_anything.modeling import ImageEncoderViT

    torch.manual_seed(SEED)
    model = ImageEncoderViT(
        img_size=SAM_SIZE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=4, out_chans=64,
        use_rel_pos=True, window_size=4, global_attn_indexes=(1, 3),
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    build_sam_encoder(model.state_dict())  # what is shipped must load as any SAM does
    cell = MASK_SIZE * PATCH // SAM_SIZE
    outline = nn.Sequential(nn.Conv2d(64, cell**2, 1), nn.PixelShuffle(cell))
    tell = nn.Conv2d(64, len(SIZES_MM) + len(MARGINS), 1)
    masks_NMM = torch.from_numpy(frames.masks_NMM)
    sizes_NGG, margins_NGG = (
        functional.max_pool2d(torch.from_numpy(labels).float(), cell).long()
        for labels in (frames.sizes_NMM, frames.margins_NMM)
    )
    telling = (sizes_NGG.flatten(1).amax(-1) != UNKNOWN).nonzero()[:, 0]

    def loss(rows: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model(_normalise(pixels, SAM_MEAN, SAM_STD))
        logits, target = outline(tokens)[:, 0], masks_NMM[rows].float()
        share = torch.sigmoid(logits)
        overlap = 2 * (share * target).sum() / (share.sum() + target.sum())
        bce = functional.binary_cross_entropy_with_logits(logits, target)
        sizes, margins = tell(tokens).split([len(SIZES_MM), len(MARGINS)], dim=1)
        told = _told(sizes, sizes_NGG[rows]) + _told(margins, margins_NGG[rows])
        hit, union = ((logits > 0) & (target > 0)).sum(), ((logits > 0) | (target > 0)).sum()
        return bce + 1 - overlap + told, hit / union.clamp(min=1)

    parameters = [*model.parameters(), *outline.parameters(), *tell.parameters()]
    optimise("sam", parameters, loss, _pictures(frames, 32, telling), steps)
    return model


def _told(logits_NCGG: Tensor, labels_NGG: Tensor) -> Tensor:
    """Return the mean cross-entropy where the label is known; zero where none is."""
    total = functional.cross_entropy(logits_NCGG, labels_NGG, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels_NGG != UNKNOWN).sum().clamp(min=1)


def _pictures(
    frames: Frames, size: int, telling_M: Tensor | None = None
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Return what draws rows of frames and their pixels; half of them of `telling_M`, if given."""
    pixels_NHW = torch.from_numpy(frames.pixels_NHW)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels_NHW), (size,), generator=generator)
        if telling_M is not None:
            half = torch.randint(len(telling_M), (size // 2,), generator=generator)
            rows[: size // 2] = telling_M[half]
        pixels = pixels_NHW[rows, None].float().expand(-1, 3, -1, -1) / 255
        gain = 1 + 0.1 * torch.randn(size, 1, 1, 1, generator=generator)
        return rows, (pixels * gain).clamp(0, 1)

    return draw


def _normalise(pixels_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels_NCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
