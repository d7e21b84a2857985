"""Exams in, answers out, through a model that never trained."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from ultra.data import schema
from ultra.data.features import unpack
from ultra.data.prompts import encode_prompt
from ultra.evaluate.predictions import PREDICTIONS, Question, questions_of, to_table
from ultra.evaluate.predictor import Predictor
from ultra.model.splice import splice
from ultra.types import Conversation, FrameGroup, Turn

Exams = list[FrameGroup]


@pytest.fixture(scope="module")
def predictor(random_checkpoint: str) -> Predictor:
    return Predictor(random_checkpoint, max_new_tokens=7)


def test_single_turn_instruct_questions_are_asked(exams: Exams) -> None:
    assert questions_of(exams[0]) == [
        Question("kind", "是什么？", "囊肿"), Question("normal", "是否正常？", "否"),
    ]  # fmt: skip
    (question,) = questions_of(exams[2])
    assert (question.task, question.truth) == ("report", None)
    assert question.text.endswith(("。", "？"))


def test_a_table_of_exams_becomes_a_table_of_predictions(
    predictor: Predictor, exams: Exams
) -> None:
    rows = [schema.to_row(exam) for exam in exams[:3]]
    table = predictor(pa.Table.from_pylist(rows, schema=schema.EXAMS))
    assert table.schema == PREDICTIONS
    rows = table.to_pylist()
    assert [(r["exam_id"], r["task"]) for r in rows] == [
        ("a", "kind"), ("a", "normal"), ("b", "kind"), ("c", "report"),
    ]  # fmt: skip
    assert [len(r["scores"]) for r in rows] == [3, 3, 2, 1]
    assert rows[0]["valid"] == [True, False, False]
    assert rows[3]["valid"] is None
    assert rows[3]["truth"] is None
    assert [r["brightest"] is None for r in rows] == [False, False, False, True]
    for exam, row in zip([exams[0], *exams[:3]], rows, strict=True):
        assert row["content_sha256"] == schema.content_digest(exam.frames)
        assert row["scores"][row["chosen"]] == max(row["scores"])
        assert 1 <= len(row["token_ids"]) <= 7
        assert row["finish_reason"] in {"stop", "length"}


@pytest.mark.parametrize(("strategy", "lengths"), [("all", [12, 8, 4]), ("composite", [4, 4, 4])])
def test_every_frame_has_a_score_whatever_is_shown(
    random_checkpoint: str, exams: Exams, tmp_path: Path, strategy: str, lengths: list[int]
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    text = (copy / "config.yaml").read_text()
    assert "strategy: adaptive" in text
    (copy / "config.yaml").write_text(text.replace("strategy: adaptive", f"strategy: {strategy}"))
    predictor = Predictor(str(copy), max_new_tokens=3, explained={"a", "b"})
    looks = predictor.visual.look([exam.frames for exam in exams[:3]])
    assert [len(look.tokens_TD) for look in looks] == lengths
    predictions = predictor.predict(exams[:3])
    assert [len(p.scores) for p in predictions] == [3, 3, 2, 1]
    assert all(p.token_ids for p in predictions)
    assert [p.picture is not None for p in predictions] == [True, False, True, False]


def test_the_first_answer_of_an_explained_exam_gets_a_picture(
    random_checkpoint: str, predictor: Predictor, exams: Exams
) -> None:
    explaining = Predictor(random_checkpoint, max_new_tokens=7, explained={"a", "c", "elsewhere"})
    groups = [exams[2], exams[0], exams[1]]
    found = explaining.predict(groups)
    pictured = [(p.exam_id, p.task) for p in found if p.picture is not None]
    assert pictured == [("c", "report"), ("a", "kind")]
    assert [replace(p, picture=None) for p in found] == predictor.predict(groups)
    for p in found:
        if p.picture is not None:
            with Image.open(io.BytesIO(p.picture)) as image:
                assert image.format == "PNG"
    assert to_table(found).column("picture").null_count == 2


def test_what_is_explained_is_what_the_answer_saw(predictor: Predictor, exams: Exams) -> None:
    for exam, p in zip(exams[:2], predictor.predict(exams[:2])[::2], strict=True):
        understanding = predictor.explain(exam, p)
        assert understanding.chosen == p.chosen
        assert understanding.scores_K == pytest.approx(p.scores, abs=1e-5)
        assert understanding.token_scores_KT.max(-1) == pytest.approx(p.scores, abs=1e-5)
        assert 0 < understanding.attention_T.sum() < 1


@pytest.mark.parametrize("strategy", ["adaptive", "random", "composite"])
def test_features_and_pixels_give_the_same_answers(
    random_checkpoint: str, random_backbones: Path, exams: Exams, tmp_path: Path, strategy: str
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint, copy)
    config = copy / "config.yaml"
    text = config.read_text().replace("strategy: adaptive", f"strategy: {strategy}")
    config.write_text(text)
    predictor = Predictor(str(copy), max_new_tokens=7)
    encoders = predictor.visual.encoders
    assert encoders is not None
    features = []
    for exam in exams[:2]:
        stored = {n: [f.tobytes() for f in a] for n, a in encoders([exam.frames])[0].items()}
        features.append(unpack(stored, 4, "float16"))
    # One exam at a time, as the cache is filled: other frames beside it may round another way.
    expected = [p for exam in exams[:2] for p in predictor.predict([exam])]

    for vision in ("clip", "sam.pth"):
        text = text.replace(str(random_backbones / vision), "/missing")
    config.write_text(text)
    blind = Predictor(str(copy), max_new_tokens=7, with_encoders=False)
    assert blind.predict(exams[:2], features) == expected
    blind.explained = {"b"}
    pictures = [p.picture is not None for p in blind.predict(exams[:2], features)]
    assert pictures == [p.exam_id == "b" for p in expected]
    seen, cached = (
        each.explain(exams[0], expected[0], given)
        for each, given in ((predictor, None), (blind, features[0]))
    )
    assert seen.token_scores_KT.tolist() == cached.token_scores_KT.tolist()
    assert seen.attention_T.tolist() == cached.attention_T.tolist()
    assert expected[0].scores[0] != expected[-1].scores[0]
    with pytest.raises(AssertionError, match="frames need the encoders"):
        blind.predict(exams[:2])


@torch.no_grad()
def test_answers_are_the_model_s_own(predictor: Predictor, exams: Exams) -> None:
    """The same tokens as a plain greedy loop over the spliced embeddings gives."""
    predictions = predictor.predict(exams[:2])
    language = predictor.language
    for exam, p in [(exams[0], predictions[0]), (exams[1], predictions[2])]:
        (look,) = predictor.visual.look([exam.frames])
        assert look.chosen == p.chosen
        prompt = encode_prompt(language.tokenizer, "plain", [Turn("user", p.question)], 4)
        ids = torch.tensor([prompt])
        embeds = splice(language.embedding, ids, torch.tensor(look.tokens_TD))
        expected: list[int] = []
        while len(expected) < 7 and language.tokenizer.eos_token_id not in expected:
            logits = language(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool))
            expected.append(int(logits[0, -1].argmax()))
            embeds = torch.cat([embeds, language.embedding(torch.tensor([expected[-1:]]))], dim=1)
        assert list(p.token_ids) == expected
        assert p.answer == language.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_a_question_longer_than_the_model_gets_an_empty_answer(
    predictor: Predictor, exams: Exams
) -> None:
    def ask(question: str) -> tuple[Conversation]:
        turns = (Turn("user", question), Turn("assistant", "囊肿"))
        return (Conversation("instruct", "kind", turns),)

    long = replace(exams[0], conversations=ask("囊" * 500))
    nearly = replace(exams[1], conversations=ask("囊" * 385))
    empty, cut, other = predictor.predict([long, nearly, exams[2]])
    assert (empty.answer, empty.token_ids, empty.finish_reason) == ("", (), "length")
    assert 0 < len(cut.token_ids) < 7
    assert other.token_ids
