"""Weighted sums of gathered entries, compiled for a CPU: one read of the tables a row, one write of each output."""

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
    def work(x: Any, starts: Any, index: Any, weights: Any, out: Any, start: int, stop: int) -> None:
        outputs = out.shape[1]
        parts = (outputs + _SEGMENT - 1) // _SEGMENT
        for item in range(start, stop):
            first = item % parts * _SEGMENT
            row, to = x[item // parts], out[item // parts]
            e = starts[first]
            for r in range(first, min(first + _SEGMENT, outputs)):
                end = starts[r + 1]
                total = weights[:0].sum()
                while e < end:
                    total += weights[e] * row[np.uint64(index[e])]  # unsigned: no check for a negative one
                    e += 1
                to[r] = total

    return cast(Callable[..., None], work)


def gather_sum(x: Tensor, starts: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return (n, outputs) from (n, inputs); see `invdiff.kernels.scattered`."""
    out = torch.empty(len(x), len(starts) - 1, dtype=x.dtype)
    if out.numel():
        tensors = (x.detach().contiguous(), starts, index, weights, out)
        share(_compiled(), len(x) * -(-out.shape[1] // _SEGMENT), *(t.numpy() for t in tensors), least=8)
    return out
