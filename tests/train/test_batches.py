"""Whatever the strategy, cached features and pixels train alike; other features are never read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.exam_tables import make_exam, write_exams
from tests.model.encoder_weights import png
from ultra.config import ConfigError, DataConfig, ModelConfig
from ultra.data import schema, stream
from ultra.data.collate import Collator, Sample
from ultra.data.features import features_uris, read_features, unpack, write_features
from ultra.model.encoders import FrozenEncoders, cache_key
from ultra.model.language import LanguageBranch
from ultra.model.llava_ultra import LlavaUltra
from ultra.model.strategies import STRATEGIES, num_visual_tokens
from ultra.train.batches import to_inputs

COUNTS, T = (3, 1, 6), 4


def make_exams():
    rng = np.random.default_rng(3)
    return [
        make_exam(i, frames=tuple(png(rng.integers(0, 256, (19, 11 + k, 3))) for k in range(count)))
        for i, count in enumerate(COUNTS)
    ]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_features_and_pixels_give_the_same_loss(random_config, tmp_path, strategy) -> None:
    raw = random_config.model.model_dump()
    raw["selection"] = {"strategy": strategy, "gradient": "straight_through"}
    config = ModelConfig.model_validate(raw)
    exams, encoders = make_exams(), FrozenEncoders(config)
    (part,) = write_exams(tmp_path / "exams", [exams], per_row_group=99)
    (target,) = features_uris(part, str(tmp_path / cache_key(config)))
    assert write_features(part, 0, target, encoders).frames == sum(COUNTS)
    wanted = [(i, schema.content_digest(exam.frames)) for i, exam in enumerate(exams)]
    cached = [unpack(row, T, "float16") for row in read_features(target, wanted)]
    pictures = (1, 1, 1) if strategy == "composite" else COUNTS
    assert [len(features["clip"]) for features in cached] == list(pictures)

    torch.manual_seed(0)
    model = LlavaUltra(config, LanguageBranch(config.language)).train()
    torch.nn.init.normal_(model.scorer.weight)
    collator = Collator(
        model.language.tokenizer,
        "plain",
        partial(num_visual_tokens, config),
        config.language.max_length,
        model.strategy.num_pictures,
    )
    losses, inputs = [], []
    for features, given in (([None] * 3, encoders), (cached, None)):
        samples = [
            Sample(exam, exam.conversations[:1], found)
            for exam, found in zip(exams, features, strict=True)
        ]
        inputs.append(to_inputs(collator(samples), given, torch.device("cpu")))
        torch.manual_seed(5)  # for `random`
        losses.append(float(model(**inputs[-1])["loss"].detach()))
    pixels, stored = inputs
    assert pixels["frame_mask_BK"].sum(-1).tolist() == list(pictures)
    for name, expected in stored["features"].items():
        torch.testing.assert_close(pixels["features"][name], expected, rtol=1e-2, atol=2e-3)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def swap_weights(model: dict[str, Any], folder: Path) -> None:
    """Other SAM weights at the same address."""
    tensors = torch.load(folder / "sam.pth")
    name = "image_encoder.pos_embed"
    torch.save({**tensors, name: tensors[name] + 1}, folder / "sam.pth")


def resize_input(model: dict[str, Any], folder: Path) -> None:
    """Another input size of CLIP at the same address."""
    settings = json.loads((folder / "clip" / "config.json").read_text())
    (folder / "clip" / "config.json").write_text(json.dumps({**settings, "image_size": 24}))


CHANGES: dict[str, Callable[[dict[str, Any], Path], object]] = {
    "fewer encoders": lambda model, folder: model["vision"]["encoders"].pop(),
    "other order": lambda model, folder: model["vision"]["encoders"].reverse(),
    "grid": lambda model, folder: model["vision"].update(grid=4),
    "type": lambda model, folder: model["vision"].update(dtype="float32"),
    "pooling": lambda model, folder: model["vision"]["encoders"][1].update(pool="avgpool"),
    "layer": lambda model, folder: model["vision"]["encoders"][0].update(layer=-1),
    "composite": lambda model, folder: model["selection"].update(strategy="composite"),
    "weights": swap_weights,
    "input size": resize_input,
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_of_what_has_changed_are_not_read(
    random_config, random_backbones, tmp_path, change
) -> None:
    folder = tmp_path / "backbones"
    shutil.copytree(random_backbones, folder)
    tree = random_config.model.model_dump(mode="json")
    tree = json.loads(json.dumps(tree).replace(str(random_backbones), str(folder)))
    (part,) = write_exams(tmp_path / "exams", [make_exams()], per_row_group=99)
    data = DataConfig(exams_uri=str(tmp_path / "exams"))

    def cache() -> str:
        return str(tmp_path / cache_key(ModelConfig.model_validate(tree)))

    encoders = FrozenEncoders(ModelConfig.model_validate(tree))
    write_features(part, 0, features_uris(part, cache())[0], encoders)
    assert stream.open_source(data, cache(), "require").features
    CHANGES[change](tree, folder)
    assert not stream.open_source(data, cache(), "auto").features
    with pytest.raises(ConfigError, match="1 of 1 row groups have no features"):
        stream.open_source(data, cache(), "require")
