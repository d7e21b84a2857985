"""Whatever the strategy, cached features and pixels train alike."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tests.data.exam_tables import make_exam, write_exams
from tests.model.encoder_weights import png
from ultra.config import ModelConfig
from ultra.data import schema
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
            Sample(exam, exam.conversations[0], found)
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
