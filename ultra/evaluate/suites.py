"""The suites by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from ultra.evaluate.findings import fact_metrics
from ultra.evaluate.llava_med import llava_med_metrics
from ultra.evaluate.metrics import Metric, strict_metrics
from ultra.evaluate.tokenizers import Tokenize, get_tokenizer

SUITES: Mapping[str, Callable[[str, Tokenize], dict[str, Metric]]] = {
    "strict": strict_metrics,
    "llava_med": llava_med_metrics,
}


def answer_metrics(suites: Iterable[str], tokenizer: str, weights: str = "") -> dict[str, Metric]:
    """Return the metrics of suites, and those of all facts together, in that order.

    Args:
        suites: names in SUITES.
        tokenizer: a name that `get_tokenizer` knows.
        weights: the language model's address, for the tokenizer `model`.

    Raises:
        ConfigError: when the language model's tokenizer cannot be read.
    """
    tokenize = get_tokenizer(tokenizer, weights)
    chosen = (SUITES[suite](tokenizer, tokenize) for suite in suites)
    return {
        name: metric for metrics in (*chosen, fact_metrics()) for name, metric in metrics.items()
    }
