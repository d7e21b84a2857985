"""SAM's image encoder: the package's own attention beside ours, in float32 and bfloat16.

    python -m benchmarks.sam
    python -m benchmarks.sam --size l --device cuda
    python -m benchmarks.sam --quick   # a small encoder; prints its result and keeps nothing

Random weights in the published size, relative positions among them, at 1024 pixels. The two take
turns on the same pictures; the outputs must be the same but for rounding.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import Tensor, nn

from benchmarks.stand import spread, write_result
from ultra.model.sam_attention import fuse_attention

SIZES = {
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_attn_indexes": (2, 5, 8, 11)},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_attn_indexes": (5, 11, 17, 23)},
    "quick": {"embed_dim": 96, "depth": 2, "num_heads": 3, "global_attn_indexes": (1,)},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("b", "l"), default="b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    size, side, rounds = ("quick", 256, 2) if args.quick else (args.size, 1024, args.rounds)
    package = make_encoder(size, side).to(args.device)
    ours = copy.deepcopy(package)
    fuse_attention(ours)
    pixels = torch.randn(args.pictures, 3, side, side, device=args.device)
    result = {
        str(dtype).removeprefix("torch."): compare(
            package.to(dtype), ours.to(dtype), pixels.to(dtype), rounds
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    headline = {
        f"{name}_{key}": found[key]["median"] if key == "ratio" else found[key]
        for name, found in result.items()
        for key in ("ratio", "largest_difference")
    }
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    if args.quick:
        print(json.dumps({"benchmark": "sam", **headline}))
    else:
        name = f"sam-{size}-{args.device}"
        write_result(
            name, {"device": device, "threads": torch.get_num_threads(), **result}, headline
        )


def make_encoder(size: str, side: int) -> Any:
    """Return an encoder of the published size with random weights."""
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        img_size=side, patch_size=16, mlp_ratio=4, out_chans=256, qkv_bias=True, use_rel_pos=True,
        window_size=14, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), **SIZES[size],
    )  # fmt: skip
    for name, parameter in encoder.named_parameters():
        if "pos" in name:
            nn.init.normal_(parameter, std=0.2)
    return encoder.eval()


@torch.inference_mode()
def compare(package: Any, ours: Any, pixels: Tensor, rounds: int) -> dict[str, Any]:
    """Return seconds of both, how many times faster ours is, and how far the outputs differ."""
    seconds: dict[str, list[float]] = {"package": [], "ours": []}
    outputs: dict[str, Tensor] = {}
    for number in range(-1, rounds):  # the first one only warms them
        for way, encoder in (("package", package), ("ours", ours)):
            start = time.perf_counter()
            outputs[way] = encoder(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize()
            if number >= 0:
                seconds[way].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(seconds["package"], seconds["ours"], strict=True)]
    difference = (outputs["package"].float() - outputs["ours"].float()).abs().max()
    return {
        "seconds": {way: spread(found, 3) for way, found in seconds.items()},
        "ratio": spread(ratios, 2),
        "largest_difference": float(difference),
        "largest_output": float(outputs["package"].float().abs().max()),
    }


if __name__ == "__main__":
    main()
