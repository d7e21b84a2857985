"""Makes the tiny backbones that ultra ships: a CLIP, a SAM and a Chinese language model.

    python -m ultra.train.tiny_backbones --output ultra/presets/tiny

They learn from simulated exams of another seed than the presets use, so no shipped weight has seen
a patient of the demo. CLIP learns which words go with a frame; SAM outlines objects, lesions and
artefacts alike; the language model answers questions about facts it reads as mixtures of words,
where visual tokens will stand. It never sees an image.

Shapes: N frames, W words of captions, C H W pixels, B rows, T visual tokens, S text tokens,
V vocabulary, D width of the language model.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Callable
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
from ultra.data.collate import pad
from ultra.data.instructions import parse_report, write_conversations
from ultra.data.prompts import encode_conversation
from ultra.data.synthetic import (
    SIDE_WORDS,
    SITES,
    Truth,
    report_characters,
    simulate,
    simulated_exams,
)
from ultra.model.clip import CLIP_MEAN, CLIP_STD
from ultra.model.language import token_losses
from ultra.model.pictures import decode
from ultra.model.sam import SAM_MEAN, SAM_STD, build_sam_encoder
from ultra.model.splice import splice
from ultra.types import IGNORED, VISUAL, FrameGroup

SEED = 20_001
CLIP_SIZE, SAM_SIZE, MASK_SIZE, PATCH = 64, 128, 64, 16
NUM_VISUAL = (CLIP_SIZE // PATCH) ** 2
TEXTS = 48
"""Rows of text in a step."""
PADDING = -2
"""An id that is neither a token nor VISUAL."""
KINDS = ("cyst", "haemangioma", "nodule", "stone")
WORDS = (*SITES, "left", "right", "normal", *KINDS, "small", "medium", "large", "clear", "unclear")
"""What a caption is made of."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Simulated frames with what CLIP and SAM learn from, and the groups they belong to."""

    pixels_NHW: NDArray[np.uint8]
    masks_NHW: NDArray[np.uint8]
    captions_NW: NDArray[np.bool_]
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
    captions = np.array([np.isin(WORDS, _caption(exam.truth, v)) for v in valid])
    pixels = np.stack([np.array(decode(frame).convert("L")) for frame in exam.group.frames])
    return exam.group, pixels, masks.astype(np.uint8), captions


def _caption(truth: Truth, valid: bool) -> list[str]:
    """Return the words for what a frame shows; of a lesion only where it shows."""
    words = [truth.site, truth.side]
    if valid:
        words.append(truth.kind)
    if valid and truth.size_mm is not None:
        size = SITES[truth.site].sizes_mm.index(truth.size_mm)
        words += [("small", "medium", "large")[size], truth.margin or ""]
    return words


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
    exams = [Told.of(tokenizer, group) for group in groups]
    rows = [(row, exam) for exam in exams for row in exam.rows]
    rows.sort(key=lambda row: len(row[0][0]))  # neighbours of one length waste no padding
    rng = random.Random(SEED)
    embedding: Any = model.get_input_embeddings()

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        start = int(torch.randint(len(rows) - TEXTS + 1, (), generator=generator))
        picked = rows[start : start + TEXTS]
        words = [_mix(exam, rng.choice(exams), rng, len(tokenizer)) for _, exam in picked]
        ids, _ = pad([row[0] for row, _ in picked], PADDING)
        labels, _ = pad([row[1] for row, _ in picked], IGNORED)
        return torch.stack(words), torch.from_numpy(np.stack([ids, labels]))

    def loss(words_BTV: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        ids_BS, labels_BS = batch
        visual_BTD = words_BTV @ embedding.weight
        # As much noise as there is signal, or less: a projector begins with nothing else.
        noise = embedding.weight.std().detach() * torch.rand(len(ids_BS), 1, 1)
        visual_BTD = visual_BTD + noise * torch.randn(visual_BTD.shape)
        mask_BS = ids_BS != PADDING
        embeds_BSD = splice(embedding, ids_BS.masked_fill(~mask_BS, 0), visual_BTD.flatten(0, 1))
        logits_BSV = model(inputs_embeds=embeds_BSD, attention_mask=mask_BS.long()).logits
        answers = labels_BS[:, 1:] != IGNORED
        right = logits_BSV[:, :-1].argmax(-1) == labels_BS[:, 1:]
        losses_BS = token_losses(logits_BSV, labels_BS)[:, 1:]
        return losses_BS[answers].mean(), right[answers].float().mean()

    _optimise("language", list(model.parameters()), loss, draw, steps)
    return model.half(), tokenizer


@dataclass(frozen=True, slots=True)
class Told:
    """An exam as the language model learns from it.

    Attributes:
        rows: ids and labels of its conversations, and of its findings behind a frame alone.
        place: the ids of the words that every frame shows.
        lesion: the ids of the words that only a valid frame shows.
    """

    rows: list[tuple[list[int], list[int]]]
    place: list[list[int]]
    lesion: list[list[int]]

    @classmethod
    def of(cls, tokenizer: Any, group: FrameGroup) -> Told:
        """Return what there is to learn from a group's report."""

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            return ids

        rows = [
            encode_conversation(tokenizer, "plain", conversation.turns, NUM_VISUAL)
            for conversation in write_conversations(group, SEED)
        ]
        findings = encode(group.findings)
        before = [tokenizer.bos_token_id, *[VISUAL] * NUM_VISUAL]
        # Twice: what the likelihood teacher asks is learnt as well as any question.
        rows += 2 * [(before + findings, [IGNORED] * len(before) + findings)]
        report = parse_report(group.site, group.findings, group.diagnosis)
        size = f"{report.size_mm:g}mm" if report.size_mm else None
        facts = [report.kind, report.echogenicity, size, report.margin]
        side = next(word for word in SIDE_WORDS.values() if word in group.findings)
        return cls(
            rows,
            [encode(group.site), encode(side)],
            [encode("正常")] if report.normal else [encode(fact) for fact in facts if fact],
        )


def _mix(exam: Told, other: Told, rng: random.Random, vocabulary: int) -> Tensor:
    """Return words_TV for an exam: its facts, in most rows diluted with another exam's.

    The share of the exam's own facts has the density 2x, so they are right as often as they weigh:
    the model learns to answer by weight, and a projector finds a slope from wherever it starts.
    """
    share = 1.0 if rng.random() < 0.3 else rng.random() ** 0.5
    return share * _spread(exam, rng, vocabulary) + (1 - share) * _spread(other, rng, vocabulary)


def _spread(exam: Told, rng: random.Random, vocabulary: int) -> Tensor:
    """Return words_TV of an exam's facts over some of the visual tokens.

    Now and then the lesion is left out, as in a frame that does not show it.
    """
    words_TV = torch.zeros(NUM_VISUAL, vocabulary)
    scale = rng.uniform(0.5, 1.5)
    hidden = rng.random() < 0.15
    often = rng.choice([1, 2, 4, 16]) / 16
    for facts, chance in ((exam.place, rng.uniform(0.3, 1)), (exam.lesion, often)):
        if facts is exam.lesion and hidden:
            continue
        tokens = [t for t in range(NUM_VISUAL) if rng.random() < chance]
        for token in tokens or [rng.randrange(NUM_VISUAL)]:
            for fact in facts:
                words_TV[token, fact] += scale / len(fact)
    return words_TV


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


def _pictures(frames: Frames, size: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    pixels_NHW = torch.from_numpy(frames.pixels_NHW)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(pixels_NHW), (size,), generator=generator)
        pixels = pixels_NHW[rows, None].float().expand(-1, 3, -1, -1) / 255
        gain = 1 + 0.1 * torch.randn(size, 1, 1, 1, generator=generator)
        return rows, (pixels * gain).clamp(0, 1)

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
    parser.add_argument("--patients", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    make_backbones(args.output, args.patients, args.steps)


if __name__ == "__main__":
    main()
