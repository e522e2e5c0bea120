"""What a table of counts knows of sequences: Markov chains, the baseline that a network must beat."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

ORDERS = range(9)
"""Numbers of tokens before a token that its table may look at."""


def markov_bits(
    train: Int[Tensor, "n length"], test: Int[Tensor, "m length"], order: int, vocabulary_size: int
) -> Tensor:
    """Bits a token of each test sequence (m,) under a chain of an order, from counts plus one, the same at any place.

    The first tokens, which have fewer before them, are looked up in tables of lower orders.
    """
    V, length = vocabulary_size, test.shape[1]
    bits = torch.zeros(test.shape, dtype=torch.float64)
    for k in range(order + 1):
        places = range(k, length) if k == order else range(k, k + 1)
        counts = torch.ones(V ** (k + 1), dtype=torch.float64)
        words = _words(train, k, V).flatten()
        counts.index_add_(0, words, torch.ones(len(words), dtype=torch.float64))
        table = counts.reshape(-1, V)
        log_p = (table / table.sum(1, keepdim=True)).log2().flatten()
        bits[:, places] = -log_p[_words(test, k, V)[:, [p - k for p in places]]]
    return bits.mean(1)


def _words(tokens: Tensor, order: int, V: int) -> Tensor:
    """Give each word of ``order + 1`` tokens its number, (n, length - order)."""
    windows = tokens.cpu().unfold(1, order + 1, 1)
    return (windows * V ** torch.arange(order, -1, -1)).sum(-1)


def baseline(
    train: Int[Tensor, "n length"],
    validation: Int[Tensor, "v length"],
    test: Int[Tensor, "m length"],
    vocabulary_size: int,
) -> dict[str, float]:
    """Bits of test sequences under the order that is best on validation ones, with the standard error."""
    order = min(ORDERS, key=lambda k: float(markov_bits(train, validation, k, vocabulary_size).mean()))
    bits = markov_bits(train, test, order, vocabulary_size)
    return {
        "order": order,
        "bits_per_token": float(bits.mean()),
        "bits_per_token_se": float(bits.std()) / math.sqrt(len(bits)),
    }
