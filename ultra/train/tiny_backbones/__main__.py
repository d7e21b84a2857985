"""Makes the tiny backbones that ultra ships: a CLIP, a SAM and a Chinese language model.

    python -m ultra.train.tiny_backbones --output ultra/presets/tiny

They learn from simulated exams of another seed than the presets use, so no shipped weight has seen
a patient of the demo. CLIP learns which organ, side and lesion a frame shows; SAM outlines objects,
lesions and artefacts alike, and tells how large they are and how sharp their edges, which CLIP's
small frames hardly show; the language model answers questions about facts it reads as mixtures of
words, where visual tokens will stand. It never sees an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from ultra.train.tiny_backbones.language import train_language
from ultra.train.tiny_backbones.vision import simulate_frames, train_clip, train_sam


def make_backbones(output: Path, num_patients: int, steps: int) -> None:
    """Simulate, train the three and write clip/, sam.safetensors and language/ into a folder."""
    frames = simulate_frames(num_patients)
    print(f"{len(frames.pixels_NHW)} frames of {len(frames.groups)} exams")
    train_clip(frames, steps).save_pretrained(output / "clip")
    sam = train_sam(frames, 2 * steps)  # edges come late
    save_file({n: t.half() for n, t in sam.state_dict().items()}, output / "sam.safetensors")
    model, tokenizer = train_language(frames.groups, steps)
    model.save_pretrained(output / "language")
    tokenizer.save_pretrained(output / "language")


def main() -> None:
    """Read the command line and make the backbones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("ultra/presets/tiny"))
    parser.add_argument("--patients", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    make_backbones(args.output, args.patients, args.steps)


if __name__ == "__main__":
    main()
