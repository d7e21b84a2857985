"""Eq. 4 against the language model's own layers, run one frame at a time."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from ultra.model.teacher import AttentionTeacher, merged_state, score_likelihood

NUM_HEADS, NUM_KEY_HEADS, HEAD_WIDTH = 4, 2, 6


def make_teacher(model) -> AttentionTeacher:
    teacher = AttentionTeacher(model.config, model.language)
    teacher.copy_from(model.fusion, model.language)
    return teacher.eval()


def score(teacher, inputs) -> torch.Tensor:
    names = ("features", "frame_mask_BK", "findings_ids_BS", "findings_mask_BS")
    return teacher(**{name: inputs[name] for name in names})


@torch.no_grad()
def attention_by_hand(model, inputs, num_layers: int, has_bos: bool = True) -> np.ndarray:
    """The scores frame by frame, from a Llama into which PEFT itself merged LoRA."""
    llama = copy.deepcopy(model.language.model).merge_and_unload()
    layer = llama.model.layers[num_layers - 1]

    def read(embeds_SD: torch.Tensor) -> torch.Tensor:
        outputs = llama.model(inputs_embeds=embeds_SD[None], output_hidden_states=True)
        return layer.input_layernorm(outputs.hidden_states[num_layers - 1])[0]

    embed = llama.get_input_embeddings()
    visual_BKTD = model.fusion(inputs["features"])
    mask_BK = inputs["frame_mask_BK"].numpy()
    scores = np.zeros(mask_BK.shape)
    for group, frame in zip(*mask_BK.nonzero(), strict=True):
        ids = inputs["findings_ids_BS"][group][inputs["findings_mask_BS"][group]]
        image = visual_BKTD[group, frame]
        if has_bos:
            image = torch.cat([embed.weight[1:2], image])
        first = 1 if has_bos else 0
        queries = layer.self_attn.q_proj(read(embed(ids))).numpy()[first:]
        keys = layer.self_attn.k_proj(read(image)).numpy()[first:]
        best = []
        for head in range(NUM_HEADS):
            key_head = head // (NUM_HEADS // NUM_KEY_HEADS)
            for query in queries[:, head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH]:
                own = keys[:, key_head * HEAD_WIDTH : (key_head + 1) * HEAD_WIDTH]
                best.append(max(float(query @ key) for key in own) / HEAD_WIDTH**0.5)
        scores[group, frame] = np.mean(best)
    return scores


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_attention_score_is_eq_4(make_model, make_inputs, num_layers) -> None:
    model = make_model(selection={"teacher_layers": num_layers})
    inputs = make_inputs()
    scores = score(make_teacher(model), inputs)
    expected = attention_by_hand(model, inputs, num_layers)
    assert np.ptp(expected[0]) > 0.01  # frames do differ
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    assert scores[1, 2] == 0


def test_a_tokenizer_without_a_first_token(make_model, make_inputs) -> None:
    model, inputs = make_model(), make_inputs()
    teacher = make_teacher(model)
    teacher.bos_token_id = None
    expected = attention_by_hand(model, inputs, 2, has_bos=False)
    np.testing.assert_allclose(score(teacher, inputs), expected, rtol=1e-4, atol=1e-6)


def test_padding_has_no_influence(make_model, make_inputs, take_one) -> None:
    model, inputs = make_model(), make_inputs()
    teacher = make_teacher(model)
    scores = score(teacher, inputs)
    inputs["features"]["clip"][1, 2] = 1e4
    inputs["findings_ids_BS"][~inputs["findings_mask_BS"]] = 77
    torch.testing.assert_close(score(teacher, inputs), scores)
    for row, count in ((0, 3), (1, 2)):
        alone = score(teacher, take_one(inputs, row))
        torch.testing.assert_close(alone[0], scores[row, :count])


def test_an_order_of_frames_does_not_matter(make_model, make_inputs) -> None:
    model, inputs = make_model(), make_inputs((3, 3))
    teacher = make_teacher(model)
    scores = score(teacher, inputs)
    order = [2, 0, 1]
    inputs["features"] = {n: f[:, order] for n, f in inputs["features"].items()}
    torch.testing.assert_close(score(teacher, inputs), scores[:, order])


def test_the_snapshot_stays_when_the_model_moves(make_model, make_inputs) -> None:
    model, inputs = make_model(), make_inputs()
    teacher = make_teacher(model)
    before = {n: t.clone() for n, t in teacher.state_dict().items()}
    scores = score(teacher, inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert torch.equal(score(teacher, inputs), scores)
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())
    teacher.copy_from(model.fusion, model.language)
    expected = attention_by_hand(model, inputs, 2)
    np.testing.assert_allclose(score(teacher, inputs), expected, rtol=1e-4, atol=1e-6)


def test_the_teacher_neither_trains_nor_passes_gradients(make_model, make_inputs) -> None:
    model, inputs = make_model(), make_inputs()
    teacher = make_teacher(model)
    assert not any(p.requires_grad for p in teacher.parameters())
    inputs["features"]["clip"].requires_grad_(True)
    assert not score(teacher, inputs).requires_grad


def test_lora_is_merged_as_peft_merges_it(make_model) -> None:
    model = make_model()
    states = [merged_state(layer) for layer in model.language.layers]
    untouched = model.language.layers[0].self_attn.q_proj.base_layer.weight.clone()
    merged = copy.deepcopy(model.language.model).merge_and_unload()
    for mine, theirs in zip(states, merged.model.layers, strict=True):
        expected = theirs.state_dict()
        assert mine.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(mine[name], tensor), name
    assert not torch.equal(states[0]["self_attn.q_proj.weight"], untouched)  # LoRA did something


def test_without_lora_the_layers_are_copied_as_they_are(make_model, make_inputs) -> None:
    model = make_model(language={"lora": None})
    teacher = make_teacher(model)
    first, second = model.language.layers[:2]
    (mine,) = teacher.decoder.layers  # all of the second that is read is beside it
    for name, tensor in first.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name
    assert torch.equal(teacher.decoder.norm.weight, second.input_layernorm.weight)
    assert torch.equal(teacher.query.weight, second.self_attn.q_proj.weight)
    assert torch.equal(teacher.key.weight, second.self_attn.k_proj.weight)


def test_more_layers_than_there_are_is_refused(make_config, make_model) -> None:
    config = make_config(selection={"teacher_layers": 4})
    message = "selection.teacher_layers is 4, the language model has 3 layers"
    with pytest.raises(ValueError, match=message):
        AttentionTeacher(config, make_model().language)


@torch.no_grad()
def likelihood_by_hand(model, inputs) -> np.ndarray:
    """Log-likelihood of each group's findings after each of its frames, one forward each."""
    language = model.language.model
    embed = language.get_input_embeddings()
    visual_BKTD = model.fusion(inputs["features"])
    mask_BK = inputs["frame_mask_BK"].numpy()
    scores = np.zeros(mask_BK.shape)
    for group, frame in zip(*mask_BK.nonzero(), strict=True):
        ids = inputs["findings_ids_BS"][group][inputs["findings_mask_BS"][group]]
        row = torch.cat([embed(ids[:1]), visual_BKTD[group, frame], embed(ids[1:])])
        logits = language(inputs_embeds=row[None]).logits[0].double().numpy()
        for offset, token in enumerate(ids[1:].tolist()):
            before = logits[visual_BKTD.shape[2] + offset]
            scores[group, frame] += before[token] - np.log(np.exp(before).sum())
    return scores


def test_the_likelihood_teacher_is_a_loop_of_forwards(make_model, make_inputs) -> None:
    model, inputs = make_model(), make_inputs()
    visual_BKTD = model.fusion(inputs["features"])
    mask = inputs["frame_mask_BK"]
    scores = score_likelihood(
        model.language, visual_BKTD, mask, inputs["findings_ids_BS"], inputs["findings_mask_BS"]
    )
    assert not scores.requires_grad
    assert not scores[~mask].any()
    expected = likelihood_by_hand(model, inputs)[mask.numpy()]
    np.testing.assert_allclose(scores[mask], expected, rtol=1e-4)
