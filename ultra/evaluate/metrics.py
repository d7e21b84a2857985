"""Scores of answers and of chosen frames.

A suite is a set of definitions. Its name is part of a metric's name, and so is the tokenizer's
where tokens count: `strict/f1-char`. Names hold no brackets because MLflow allows none.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ultra.evaluate.predictions import Prediction

Tokenize = Callable[[str], list[str]]
Pairs = Sequence[tuple[str, str]]
"""(answer, truth) pairs."""

_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_\u2e80-\U0010ffff]+|[^\s_]")

YES = frozenset(
    {"是", "是的", "有", "存在", "包含", "包括", "可以", "可见", "能", "对", "正确", "yes", "true"}
)
NO = frozenset(
    {"否", "不", "不是", "没", "没有", "无", "未", "未见", "不存在", "不包含", "不包括", "不可以"}
    | {"不可见", "不能", "不对", "错", "错误", "no", "not", "false"}
)


def tokenize_char(text: str) -> list[str]:
    """Return each Chinese character, each run of Latin letters and each number as a token.

    The text is folded by NFKC and lowered first; punctuation is dropped, a decimal point kept.
    `12mm` and `12 mm` give the same tokens.
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    tokens: list[str] = _TOKEN.findall(folded)
    return [t for t in tokens if unicodedata.category(t[0])[0] not in "PZC"]


TOKENIZERS: Mapping[str, Tokenize] = {"char": tokenize_char}


def exact_match(pairs: Pairs) -> float:
    """Return the share of answers that equal the truth after normalisation.

    Normalisation is `tokenize_char`, whatever tokenizer the other metrics use: case, width,
    spaces and punctuation do not count, everything else does.
    """
    return _mean(tokenize_char(answer) == tokenize_char(truth) for answer, truth in pairs)


def f1(pairs: Pairs, tokenize: Tokenize) -> float:
    """Return the mean over answers of the F1 between bags of tokens.

    Counts are clipped: a token said three times matches at most as often as the truth has it.
    """
    return _mean(_f1(tokenize(answer), tokenize(truth)) for answer, truth in pairs)


def _f1(answer: list[str], truth: list[str]) -> float:
    if not answer or not truth:
        return float(answer == truth)
    shared = (Counter(answer) & Counter(truth)).total()
    return 2 * shared / (len(answer) + len(truth))


def bleu(pairs: Pairs, tokenize: Tokenize) -> float:
    """Return corpus BLEU-4, without smoothing (Papineni et al., 2002).

    Clipped n-gram precisions are taken over the whole corpus, their geometric mean is multiplied by
    the brevity penalty. Orders the answers are too short for are left out (effective order), so a
    perfect answer of two characters scores 1; an order that has n-grams and no match gives 0.
    """
    matches, totals = [0] * 4, [0] * 4
    answer_length = truth_length = 0
    for answer, truth in pairs:
        said, meant = tokenize(answer), tokenize(truth)
        answer_length += len(said)
        truth_length += len(meant)
        for order in range(4):
            said_grams, meant_grams = _ngrams(said, order + 1), _ngrams(meant, order + 1)
            matches[order] += (said_grams & meant_grams).total()
            totals[order] += said_grams.total()
    used = [(m, t) for m, t in zip(matches, totals, strict=True) if t]
    if not used or not all(m for m, _ in used):
        return 0.0
    precision = math.exp(sum(math.log(m / t) for m, t in used) / len(used))
    return precision * math.exp(min(0.0, 1 - truth_length / answer_length))


def _ngrams(tokens: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def polarity(text: str, *, whole: bool = False) -> bool | None:
    """Return True for an answer that says yes, False for one that says no, None for neither.

    A word of two characters or more counts where the answer begins with it, the longest such word
    deciding; a single character only as the whole first clause, because `无回声` denies nothing.

    Args:
        text: the answer.
        whole: count a word only when it is all there is, as for a truth.
    """
    clauses = [part for part in re.split(r"[\s,.;:!?、，。；：！？]+", text) if part]
    if not clauses or (whole and len(clauses) > 1):
        return None
    clause = "".join(tokenize_char(clauses[0]))
    if clause in YES or clause in NO:
        return clause in YES
    if whole:
        return None
    words = [word for word in YES | NO if len(word) > 1 and _begins(clause, word)]
    return max(words, key=len) in YES if words else None


def _begins(clause: str, word: str) -> bool:
    # A Latin word must end where the clause's does: `normal` does not begin with `no`.
    rest = clause.removeprefix(word)
    return rest != clause and not (word.isascii() and rest[:1].isascii())


def closed_accuracy(pairs: Pairs) -> float | None:
    """Return the share of right answers to questions whose truth is a plain yes or no.

    Words of one meaning count as equal, and opposite ones never do: 不包含 for 包含 is wrong
    although most of its characters match. An answer that says neither is wrong. None where no
    truth is a yes or a no.
    """
    closed = [(a, polarity(t, whole=True)) for a, t in pairs]
    known = [(a, truth) for a, truth in closed if truth is not None]
    return _mean(polarity(a) is truth for a, truth in known) if known else None


def score_strict(pairs: Pairs, tokenizer: str) -> dict[str, float | None]:
    """Return the suite `strict`; a metric that does not apply is None."""
    tokenize = TOKENIZERS[tokenizer]
    return {
        "strict/em": exact_match(pairs),
        f"strict/f1-{tokenizer}": f1(pairs, tokenize),
        f"strict/bleu4-{tokenizer}": bleu(pairs, tokenize),
        "strict/closed_accuracy": closed_accuracy(pairs),
    }


SUITES: Mapping[str, Callable[[Pairs, str], dict[str, float | None]]] = {"strict": score_strict}


def gradable_exams(predictions: Iterable[Prediction]) -> list[Prediction]:
    """Return one prediction of each exam in which some frames are valid and some are not.

    Where all frames are valid, or none is, there is nothing to choose.
    """
    exams = {p.exam_id: p for p in predictions}
    return [p for p in exams.values() if p.valid is not None and any(p.valid) and not all(p.valid)]


def selection_accuracy(exams: Sequence[Prediction]) -> float | None:
    """Return the share of gradable exams whose chosen frame is valid; None for no exam."""
    return _mean(p.valid[p.chosen] for p in exams if p.valid is not None) if exams else None


def selection_chance(exams: Sequence[Prediction]) -> float | None:
    """Return what a random choice reaches: the mean of valid / k; None for no exam."""
    shares = (sum(p.valid) / len(p.valid) for p in exams if p.valid is not None)
    return _mean(shares) if exams else None


def _mean(values: Iterable[float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
