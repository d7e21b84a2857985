"""Samples of unequal size become one padded batch, value by value."""

from __future__ import annotations

from dataclasses import replace
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from ultra.config import StageConfig
from ultra.data.collate import Collator, Sample, join, pad, pick_conversations
from ultra.types import IGNORED, VISUAL, Conversation, FrameGroup, Turn

T, CLIP, SAM = 4, 5, 6


class Letters:
    """a is 11, b is 12 and so on."""

    bos_token_id: int | None = 1
    eos_token_id = 2

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [10 + ord(c) - ord("`") if c in ascii_lowercase else 9 for c in text]

    def decode(self, token_ids, *, skip_special_tokens: bool = False) -> str:
        return "".join(chr(i - 10 + ord("`")) for i in token_ids)


def make_group(exam_id: str, num_frames: int, findings: str = "ab", **changes) -> FrameGroup:
    values = {
        "exam_id": exam_id,
        "patient_key": "p",
        "site": "liver",
        "findings": findings,
        "diagnosis": "z",
        "frames": tuple(f"{exam_id} {i}".encode() for i in range(num_frames)),
        "frame_sizes": ((8, 6),) * num_frames,
        "frame_sources": ("cine",) * num_frames,
    }
    return FrameGroup(**{**values, **changes})


def make_sample(
    exam_id: str, num_frames: int, answer: str, findings: str = "ab", features: bool = True
) -> Sample:
    group = make_group(exam_id, num_frames, findings)
    turns = (Turn("user", "q"), Turn("assistant", answer))
    first = float(ord(exam_id))
    arrays = {
        name: np.arange(num_frames * T * width, dtype=np.float16).reshape(num_frames, T, width)
        + np.float16(first)
        for name, width in (("clip", CLIP), ("sam", SAM))
    }
    conversation = Conversation("align", "findings", turns)
    return Sample(
        group, [conversation], arrays if features else None, epoch=ord(exam_id) - ord("a")
    )


def test_a_composite_is_the_group_s_only_picture() -> None:
    collator = Collator(Letters(), "plain", lambda num_frames: T, 99, lambda num_frames: 1)
    samples = [make_sample("a", 1, "xy"), make_sample("b", 1, "x")]
    samples[1] = replace(samples[1], group=make_group("b", 3))
    batch = collator(samples)
    assert batch.frame_mask_BK.tolist() == [[True], [True]]
    assert {n: f.shape for n, f in batch.features.items()} == {
        "clip": (2, 1, T, CLIP),
        "sam": (2, 1, T, SAM),
    }
    pixels = collator([replace(sample, features=None) for sample in samples])
    assert pixels.frame_mask_BK.tolist() == [[True], [True]]
    assert [len(frames) for frames in pixels.frames] == [1, 3]  # it is made of all of them


def make_collator(max_length: int = 99, num_visual=lambda num_frames: T) -> Collator:
    return Collator(Letters(), "plain", num_visual, max_length)


def test_a_batch_by_hand() -> None:
    samples = [make_sample("a", 2, "c"), make_sample("b", 3, "def", findings="abcd")]
    batch = make_collator()(samples)
    assert batch.exam_ids == ("a", "b")
    assert batch.epochs == (0, 1)
    opening = [1, 9, 9, *[VISUAL] * T, 27, 9, 9, 9]  # ^ 问 ： #### q \n 答 ：
    silent = [IGNORED] * len(opening)
    assert batch.input_ids_BS.tolist() == [
        [*opening, 13, 2, 0, 0],
        [*opening, 14, 15, 16, 2],
    ]
    assert batch.labels_BS.tolist() == [
        [*silent, 13, 2, IGNORED, IGNORED],
        [*silent, 14, 15, 16, 2],
    ]
    length = len(opening)
    assert batch.text_mask_BS.tolist() == [
        [True] * (length + 2) + [False] * 2,
        [True] * (length + 4),
    ]
    assert batch.findings_ids_BS.tolist() == [[1, 11, 12, 0, 0], [1, 11, 12, 13, 14]]
    assert batch.findings_mask_BS.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.frame_mask_BK.tolist() == [[True, True, False], [True, True, True]]


def test_features_are_stacked_and_padded_with_zeros() -> None:
    samples = [make_sample("a", 2, "c"), make_sample("b", 3, "d")]
    batch = make_collator()(samples)
    assert batch.frames is None
    assert {n: f.shape for n, f in batch.features.items()} == {
        "clip": (2, 3, T, CLIP),
        "sam": (2, 3, T, SAM),
    }
    for name, stacked in batch.features.items():
        assert stacked.dtype == np.float16
        assert np.array_equal(stacked[0, :2], samples[0].features[name])
        assert np.array_equal(stacked[1], samples[1].features[name])
        assert (stacked[0, 2] == 0).all()


def test_without_features_the_frames_travel() -> None:
    samples = [make_sample("a", 2, "c", features=False), make_sample("b", 1, "d", features=False)]
    batch = make_collator()(samples)
    assert batch.features is None
    assert batch.frames == ((b"a 0", b"a 1"), (b"b 0",))
    assert batch.frame_mask_BK.tolist() == [[True, True], [True, False]]


def test_frames_are_counted_where_only_their_features_are_there() -> None:
    group = make_group("a", 3, frames=())
    sample = make_sample("a", 3, "c")
    batch = make_collator()([Sample(group, sample.conversations, sample.features)])
    assert batch.frame_mask_BK.tolist() == [[True] * 3]


def test_visual_places_follow_the_number_of_frames() -> None:
    collator = make_collator(num_visual=lambda num_frames: num_frames * T)
    batch = collator([make_sample("a", 2, "c"), make_sample("b", 3, "d")])
    assert (batch.input_ids_BS == VISUAL).sum(-1).tolist() == [2 * T, 3 * T]


def test_rows_of_like_length_in_tokens_go_together() -> None:
    answers = {"a": "cde", "b": "c", "d": "cdef", "e": "c"}
    samples = [make_sample(exam, 1, answer) for exam, answer in answers.items()]
    batches = list(make_collator().batches(samples, 3))
    assert [batch.exam_ids for batch in batches] == [("b", "e", "a"), ("d",)]
    for batch, (start, end) in zip(batches, ((0, 3), (3, 4)), strict=True):
        ordered = [samples[i] for i in (1, 3, 0, 2)][start:end]
        assert np.array_equal(batch.input_ids_BS, make_collator()(ordered).input_ids_BS)


def test_a_long_answer_loses_its_end() -> None:
    batch = make_collator(max_length=13)([make_sample("a", 1, "cdefgh")])
    assert batch.input_ids_BS.shape == (1, 13)
    assert batch.labels_BS[0].tolist() == [IGNORED] * 11 + [13, 14]


@pytest.mark.parametrize("max_length", [3, 11])
def test_a_row_without_an_answer_left_names_its_exam(max_length) -> None:
    message = f"exam b: no answer within the first {max_length} tokens"
    with pytest.raises(ValueError, match=message):
        make_collator(max_length)([make_sample("b", 1, "c")])


def test_an_impossible_conversation_names_its_exam() -> None:
    group = make_group("b", 1)
    conversation = Conversation("align", "findings", (Turn("assistant", "c"),))
    with pytest.raises(ValueError, match="exam b: turn 0 must be the user's"):
        make_collator()([Sample(group, [conversation], None)])


def test_without_findings_the_teacher_reads_the_diagnosis() -> None:
    group = make_group("a", 1, findings="", diagnosis="yz")
    sample = Sample(group, make_sample("a", 1, "c").conversations, None)
    assert make_collator()([sample]).findings_ids_BS.tolist() == [[1, 35, 36]]


def test_findings_leave_room_for_a_frame() -> None:
    batch = make_collator(max_length=13)([make_sample("a", 1, "c", findings="ab" * 20)])
    assert batch.findings_ids_BS.tolist() == [[1, *[11, 12] * 4]]


def test_padding_goes_to_the_right() -> None:
    padded, mask = pad([[5], [6, 7, 8], [9, 9]], -3)
    assert padded.tolist() == [[5, -3, -3], [6, 7, 8], [9, 9, -3]]
    assert mask.tolist() == [[True, False, False], [True] * 3, [True, True, False]]


def pick(group: FrameGroup, name: str, seed: int, epoch: int, which: str = "one") -> list[str]:
    stage = StageConfig.model_validate(
        {"name": name, "trainable": ["scorer"], "epochs": 1, "conversations": which}
    )
    return [c.task for c in pick_conversations(group, stage, seed, epoch)]


def conversations(*names: str) -> tuple[Conversation, ...]:
    return tuple(
        Conversation(stage, task, (Turn("user", "q"), Turn("assistant", task)))
        for stage, task in (name.split("/") for name in names)
    )


def test_epochs_go_round_the_conversations_of_the_stage() -> None:
    told = conversations("align/a", "instruct/b", "instruct/c", "align/d", "instruct/e")
    group = make_group("x", 1, conversations=told)
    tasks = [pick(group, "instruct", 0, epoch)[0] for epoch in range(6)]
    assert sorted(tasks[:3]) == ["b", "c", "e"]
    assert tasks[3:] == tasks[:3]
    assert {pick(group, "align", 0, e)[0] for e in range(2)} == {"a", "d"}


def test_a_stage_may_have_all_conversations_and_another_first_each_epoch() -> None:
    told = conversations("align/a", "instruct/b", "instruct/c", "align/d", "instruct/e")
    group = make_group("x", 1, conversations=told)
    orders = ["".join(pick(group, "instruct", 0, epoch, "all")) for epoch in range(4)]
    assert sorted(orders[:3]) == ["bce", "ceb", "ebc"]
    assert orders[3] == orders[0]


def test_exams_and_seeds_begin_at_different_conversations() -> None:
    told = conversations("align/a", "align/b", "align/c")
    groups = [make_group(f"exam {i}", 1, conversations=told) for i in range(60)]
    for seed in (0, 1):
        firsts = [pick(group, "align", seed, 0)[0] for group in groups]
        assert all(8 < firsts.count(task) < 35 for task in "abc")
    by_seed = [[pick(group, "align", seed, 0)[0] for group in groups] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_an_exam_without_conversations_says_what_to_run() -> None:
    group = make_group("x", 1, conversations=conversations("align/a"))
    message = "exam x: no conversation for stage 'instruct'; run ray_jobs.instructions"
    with pytest.raises(ValueError, match=message):
        pick(group, "instruct", 0, 0)


SHOWN = [1, VISUAL, VISUAL]
"""What every conversation begins with: a token, and the frame."""


def text(question: list[int], answer: list[int], begin: list[int] = SHOWN) -> tuple[Any, Any]:
    return begin + question + answer, [IGNORED] * (len(begin) + len(question)) + answer


def test_conversations_stand_behind_the_frames_they_share() -> None:
    joined = join([text([5], [6, 7]), text([8, 9], [10]), text([11], [12])], 99)
    assert joined.ids == [1, VISUAL, VISUAL, 5, 6, 7, 8, 9, 10, 11, 12]
    assert joined.labels == [*[IGNORED] * 4, 6, 7, IGNORED, IGNORED, 10, IGNORED, 12]
    assert joined.conversations == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_what_does_not_fit_as_a_whole_stays_out() -> None:
    texts = [text([5], [6, 7]), text([8, 9], [10]), text([11], [12])]
    assert join(texts, 8) == join([texts[0], texts[2]], 99)
    assert join(texts, 6) == join(texts[:1], 99)


@pytest.mark.parametrize(
    "other",
    [
        text([5], [6], begin=[2, VISUAL, VISUAL]),  # another system text
        text([5], [6], begin=[1, 4, VISUAL, VISUAL]),  # the frames come with a later turn
        text([5], [6], begin=[1, VISUAL, VISUAL, VISUAL]),
        text([], [6]),  # nothing stands between the frames and the answer
    ],
)
def test_what_begins_otherwise_stays_out(other: tuple[list[int], list[int]]) -> None:
    one = text([5], [6, 7])
    assert join([one, other, one], 99) == join([one, one], 99)
    assert join([other, one], 99).ids == other[0]


def test_nothing_that_is_learnt_is_shared() -> None:
    ids, labels = [1, 4, 5, VISUAL, VISUAL, 6, 7], [IGNORED] * 7
    labels[2] = ids[2]  # an answer before the frames
    labels[6] = ids[6]
    joined = join([(ids, labels), (ids, labels)], 99)
    assert joined == (ids, labels, [1] * 7)


def test_a_batch_of_exams_with_all_their_conversations() -> None:
    samples = [make_sample("a", 2, "c"), make_sample("b", 3, "def")]
    two = [*samples[0].conversations, *samples[1].conversations]
    batch = make_collator()([replace(samples[0], conversations=two), samples[1]])
    alone = make_collator()(samples)
    places = batch.text_mask_BS.sum(-1)
    shared = int((batch.conversation_BS[0, : places[0]] == 0).sum())
    assert places.tolist() == [alone.text_mask_BS.sum() - shared, alone.text_mask_BS[1].sum()]
    for number, row in ((1, 0), (2, 1)):
        own = (batch.conversation_BS[0] == number) & batch.text_mask_BS[0]
        expected = alone.input_ids_BS[row, shared : alone.text_mask_BS[row].sum()]
        assert batch.input_ids_BS[0, own].tolist() == expected.tolist()
        answers = alone.labels_BS[row, shared : alone.text_mask_BS[row].sum()]
        assert batch.labels_BS[0, own].tolist() == answers.tolist()
    assert batch.conversation_BS.max(-1).tolist() == [2, 1]
