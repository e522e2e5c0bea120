"""Weighted sums of gathered entries, compiled for a CPU: zeros, then a sum for each output that has entries."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.threads import share

_SEGMENT = 4096


@cache
def _compiled() -> Callable[..., None]:
    import numba
    import numpy as np

    @numba.njit(nogil=True)
    def work(x: Any, occupied: Any, starts: Any, index: Any, weights: Any, out: Any, start: int, stop: int) -> None:
        parts = (len(occupied) + _SEGMENT - 1) // _SEGMENT
        for item in range(start, stop):
            first = item % parts * _SEGMENT
            row, to = x[item // parts], out[item // parts]
            for r in occupied[first : first + _SEGMENT]:
                e, end = starts[r], starts[r + 1]
                total = weights[e] * row[index[e]]
                for k in range(e + 1, end):
                    total += weights[k] * row[np.uint64(index[k])]  # unsigned: no check for a negative one
                to[r] = total

    return cast(Callable[..., None], work)


def gather_sum(x: Tensor, starts: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return (n, outputs) from (n, inputs); see `invdiff.kernels.scattered`."""
    out = torch.zeros(len(x), len(starts) - 1, dtype=x.dtype)
    # Few points on a large grid: most outputs of the transpose have no entry, and a fill is faster than a look at each.
    occupied = (starts[1:] != starts[:-1]).nonzero()[:, 0]
    if out.numel() and len(occupied):
        tensors = (x.detach().contiguous(), occupied, starts, index, weights, out)
        count = len(x) * -(-len(occupied) // _SEGMENT)
        least = 1 + 50_000 * count // (len(x) * len(index))
        share(_compiled(), count, *(t.numpy() for t in tensors), least=least)
    return out
