"""The suite `llava_med`: the definitions of LLaVA-Med's published metric code, bug for bug.

They are those of `llava/eval/run_eval.py`, `run_eval_batch.py` and `eval_metrics/` of LLaVA-Med
1.0.0, whose tables print them times 100. That code splits on white space (tokenizer `whitespace`),
where a Chinese answer is one token; with another tokenizer its definitions stay and its tokens do
not. Numbers under these names compare with papers that used that code, and with nothing else.

Its open accuracy by the nearest training answer is left out: it stands on a candidate file that was
never published.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ultra.evaluate.metrics import Metric, is_closed, ngrams
from ultra.evaluate.predictions import Prediction
from ultra.evaluate.tokenizers import Tokenize

BLEU_WEIGHTS: Mapping[str, Sequence[float]] = {
    "bleu4": (0.25, 0.25, 0.25, 0.25),
    "bleu1": (1, 0, 0, 0),
    "bleu2": (0, 1, 0, 0),
    "bleu3": (0, 0, 1, 0),
}
"""Only `bleu4` is cumulative: the others are the precision of that one order."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ["none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMERALS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"zero": "0"}
_ARTICLES = {"a", "an", "the"}
_MAX_PERIODS = 32
"""Periods taken out of a text: the published call passes a flag where the count belongs."""

_CONTRACTED = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am might've mightn't must've mustn't needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas
wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've
someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've
you'd've
"""


# A word is written short with any one of its apostrophes left out. The published table turns one
# pair the wrong way round.
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(text: str) -> str:
    """Return a text in the published normal form, which is VQA's.

    ASCII punctuation goes: all marks without trace where a digit, comma and digit follow each other
    anywhere or this mark stands beside a space, else a space takes its place. English articles go,
    number words become figures, contractions get their apostrophes. Chinese punctuation stays.
    """
    grouped = re.search(r"\d,\d", text) is not None
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or grouped else " ")
    bare = re.sub(r"\.(?!\d)", "", bare, count=_MAX_PERIODS)
    words = [_NUMERALS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(answer: str, truth: str, tokenize: Tokenize) -> float:
    """Return the published "exact match": distinct truth tokens in the answer / answer tokens.

    It never exceeds the precision, and says 1 of `liver` where the truth is `liver and spleen`.
    """
    said, meant = tokenize(normalise(answer)), tokenize(normalise(truth))
    return len(set(said) & set(meant)) / len(said) if said else 0.0


def f1(answer: str, truth: str, tokenize: Tokenize) -> tuple[float, float, float]:
    """Return the published F1, precision and recall of an answer.

    Not clipped: a token counts as right as often as the answer says it, and recall sets these
    against the tokens of the truth that the answer lacks.
    """
    said = Counter(tokenize(normalise(answer)))
    meant = Counter(tokenize(normalise(truth)))
    right = sum(count for token, count in said.items() if token in meant)
    missed = sum(count for token, count in meant.items() if token not in said)
    if not right:
        return 0.0, 0.0, 0.0
    precision, recall = right / said.total(), right / (right + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def bleu(answer: str, truth: str, weights: Sequence[float], tokenize: Tokenize) -> float:
    """Return the BLEU of one answer as nltk's `sentence_bleu` defines it, without smoothing.

    An order with weight and without a match gives 0 (nltk: 1e-77 or less), also where the
    answer is too short to have one; so a perfect answer of two tokens has a `bleu4` of 0.

    Args:
        answer: in the published normal form already, and so is `truth`.
        truth: what the answer is compared with.
        weights: of the precisions of orders 1, 2 and so on.
        tokenize: the tokenizer.
    """
    said, meant = tokenize(answer), tokenize(truth)
    if not said:
        return 0.0
    logarithm = min(0.0, 1 - len(meant) / len(said))
    for order, weight in enumerate(weights, start=1):
        if weight:
            grams = ngrams(said, order)
            matches = (grams & ngrams(meant, order)).total()
            if not matches:
                return 0.0
            logarithm += weight * math.log(matches / grams.total())
    return math.exp(logarithm)


def llava_med_metrics(tokenizer: str, tokenize: Tokenize) -> dict[str, Metric]:
    """Return the suite: means over open questions, and accuracies over closed ones.

    Which questions are closed the published data say by hand, see `is_closed`. Of the closed
    accuracies the bare name is `run_eval.py`'s as corrected later, `misses_dropped` the first
    one's, and `substring` that of `run_eval_batch.py`.

    Args:
        tokenizer: its name.
        tokenize: the tokenizer.
    """

    def f1_part(index: int) -> Callable[[str, str], float]:
        return lambda answer, truth: f1(answer, truth, tokenize)[index]

    def weighted(weights: Sequence[float]) -> Callable[[str, str], float]:
        return lambda answer, truth: bleu(answer, truth, weights, tokenize)

    bleus = {
        f"llava_med/{name}-{tokenizer}-none": _open(weighted(weights))
        for name, weights in BLEU_WEIGHTS.items()
    }
    return {
        f"llava_med/em-{tokenizer}": _open(lambda a, t: exact_match(a, t, tokenize)),
        f"llava_med/f1-{tokenizer}": _open(f1_part(0)),
        f"llava_med/precision-{tokenizer}": _open(f1_part(1)),
        f"llava_med/recall-{tokenizer}": _open(f1_part(2)),
        **bleus,
        "llava_med/open_accuracy-substring": _open(lambda a, t: float(t in a)),
        "llava_med/closed_accuracy": _closed(_count_closed),
        "llava_med/closed_accuracy-misses_dropped": _closed(_count_closed_hits),
        "llava_med/closed_accuracy-substring": _closed(lambda a, t: (t in a, 1)),
    }


def _open(value: Callable[[str, str], float]) -> Metric:
    """Return the mean of a value of (answer, truth) over open questions."""

    def count(p: Prediction) -> Sequence[float]:
        if is_closed(p):
            return 0, 0
        # Answer and truth come normalised, and `exact_match` and `f1` do it again, as published.
        return value(normalise(p.answer.lower()), normalise((p.truth or "").lower())), 1

    return Metric(count)


def _closed(count_pair: Callable[[str, str], Sequence[float]]) -> Metric:
    def count(p: Prediction) -> Sequence[float]:
        if not is_closed(p):
            return 0, 0
        return count_pair(normalise(p.answer.lower()), normalise((p.truth or "").lower()))

    return Metric(count)


def _count_closed(answer: str, truth: str) -> Sequence[float]:
    # By substring: `abnormal` holds a `no`, and a Chinese answer neither word, so it is wrong.
    return ("yes" in answer or "no" in answer) and truth in answer, 1


def _count_closed_hits(answer: str, truth: str) -> Sequence[float]:
    # A wrong yes or no is not counted at all, which flatters the accuracy.
    if ("yes" in answer or "no" in answer) and truth not in answer:
        return 0, 0
    return _count_closed(answer, truth)
