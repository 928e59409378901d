"""The loss of an n-gram model of the training text: a target that every network should pass."""

import math

import numpy as np
from numpy.typing import NDArray

from benchmarks.language.data import Corpus, Tokens
from benchmarks.output.targets import Target

DELTA = 0.02  # added to every count


def ngram_loss(corpus: Corpus, split: str, order: int = 5, delta: float = DELTA) -> float:
    """Loss on a held-out text, in nats per token, of the model that counts `order`-grams of the training tokens.

    `p(x | context) = (count(context x) + delta) / (count(context) + delta vocab_size)`, the context being the
    `order - 1` tokens before. `vocab_size ** order` must fit into 63 bits.
    """
    if order * math.log2(corpus.vocab_size) > 63:
        raise ValueError(f"{order}-grams of {corpus.vocab_size} tokens do not fit into 63 bits")
    whole = np.concatenate([_codes(part, order, corpus.vocab_size) for part in corpus.train])
    asked = _codes(corpus.held_out(split), order, corpus.vocab_size)
    together = _counts(whole, asked)
    alone = _counts(whole // corpus.vocab_size, asked // corpus.vocab_size)
    return float(-np.log((together + delta) / (alone + delta * corpus.vocab_size)).mean())


def counting(corpus: Corpus, split: str) -> list[Target]:
    """The 5-gram model's loss on a held-out text as a target, where tokens are bytes."""
    return [Target("5-gram model", ngram_loss(corpus, split))] if corpus.bytes_per_token == 1 else []


def _codes(tokens: Tokens, order: int, base: int) -> NDArray[np.int64]:
    """All n-grams of a text, each as one number."""
    wide = tokens.astype(np.int64)
    count = max(0, len(wide) - order + 1)
    codes = np.zeros(count, dtype=np.int64)
    for i in range(order):
        codes = codes * base + wide[i : i + count]
    return codes


def _counts(seen: NDArray[np.int64], asked: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each of `asked` is among `seen`."""
    known, counts = np.unique(seen, return_counts=True)
    places = np.searchsorted(known, asked).clip(max=len(known) - 1)
    return np.where(known[places] == asked, counts[places], 0)
