"""The published definitions against values worked by hand from the published code.

Where a number is not plain from the texts, the comment counts.
"""

from __future__ import annotations

from math import exp

import pytest

from tests.evaluate.conftest import make_prediction
from ultra.evaluate import llava_med
from ultra.evaluate.llava_med import BLEU_WEIGHTS, bleu, exact_match, f1, llava_med_metrics
from ultra.evaluate.metrics import count_all, score_all
from ultra.evaluate.tokenizers import get_tokenizer, tokenize_char, tokenize_whitespace


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The liver, and a spleen!", "liver and spleen"),
        ("two cysts", "2 cysts"),
        ("None", "0"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("1,200 mm (left)", "1200 mm left"),
        ("left-sided, x-ray", "left sided x ray"),
        ("1,200 left-sided", "1200 leftsided"),  # grouped digits: every mark goes without trace
        ("1.5 cm. Cyst.", "1.5 cm cyst"),
        ("a..b", "ab"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("I.Dont", "idont"),
        ("肝脏。左叶，", "肝脏。左叶，"),  # Chinese punctuation stays
        ("." * 40, "." * 8),  # the flag that stands where the count belongs is worth 32
        ("", ""),
    ],
)
def test_normal_form(text: str, expected: str) -> None:
    assert llava_med.normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("liver", "liver and spleen", 1.0),  # one token, and the truth has it
        ("the liver and the spleen", "liver", 1 / 3),  # liver, and, spleen: one of three
        ("liver liver", "liver", 1 / 2),  # distinct over all
        ("轻度三尖瓣反流", "轻度三尖瓣、二尖瓣反流", 0.0),
        ("肝脏。", "肝脏", 0.0),
        ("", "liver", 0.0),
    ],
)
def test_exact_match_is_none(answer: str, truth: str, expected: float) -> None:
    assert exact_match(answer, truth, tokenize_whitespace) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        # found 1 of 1 said, 2 truth tokens missed: P 1, R 1/3
        ("liver", "liver and spleen", (1 / 2, 1.0, 1 / 3)),
        # found twice, kidney wrong, spleen missed: P 2/3, R 2/3
        ("liver liver kidney", "liver spleen", (2 / 3, 2 / 3, 2 / 3)),
        # all four count although the truth has one: P 1, R 1
        ("cyst cyst cyst cyst", "cyst", (1.0, 1.0, 1.0)),
        ("轻度三尖瓣反流", "轻度三尖瓣、二尖瓣反流", (0.0, 0.0, 0.0)),
        ("", "cyst", (0.0, 0.0, 0.0)),
        ("cyst", "", (0.0, 0.0, 0.0)),
    ],
)
def test_f1_precision_recall(answer: str, truth: str, expected: tuple[float, ...]) -> None:
    assert f1(answer, truth, tokenize_whitespace) == pytest.approx(expected)


REORDERED = ("轻度三尖瓣、二尖瓣反流", "轻度二尖瓣、三尖瓣反流")
SAMPLES = [
    # answer, truth, tokenizer, em, f1, bleu4
    ("右肾", "右肾上极", "char", 1.0, 2 / 3, 0.0),
    ("右肾", "右肾上极", "jieba", 1.0, 2 / 3, 0.0),
    ("不包含", "包含", "char", 2 / 3, 0.8, 0.0),
    ("不包含", "包含", "jieba", 1 / 2, 2 / 3, 0.0),
    ("扩大的心脏。", "肥大的心脏。", "char", 0.8, 0.8, (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
    ("扩大的心脏。", "肥大的心脏。", "jieba", 2 / 3, 2 / 3, 0.0),
    # 8 distinct of 10; bigrams 7 of 9, trigrams 4 of 8, four characters in a row 1 of 7
    (*REORDERED, "char", 8 / 10, 1.0, (7 / 9 * 4 / 8 * 1 / 7) ** 0.25),
    (*REORDERED, "jieba", 1.0, 1.0, 0.0),
    (*REORDERED, "whitespace", 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "truth", "tokenizer", "em", "f", "b"), SAMPLES)
def test_chinese_samples(
    answer: str, truth: str, tokenizer: str, em: float, f: float, b: float
) -> None:
    tokenize = get_tokenizer(tokenizer)
    assert exact_match(answer, truth, tokenize) == pytest.approx(em)
    assert f1(answer, truth, tokenize)[0] == pytest.approx(f)
    assert bleu(answer, truth, BLEU_WEIGHTS["bleu4"], tokenize) == pytest.approx(b)
    assert exact_match(answer, truth, tokenize) <= f1(answer, truth, tokenize)[1] + 1e-12


def test_a_perfect_short_answer_has_no_bleu() -> None:
    scores = {n: bleu("肝脏", "肝脏", w, tokenize_char) for n, w in BLEU_WEIGHTS.items()}
    assert scores == {"bleu4": 0, "bleu1": 1, "bleu2": 1, "bleu3": 0}


def test_bleu_by_single_orders() -> None:
    # 5 of 6 tokens, 2 of 5 pairs (right kidney, kidney shows), 1 of 4 triples
    answer, truth = "right kidney shows cyst small there", "right kidney shows small cyst"
    assert bleu(answer, truth, BLEU_WEIGHTS["bleu1"], tokenize_whitespace) == pytest.approx(5 / 6)
    assert bleu(answer, truth, BLEU_WEIGHTS["bleu2"], tokenize_whitespace) == pytest.approx(2 / 5)
    assert bleu(answer, truth, BLEU_WEIGHTS["bleu3"], tokenize_whitespace) == pytest.approx(1 / 4)
    # the brevity penalty, and counts clipped by the truth's
    short = bleu("cyst", "cyst on liver", BLEU_WEIGHTS["bleu1"], tokenize_whitespace)
    assert short == pytest.approx(exp(1 - 3))
    twice = bleu("cyst cyst", "cyst", BLEU_WEIGHTS["bleu1"], tokenize_whitespace)
    assert twice == pytest.approx(1 / 2)
    assert bleu("", "cyst", BLEU_WEIGHTS["bleu1"], tokenize_whitespace) == 0


def score(pairs: list[tuple[str, str]], tokenizer: str = "whitespace") -> dict[str, float | None]:
    metrics = llava_med_metrics(tokenizer, get_tokenizer(tokenizer))
    counts = count_all(metrics, [make_prediction(*pair) for pair in pairs])
    return score_all(metrics, counts, range(len(pairs)))


def test_names_say_suite_tokenizer_and_smoothing() -> None:
    assert [*llava_med_metrics("char", tokenize_char)] == [
        "llava_med/em-char",
        "llava_med/f1-char",
        "llava_med/precision-char",
        "llava_med/recall-char",
        "llava_med/bleu4-char-none",
        "llava_med/bleu1-char-none",
        "llava_med/bleu2-char-none",
        "llava_med/bleu3-char-none",
        "llava_med/open_accuracy-substring",
        "llava_med/closed_accuracy",
        "llava_med/closed_accuracy-misses_dropped",
        "llava_med/closed_accuracy-substring",
    ]


def test_open_scores_are_means_over_open_questions() -> None:
    scores = score([("Liver", "liver and spleen"), ("kidney cyst", "cyst"), ("yes", "yes")])
    assert scores["llava_med/em-whitespace"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["llava_med/precision-whitespace"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["llava_med/recall-whitespace"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["llava_med/f1-whitespace"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores["llava_med/bleu1-whitespace-none"] == pytest.approx((exp(-2) + 1 / 2) / 2)
    assert scores["llava_med/open_accuracy-substring"] == 1 / 2
    assert scores["llava_med/closed_accuracy"] == 1
    assert score([("yes", "yes")])["llava_med/em-whitespace"] is None
    assert score([("cyst", "cyst")])["llava_med/closed_accuracy"] is None


def test_the_set_says_what_is_closed() -> None:
    metrics = llava_med_metrics("whitespace", tokenize_whitespace)
    given = [
        make_prediction("upper lobe", "upper", closed=True),
        make_prediction("yes", "yes", closed=False),
    ]
    scores = score_all(metrics, count_all(metrics, given), range(2))
    assert scores["llava_med/closed_accuracy"] == 0  # neither yes nor no is in the answer
    assert scores["llava_med/closed_accuracy-substring"] == 1
    assert scores["llava_med/em-whitespace"] == 1  # over the second alone


def test_closed_accuracies_keep_their_bugs() -> None:
    def closed(*pairs: tuple[str, str]) -> tuple[float | None, ...]:
        scores = score(list(pairs))
        names = ("closed_accuracy", "closed_accuracy-misses_dropped", "closed_accuracy-substring")
        return tuple(scores[f"llava_med/{name}"] for name in names)

    assert closed(("Yes, it is", "yes")) == (1, 1, 1)
    assert closed(("abnormal", "no")) == (1, 1, 1)  # `abnormal` holds a `no`
    # A wrong yes or no is dropped by the first version; a third answer was counted.
    assert closed(("no", "yes"), ("yes", "yes")) == (1 / 2, 1, 1 / 2)
    assert closed(("no", "yes")) == (0, None, 0)
    assert closed(("maybe", "yes"), ("yes", "yes")) == (1 / 2, 1 / 2, 1 / 2)
    # Chinese is always wrong by two of them, and by the third 不包含 is right for 包含.
    assert closed(("是", "是")) == (0, 0, 1)
    assert closed(("不包含", "包含")) == (0, 0, 1)
