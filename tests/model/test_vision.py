"""Eq. 2 against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf

from ultra.config import FusionConfig, VisionConfig
from ultra.model.vision import Fusion

B, K, T, D = 2, 3, 4, 24
CLIP = {"name": "clip", "weights": "-", "width": 20}
SAM = {"name": "sam", "weights": "-", "width": 36}


def make_fusion(encoders, projector="linear", alpha=0.3) -> Fusion:
    torch.manual_seed(0)
    vision = VisionConfig.model_validate({"grid": 2, "encoders": encoders})
    fusion = Fusion(vision, FusionConfig(projector=projector, alpha=alpha), D)
    for parameter in fusion.projectors.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return fusion


def make_features(**widths: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    # Far from mean 0 and variance 1, so that the layer norm shows.
    return {
        name: torch.from_numpy(rng.normal(3, 5, (B, K, T, width))).float()
        for name, width in widths.items()
    }


def affine(layer: torch.nn.Linear, x):
    return x @ layer.weight.detach().numpy().T.astype(float) + layer.bias.detach().numpy()


def test_two_encoders_are_normed_projected_and_weighed(normalise) -> None:
    fusion = make_fusion([CLIP, SAM])
    features = make_features(clip=20, sam=36)
    first, second = (
        affine(fusion.projectors[name], normalise(features[name])) for name in ("clip", "sam")
    )
    visual_BKTD = fusion(features)
    assert visual_BKTD.shape == (B, K, T, D)
    np.testing.assert_allclose(
        visual_BKTD.detach(), 0.3 * first + 0.7 * second, rtol=1e-4, atol=1e-5
    )


def test_alpha_weighs_the_encoder_named_first(normalise) -> None:
    fusion = make_fusion([SAM, CLIP], alpha=1.0)
    features = make_features(clip=20, sam=36)
    expected = affine(fusion.projectors["sam"], normalise(features["sam"]))
    np.testing.assert_allclose(fusion(features).detach(), expected, rtol=1e-4, atol=1e-5)


def test_one_encoder_has_no_alpha(normalise) -> None:
    fusion = make_fusion([SAM])
    features = make_features(sam=36)
    expected = affine(fusion.projectors["sam"], normalise(features["sam"]))
    np.testing.assert_allclose(fusion(features).detach(), expected, rtol=1e-4, atol=1e-5)
    assert fusion.alpha is None
    assert not any("alpha" in name for name in fusion.state_dict())


def test_the_mlp_projector_is_two_layers_with_gelu(normalise) -> None:
    fusion = make_fusion([CLIP], projector="mlp")
    features = make_features(clip=20)
    hidden, _, last = fusion.projectors["clip"]
    z = affine(hidden, normalise(features["clip"]))
    expected = affine(last, z * 0.5 * (1 + erf(z / np.sqrt(2))))
    np.testing.assert_allclose(fusion(features).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_alpha_is_what_the_encoders_differ_in(normalise) -> None:
    fusion = make_fusion([CLIP, SAM])
    features = make_features(clip=20, sam=36)
    upstream = np.random.default_rng(1).normal(size=(B, K, T, D))
    (fusion(features) * torch.from_numpy(upstream)).sum().backward()
    first, second = (
        affine(fusion.projectors[name], normalise(features[name])) for name in ("clip", "sam")
    )
    assert fusion.alpha.shape == (1,)
    expected = (upstream * (first - second)).sum()
    np.testing.assert_allclose(fusion.alpha.grad, [expected], rtol=1e-4)


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_visual_tokens_start_with_the_size_of_embeddings(projector) -> None:
    torch.manual_seed(0)
    vision = VisionConfig.model_validate(
        {"grid": 2, "encoders": [{"name": "clip", "weights": "-", "width": 400}]}
    )
    fusion = Fusion(vision, FusionConfig(projector=projector), 300, embedding_std=0.037)
    visual_TD = fusion({"clip": 100 + 50 * torch.randn(500, 400)}).detach()
    assert float(visual_TD.std()) == pytest.approx(0.037, rel=0.06)
    assert float(visual_TD.mean()) == pytest.approx(0, abs=0.002)


def test_half_precision_features_are_normed_in_the_projectors_precision() -> None:
    fusion = make_fusion([CLIP])
    features = {"clip": make_features(clip=20)["clip"].half()}
    visual = fusion(features)
    assert visual.dtype == torch.float32
    assert torch.equal(visual, fusion({"clip": features["clip"].float()}))
