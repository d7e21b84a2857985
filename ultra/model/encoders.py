"""The frozen vision encoders: frames in, features on one grid out.

Shapes: N frames, C H W pixels, T tokens of the grid (row-major), F channels of an encoder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ultra import storage
from ultra.config import ConfigError, EncoderConfig, VisionConfig
from ultra.model.pretrained import first_line, load_pretrained

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VisionEncoder(nn.Module):
    """A frozen encoder that owns its pixels: size, normalisation and weights.

    Attributes:
        image_size: side of the square input in pixels.
        digest: sha256 of the weights.
    """

    image_size: int
    digest: str
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Return normalised (C, H, W) pixels.

        The longer side fills the input and the rest is padded below and to the right, for every
        encoder alike, so that a token of one stands for the same place as that of another.
        """
        scale = self.image_size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(self.mean.device) / 255
        pixels = (pixels - self.mean) / self.std
        return functional.pad(pixels, (0, self.image_size - width, 0, self.image_size - height))


class ClipEncoder(VisionEncoder):
    """The patch tokens of a CLIP vision transformer, read below its last layer."""

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__(CLIP_MEAN, CLIP_STD)
        from transformers import CLIPVisionModel

        folder = storage.fetch(config.weights)
        self.model: Any = load_pretrained(CLIPVisionModel, folder, torch.float32)
        self.digest = digest_weights(folder)
        settings: Any = self.model.config
        self.image_size = settings.image_size
        _check_grid(config, grid, settings.image_size // settings.patch_size)
        transformer = getattr(self.model, "vision_model", self.model)
        depth = len(transformer.encoder.layers)
        kept = config.layer if config.layer >= 0 else depth + 1 + config.layer
        if not 0 < kept <= depth:
            raise ConfigError(f"encoder clip: layer {config.layer} of a model with {depth} layers")
        # What lies above the layer that is read is never computed.
        transformer.encoder.layers = transformer.encoder.layers[:kept]
        _check_width(config, settings.hidden_size)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return (N, T, F) patch tokens, the class token left out."""
        tokens: Tensor = self.model(pixel_values=pixels_NCHW).last_hidden_state
        return tokens[:, 1:]


class SamEncoder(VisionEncoder):
    """SAM's image encoder, its finer grid brought to the shared one."""

    def __init__(self, config: EncoderConfig, grid: int) -> None:
        super().__init__(SAM_MEAN, SAM_STD)
        path = storage.fetch(config.weights)
        try:
            self.model: Any = build_sam_encoder(_read_sam_weights(path))
        except ValueError as error:
            raise ConfigError(f"encoder sam: {config.weights}: {error}") from None
        self.digest = digest_weights(path)
        self.image_size = self.model.img_size
        self.pool = config.pool
        own_grid = self.model.pos_embed.shape[1]
        if own_grid % grid:
            raise ConfigError(f"encoder sam: its grid of {own_grid} is no multiple of {grid}")
        self.factor = own_grid // grid
        channels = self.model.neck[0].out_channels
        width = channels * self.factor**2 if config.pool == "unshuffle" else channels
        _check_width(config, width)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Return (N, T, F) tokens: `factor` x `factor` cells become one."""
        cells_NCHW: Tensor = self.model(pixels_NCHW)
        if self.pool == "unshuffle":
            cells_NCHW = functional.pixel_unshuffle(cells_NCHW, self.factor)
        else:
            cells_NCHW = functional.avg_pool2d(cells_NCHW, self.factor)
        return cells_NCHW.flatten(2).transpose(1, 2)


ENCODERS: Mapping[str, Callable[[EncoderConfig, int], VisionEncoder]] = {
    "clip": ClipEncoder,
    "sam": SamEncoder,
}


class FrozenEncoders:
    """All encoders of a model; they never train and stay outside the training engine."""

    def __init__(self, config: VisionConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.encoders = {
            e.name: ENCODERS[e.name](e, config.grid).eval().requires_grad_(False).to(self.device)
            for e in config.encoders
        }

    @torch.inference_mode()
    def encode(self, frames: Sequence[bytes], chunk: int = 32) -> dict[str, Tensor]:
        """Return encoder name -> (N, T, F) features of encoded frames, in `config.dtype`.

        Args:
            frames: JPEG or PNG bytes.
            chunk: frames that go through an encoder at a time.
        """
        parts: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        dtype = getattr(torch, self.config.dtype)
        autocast = torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")
        for start in range(0, len(frames), chunk):
            images = [decode(frame) for frame in frames[start : start + chunk]]
            for name, encoder in self.encoders.items():
                pixels = torch.stack([encoder.preprocess(image) for image in images])
                with autocast:
                    parts[name].append(encoder(pixels).to(dtype))
        return {name: torch.cat(tensors) for name, tensors in parts.items()}

    def __call__(self, frames: Sequence[bytes]) -> dict[str, NDArray[np.floating[Any]]]:
        """Return what `encode` does, as numpy: the form the feature cache keeps."""
        return {name: tensor.cpu().numpy() for name, tensor in self.encode(frames).items()}


def cache_key(config: VisionConfig) -> str:
    """Return what features depend on beside the frame, as a name for a folder.

    Encoders, their weights (which fix the input size), pooling or layer, grid and type.
    """
    parts = [
        f"{e.name} {digest_weights(storage.fetch(e.weights))} {config.grid} "
        f"{e.layer if e.name == 'clip' else e.pool} {config.dtype}"
        for e in config.encoders
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def decode(frame: bytes) -> Image.Image:
    """Return a frame as an RGB image."""
    with Image.open(io.BytesIO(frame)) as image:
        return image.convert("RGB")


def build_sam_encoder(state: Mapping[str, Tensor]) -> Any:
    """Return segment-anything's image encoder of the size the weights have.

    Every argument of the encoder is read off the shapes, so any SAM loads, not only B, L and H.

    Raises:
        ValueError: when the tensors are not those of a SAM image encoder.
    """
    from segment_anything.modeling import ImageEncoderViT

    try:
        patch = state["patch_embed.proj.weight"]
        depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
        grid = state["pos_embed"].shape[1]
        spans = [(state[f"blocks.{i}.attn.rel_pos_h"].shape[0] + 1) // 2 for i in range(depth)]
        head_dim = state["blocks.0.attn.rel_pos_h"].shape[1]
        mlp_width = state["blocks.0.mlp.lin1.weight"].shape[0]
        out_chans = state["neck.0.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"not the weights of a SAM image encoder: no {error}") from None
    width, channels, patch_size = patch.shape[0], patch.shape[1], patch.shape[2]
    encoder = ImageEncoderViT(
        img_size=grid * patch_size,
        patch_size=patch_size,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=width // head_dim,
        mlp_ratio=mlp_width / width,
        out_chans=out_chans,
        norm_layer=lambda size: nn.LayerNorm(size, eps=1e-6),
        use_rel_pos=True,
        window_size=next((span for span in spans if span != grid), 0),
        global_attn_indexes=tuple(i for i, span in enumerate(spans) if span == grid),
    )
    try:
        encoder.load_state_dict(dict(state))
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"not the weights of a SAM image encoder: {detail}") from None
    return encoder


def digest_weights(path: Path) -> str:
    """Return the sha256 of a weights file, or of all weights and the config in a folder."""
    suffixes = {".safetensors", ".pth", ".gguf", ".bin"}
    files = [path]
    if path.is_dir():
        files = [
            f for f in sorted(path.iterdir()) if f.suffix in suffixes or f.name == "config.json"
        ]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _read_sam_weights(path: Path) -> dict[str, Tensor]:
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken pickle raises whatever it leads to
        raise ValueError(f"no weights to read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"no weights by name, but a {type(state).__name__}")
    prefix = "image_encoder."
    inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return inner or state


def _check_grid(config: EncoderConfig, grid: int, own_grid: int) -> None:
    if own_grid != grid:
        raise ConfigError(
            f"encoder {config.name}: its weights give a grid of {own_grid}, vision.grid is {grid}"
        )


def _check_width(config: EncoderConfig, width: int) -> None:
    if width != config.width:
        raise ConfigError(
            f"encoder {config.name}: its weights give {width} channels, width is {config.width}"
        )
