"""Rows of exams in, answers out: one replica of batch inference."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import pyarrow as pa
import torch

from ultra.data import schema
from ultra.data.features import Features
from ultra.data.instructions import questions
from ultra.data.prompts import encode_prompt
from ultra.evaluate.baselines import find_blobs
from ultra.evaluate.predictions import Prediction, questions_in, to_table
from ultra.model import checkpoint
from ultra.model.drawing import draw_understanding, to_png
from ultra.model.generation import Completion, Generator, Request
from ultra.model.llava_ultra import draw_number
from ultra.model.strategies import find_strategy, num_visual_tokens
from ultra.model.understanding import Understanding, understand
from ultra.types import IGNORED, FrameGroup, Turn, VisualTokens

Question = tuple[str, str, str | None]
"""(task, question, truth)."""


class Predictor:
    """Answers the questions of exams with a checkpoint's model.

    Args:
        checkpoint_uri: what answers; its own configuration counts, no other.
        max_new_tokens: longest answer.
        device: where torch runs, `cpu` or `cuda`.
        with_encoders: False loads no encoder, for one that is always given features.
        explained: ids of the exams whose first answer, by task and question, gets a picture.
    """

    def __init__(
        self,
        checkpoint_uri: str,
        max_new_tokens: int,
        device: str = "cpu",
        *,
        with_encoders: bool = True,
        explained: Collection[str] = (),
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.device = device
        self.explained = explained
        self.config = checkpoint.read(checkpoint_uri).config.model
        self.visual = checkpoint.load_visual(checkpoint_uri, device, with_encoders=with_encoders)
        self.language = checkpoint.load_language(checkpoint_uri, device)

    def __call__(self, exams: pa.Table) -> pa.Table:
        """Return the PREDICTIONS of a table of EXAMS, in its order."""
        return to_table(self.predict([schema.from_row(row) for row in exams.to_pylist()]))

    def predict(
        self, groups: Sequence[FrameGroup], features: Sequence[Features] | None = None
    ) -> list[Prediction]:
        """Return the predictions for every question of every group.

        An answer ends where the language model's `max_length` does; a prompt that leaves no room
        gets an empty one, cut by length.

        Args:
            groups: exams with their frames.
            features: of each group, from the cache of the checkpoint's encoders: encoder name ->
                (K, T, F), a composite the only frame; None encodes the frames.
        """
        looks = self._look(groups, features)
        asked = [(g, v, q) for g, v in zip(groups, looks, strict=True) for q in questions_of(g)]
        requests = [self._request(*each) for each in asked]
        fitting = [request for request in requests if request.max_new_tokens > 0]
        # For this batch alone: its thread would keep a replica's process alive after the job.
        with Generator(self.language, tokens_per_frame=self.config.tokens_per_frame) as generator:
            answers = iter(generator.generate(fitting))
        completions = [
            next(answers) if request.max_new_tokens > 0 else Completion((), "length")
            for request in requests
        ]
        blobs = {group.exam_id: _gradable_blobs(group) for group in groups}
        predictions = [
            self._prediction(group, look, question, completion, blobs[group.exam_id])
            for (group, look, question), completion in zip(asked, completions, strict=True)
        ]
        return self._add_pictures(groups, features, predictions)

    def _look(
        self, groups: Sequence[FrameGroup], features: Sequence[Features] | None
    ) -> list[VisualTokens]:
        if features is None:
            return self.visual.look([group.frames for group in groups])
        return [
            self.visual.choose(self._features(group, arrays), group.frames)
            for group, arrays in zip(groups, features, strict=True)
        ]

    def _features(self, group: FrameGroup, arrays: Features | None) -> dict[str, torch.Tensor]:
        """Return encoder name -> (1, K, T, F), of the cache or of the frames."""
        if arrays is not None:
            return {n: torch.from_numpy(a)[None].to(self.device) for n, a in arrays.items()}
        assert self.visual.encoders is not None, "frames need the encoders"
        return {n: f[None] for n, f in self.visual.encoders.encode([group.frames]).items()}

    def _request(self, group: FrameGroup, look: VisualTokens, question: Question) -> Request:
        turns = [Turn("user", question[1])]
        language = self.config.language
        prompt_ids = encode_prompt(
            self.language.tokenizer, language.template, turns, len(look.tokens_TD)
        )
        room = min(self.max_new_tokens, language.max_length - len(prompt_ids))
        return Request(prompt_ids, look.tokens_TD, schema.content_digest(group.frames), room)

    def _prediction(
        self,
        group: FrameGroup,
        look: VisualTokens,
        question: Question,
        completion: Completion,
        blobs: tuple[int, int] | None,
    ) -> Prediction:
        task, text, truth = question
        answer = self.language.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        return Prediction(
            exam_id=group.exam_id,
            patient_key=group.patient_key,
            site=group.site,
            task=task,
            question=text,
            answer=answer.strip(),
            truth=truth,
            chosen=look.chosen,
            scores=look.scores_K,
            valid=group.valid,
            brightest=blobs[0] if blobs else None,
            darkest=blobs[1] if blobs else None,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            content_sha256=schema.content_digest(group.frames),
        )

    def explain(
        self, group: FrameGroup, prediction: Prediction, features: Features | None = None
    ) -> Understanding:
        """Return what a prediction about a group rests on; features as in `predict`."""
        visual, language = self.visual, self.language
        prompt = encode_prompt(
            language.tokenizer,
            self.config.language.template,
            [Turn("user", prediction.question)],
            num_visual_tokens(self.config, len(group.frames)),
        )
        return understand(
            self.config,
            visual.fusion,
            visual.scorer,
            language,
            self._features(group, features),
            [*prompt, *prediction.token_ids],
            [*[IGNORED] * len(prompt), *prediction.token_ids],
            draw_number(group.frames),
        )

    def _add_pictures(
        self,
        groups: Sequence[FrameGroup],
        features: Sequence[Features] | None,
        predictions: Sequence[Prediction],
    ) -> list[Prediction]:
        given: Sequence[Features | None] = features or [None] * len(groups)
        left = {
            group.exam_id: (group, arrays)
            for group, arrays in zip(groups, given, strict=True)
            if group.exam_id in self.explained
        }
        pictures = find_strategy(self.config).pictures
        drawn: dict[int, bytes] = {}
        for p in sorted(predictions, key=lambda p: (p.task, p.question)):
            if p.token_ids and p.exam_id in left:
                group, arrays = left.pop(p.exam_id)
                understanding = self.explain(group, p, arrays)
                shown = list(pictures(group.frames))
                drawn[id(p)] = to_png(draw_understanding(understanding, shown, group.valid))
        return [replace(p, picture=drawn.get(id(p))) for p in predictions]


def questions_of(group: FrameGroup) -> list[Question]:
    """Return the single-turn `instruct` questions of an exam with their true answers.

    An exam that has none is asked for its report; nothing is known to compare that with.
    """
    return list(questions_in(group.conversations)) or [("report", questions()["report"][0], None)]


def _gradable_blobs(group: FrameGroup) -> tuple[int, int] | None:
    if group.valid is None or all(group.valid) or not any(group.valid):
        return None
    return find_blobs(group.frames)
