"""Sparse matrices as lists of taps: for every output the inputs that it sums, and their weights."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.kernels.wavelet.filters import Triplets


def taps(
    triplets: Triplets, outputs: int, inputs: int
) -> tuple[Int[Tensor, "outputs k"], Float[Tensor, "outputs k"], Int[Tensor, " outputs"]]:
    """Return the inputs of each output, rising, their weights, and how many there are.

    Parameters
    ----------
    triplets
        The matrix; equal places add up.
    outputs, inputs
        Its shape.

    Returns
    -------
    tuple
        Lists of one length k >= 1. Where an output has fewer taps the list repeats its last input with weight 0, so
        that nothing is read which the output does not depend on (the first input where it depends on none).
    """
    rows, columns, values = triplets
    place, inverse = torch.unique(rows * inputs + columns, return_inverse=True)
    weights = torch.zeros(len(place), dtype=values.dtype).index_add_(0, inverse, values)
    row, column = place // inputs, place % inputs
    count = torch.bincount(row, minlength=outputs)
    first = count.cumsum(0) - count
    k = max(1, int(count.max()) if outputs else 1)
    slot = torch.arange(k)
    at = first[:, None] + torch.minimum(slot, (count[:, None] - 1).clamp_min(0))
    at = at.clamp(max=max(0, len(place) - 1))
    empty = count[:, None] == 0
    index = torch.where(empty, 0, column[at])
    return index, torch.where(slot < count[:, None], weights[at], 0.0), count


def split_run(index: Tensor, weights: Tensor, count: Tensor) -> tuple[int, int]:
    """Longest run of pairs of outputs (o of the low, o of the high band) that are one stencil, two inputs further."""
    m = len(index) // 2
    return _run(index.reshape(2, m, -1), weights.reshape(2, m, -1), count.reshape(2, m), 2)


def merge_run(index: Tensor, weights: Tensor, count: Tensor) -> tuple[int, int]:
    """Longest run of pairs of outputs (2 q and 2 q + 1) that are one stencil, one coefficient further."""
    q, k = len(index) // 2, index.shape[1]
    index, weights = (t[: 2 * q].reshape(q, 2, k).transpose(0, 1) for t in (index, weights))
    return _run(index, weights, count[: 2 * q].reshape(q, 2).T, 1)


def _run(index: Tensor, weights: Tensor, count: Tensor, step: int) -> tuple[int, int]:
    """Of lists (2, pairs, k): the longest [begin, end) in which neighbours differ by the step alone."""
    if index.shape[1] == 0:
        return 0, 0
    live = torch.arange(index.shape[2]) < count[:, :, None]
    same = ((index.diff(dim=1) == step) | ~live[:, 1:]).all(2) & (weights.diff(dim=1) == 0).all(2)
    same = (same & (count.diff(dim=1) == 0)).all(0)
    best, begin = (0, 0), 0
    for i in [*(~same).nonzero()[:, 0].tolist(), len(same)]:
        if i > begin and i + 1 - begin > best[1] - best[0]:
            best = (begin, i + 1)
        begin = i + 1
    return best
