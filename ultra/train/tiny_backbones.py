"""Makes the tiny backbones that ultra ships: a CLIP, a SAM and a Chinese language model.

    python -m ultra.train.tiny_backbones --output ultra/presets/tiny

They learn from simulated exams of another seed than the presets use, so no shipped weight has seen
a patient of the demo. CLIP learns which site, side and finding a frame shows; SAM outlines objects,
lesions and artefacts alike; the language model answers questions about findings it reads as text.

Shapes: N frames, C H W pixels, T tokens, S text tokens.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ultra.config import SimulatorConfig
from ultra.data.instructions import parse_report, write_conversations
from ultra.data.prompts import encode_conversation
from ultra.data.synthetic import SITES, Truth, report_characters, simulate, simulated_exams
from ultra.model.clip import CLIP_MEAN, CLIP_STD
from ultra.model.pictures import decode
from ultra.model.sam import SAM_MEAN, SAM_STD, build_sam_encoder
from ultra.types import Conversation, FrameGroup, Turn

SEED = 20_001
CLIP_SIZE, SAM_SIZE, MASK_SIZE, PATCH = 64, 128, 64, 16
KINDS = ("cyst", "haemangioma", "nodule", "stone")
NUM_SIZES = 3
NUM_FINDINGS = 2 + len(KINDS) * NUM_SIZES


@dataclass(frozen=True, slots=True)
class Frames:
    """Simulated frames with what CLIP and SAM learn from, and the groups they belong to."""

    pixels_NHW: NDArray[np.uint8]
    masks_NHW: NDArray[np.uint8]
    captions_N: NDArray[np.int64]
    groups: list[FrameGroup]


def make_backbones(output: Path, num_patients: int, steps: int) -> None:
    """Simulate, train the three and write clip/, sam.safetensors and language/ into a folder."""
    frames = simulate_frames(num_patients)
    print(f"{len(frames.pixels_NHW)} frames of {len(frames.groups)} exams")
    train_clip(frames, steps).save_pretrained(output / "clip")
    state = {name: tensor.half() for name, tensor in train_sam(frames, steps).state_dict().items()}
    save_file(state, output / "sam.safetensors")
    model, tokenizer = train_language(frames.groups, steps)
    model.save_pretrained(output / "language")
    tokenizer.save_pretrained(output / "language")


def simulate_frames(num_patients: int) -> Frames:
    """Return the frames of simulated patients, made by two processes."""
    config = SimulatorConfig(num_patients=num_patients, frame_size=SAM_SIZE)
    pairs = list(simulated_exams(config, SEED))
    with get_context("spawn").Pool(2) as pool:
        parts = pool.map(functools.partial(_simulate_one, config), pairs, chunksize=16)
    groups, pixels, masks, captions = zip(*parts, strict=True)
    return Frames(
        np.concatenate(pixels), np.concatenate(masks), np.concatenate(captions), list(groups)
    )


def _simulate_one(config: SimulatorConfig, pair: tuple[int, int]) -> tuple[Any, ...]:
    exam = simulate(config, SEED, *pair)
    objects = exam.lesion_masks_KHW | exam.artefact_masks_KHW
    step = SAM_SIZE // MASK_SIZE
    masks = objects.reshape(len(objects), MASK_SIZE, step, MASK_SIZE, step).mean((2, 4)) > 0.5
    valid = exam.group.valid or ()
    place = list(SITES).index(exam.truth.site) * 2 + (exam.truth.side == "right")
    captions = np.array([place * NUM_FINDINGS + _finding(exam.truth, v) for v in valid])
    pixels = np.stack([np.array(decode(frame).convert("L")) for frame in exam.group.frames])
    return exam.group, pixels, masks.astype(np.uint8), captions


def _finding(truth: Truth, valid: bool) -> int:
    """Return what a frame shows, by number: nothing, health, or a lesion of some kind and size."""
    if truth.size_mm is None or not valid:
        return int(valid)
    size = SITES[truth.site].sizes_mm.index(truth.size_mm)
    return 2 + KINDS.index(truth.kind) * NUM_SIZES + size


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
    captions = nn.Parameter(torch.randn(len(SITES) * 2 * NUM_FINDINGS, 96) * 0.1)
    project = nn.Linear(2 * 96, 96)
    labels_N = torch.from_numpy(frames.captions_N)

    def loss(rows: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        small = functional.interpolate(pixels, size=CLIP_SIZE, mode="area")
        # The patch tokens are what ultra reads, below the last layer, so they carry the meaning.
        normalised = _normalise(small, CLIP_MEAN, CLIP_STD)
        output = model(pixel_values=normalised, output_hidden_states=True)
        hidden = output.hidden_states[-2][:, 1:]
        pooled = project(torch.cat([hidden.mean(1), hidden.amax(1)], -1))
        match = functional.normalize(pooled, dim=-1) @ functional.normalize(captions, dim=-1).T
        target = labels_N[rows]
        right = (match.argmax(-1) == target).float().mean()
        return functional.cross_entropy(16 * match, target), right

    parameters = [*model.parameters(), captions, *project.parameters()]
    _optimise("clip", parameters, loss, _pictures(frames, 96), steps)
    return model.half()


def train_sam(frames: Frames, steps: int) -> Any:
    """Return a SAM image encoder trained to outline every object."""
    from segment_anything.modeling import ImageEncoderViT

    torch.manual_seed(SEED)
    model = ImageEncoderViT(
        img_size=SAM_SIZE, patch_size=PATCH, embed_dim=96, depth=4, num_heads=4, out_chans=64,
        use_rel_pos=True, window_size=4, global_attn_indexes=(1, 3),
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    build_sam_encoder(model.state_dict())  # what is shipped must load as any SAM does
    outline = nn.Sequential(nn.Conv2d(64, 64, 1), nn.PixelShuffle(MASK_SIZE * PATCH // SAM_SIZE))
    masks_NHW = torch.from_numpy(frames.masks_NHW)

    def loss(rows: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = outline(model(_normalise(pixels, SAM_MEAN, SAM_STD)))[:, 0]
        target = masks_NHW[rows].float()
        share = torch.sigmoid(logits)
        overlap = 2 * (share * target).sum() / (share.sum() + target.sum())
        bce = functional.binary_cross_entropy_with_logits(logits, target)
        hit, union = ((logits > 0) & (target > 0)).sum(), ((logits > 0) | (target > 0)).sum()
        return bce + 1 - overlap, hit / union.clamp(min=1)

    parameters = [*model.parameters(), *outline.parameters()]
    _optimise("sam", parameters, loss, _pictures(frames, 32), steps)
    return model


def train_language(groups: list[FrameGroup], steps: int) -> tuple[Any, Any]:
    """Return a character-level Llama and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    tokenizer = build_tokenizer(report_characters())
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    rng = random.Random(SEED)
    rows = [row for group in groups for row in _text_rows(tokenizer, group, rng)]

    def loss(_rows: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        ids, labels = batch
        logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits[:, :-1]
        return _answer_loss(logits, ids[:, 1:], labels[:, 1:])

    _optimise("language", list(model.parameters()), loss, _texts(rows, 48), 2 * steps)
    return model.half(), tokenizer


def build_tokenizer(characters: str) -> Any:
    """Return a tokenizer with one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ascii_characters = "".join(chr(code) for code in range(32, 127))
    known = sorted(set(characters + ascii_characters + "\n"))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _text_rows(
    tokenizer: Any, group: FrameGroup, rng: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield conversations with words, mostly, where the visual tokens will stand."""
    for conversation in write_conversations(group, SEED):
        told = _tell(conversation, group, rng) if rng.random() < 0.9 else conversation
        yield encode_conversation(tokenizer, "plain", told.turns, 0)


def _tell(conversation: Conversation, group: FrameGroup, rng: random.Random) -> Conversation:
    """Return the conversation after the findings, or after their facts in any order.

    Facts without order are the more like visual tokens: the model learns to look them up and to
    write a report from them, not only to copy.
    """
    words = group.findings
    if rng.random() < 0.7:
        report = parse_report(group.site, group.findings, group.diagnosis)
        size = f"{report.size_mm:g}mm" if report.size_mm else None
        facts = [group.site, report.side, report.kind, report.echogenicity, size, report.margin]
        facts += ["正常"] if report.normal else []
        known = [fact for fact in facts if fact]
        rng.shuffle(known)
        words = rng.choice(["", "，", "。"]).join(known)
    first, *rest = conversation.turns
    told = Turn(first.role, words + first.content)
    return Conversation(conversation.stage, conversation.task, (told, *rest))


def _answer_loss(logits: Tensor, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    losses = functional.cross_entropy(logits.transpose(1, 2), ids.clamp(min=0), reduction="none")
    answer = labels >= 0
    text = (ids >= 0) & ~answer
    loss = losses[answer].mean() + 0.1 * losses[text].mean()
    right = (logits.argmax(-1) == ids)[answer].float().mean()
    return loss, right


def _pictures(frames: Frames, size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    pixels_NHW = torch.from_numpy(frames.pixels_NHW)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels_NHW), (size,), generator=generator)
        pixels = pixels_NHW[rows, None].float().expand(-1, 3, -1, -1) / 255
        gain = 1 + 0.1 * torch.randn(size, 1, 1, 1, generator=generator)
        return rows, (pixels * gain).clamp(0, 1)

    return draw


def _texts(
    rows: list[tuple[list[int], list[int]]], size: int
) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    rows = sorted(rows, key=lambda row: len(row[0]))  # neighbours of one length waste no padding

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = int(torch.randint(len(rows) - size + 1, (), generator=generator))
        chosen = torch.arange(start, start + size)
        picked = rows[start : start + size]
        length = max(len(ids) for ids, _ in picked)
        batch = torch.full((2, size, length), -1)
        for row, (ids, labels) in enumerate(picked):
            batch[0, row, : len(ids)] = torch.tensor(ids)
            batch[1, row, : len(ids)] = torch.tensor(labels)
        return chosen, batch

    return draw


def _normalise(pixels_NCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels_NCHW - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _optimise(
    name: str,
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
) -> None:
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


def main() -> None:
    """Read the command line and make the backbones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("ultra/presets/tiny"))
    parser.add_argument("--patients", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    make_backbones(args.output, args.patients, args.steps)


if __name__ == "__main__":
    main()
