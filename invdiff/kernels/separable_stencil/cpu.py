"""Bands along rows and columns in one sweep on a CPU: an output row is summed from input rows, then along itself.

The sum over rows stays in the first-level cache, so a picture is read and written once. Sums may be reassociated
(``fastmath={"reassoc", "contract"}``): a dot product is then a few vectors wide, and no less accurate.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.threads import share


@cache
def _compiled() -> Callable[..., None]:
    import numba
    import numpy as np

    @numba.njit(nogil=True, fastmath={"reassoc", "contract"})
    def sweep(x: Any, out: Any, lf: Any, lw: Any, rf: Any, rw: Any, run: Any, start: int, stop: int) -> None:
        _, h, w = x.shape
        _, p, q = out.shape
        kl, kr, begin, end, period = lw.shape[2], rw.shape[2], run[0], run[1], run[2]
        line = np.zeros(q, x.dtype)
        row = np.zeros(w + kr, x.dtype)  # and its own beginning once more: windows may wrap around
        for item in range(start, stop):
            plane, i = item // p, item % p
            left, right = lw[plane % lw.shape[0], i], rw[plane % rw.shape[0]]
            top = lf[i]
            row[:w] = 0.0
            m = 0
            while m + 4 <= kl:  # four rows at a time: a quarter of the traffic of one
                a, b = x[plane, (top + m) % h], x[plane, (top + m + 1) % h]
                c, d = x[plane, (top + m + 2) % h], x[plane, (top + m + 3) % h]
                wa, wb, wc, wd = left[m], left[m + 1], left[m + 2], left[m + 3]
                for j in range(w):
                    row[j] += wa * a[j] + wb * b[j] + wc * c[j] + wd * d[j]
                m += 4
            while m < kl:
                a, wa = x[plane, (top + m) % h], left[m]
                for j in range(w):
                    row[j] += wa * a[j]
                m += 1
            row[w:] = row[:kr]
            y = out[plane, i]
            for j in range(q):
                if begin <= j < end:
                    continue
                total = row[0] * 0
                window, weights = row[rf[j] : rf[j] + kr], right[j]
                for m in range(kr):
                    total += weights[m] * window[m]
                y[j] = total
            for phase in range(period if end > begin else 0):  # here every period-th output has one stencil
                weights, at = right[begin + phase], rf[begin + phase]
                size = (end - begin - phase + period - 1) // period
                inner = y[begin:end] if period == 1 else line[:size]
                inner[:] = 0.0
                m = 0
                while m + 4 <= kr:
                    wa, wb, wc, wd = weights[m], weights[m + 1], weights[m + 2], weights[m + 3]
                    window = row[at + m : at + m + size + 3]
                    for j in range(size):
                        inner[j] += wa * window[j] + wb * window[j + 1] + wc * window[j + 2] + wd * window[j + 3]
                    m += 4
                while m < kr:
                    window, wa = row[at + m : at + m + size], weights[m]
                    for j in range(size):
                        inner[j] += wa * window[j]
                    m += 1
                if period > 1:
                    for j in range(size):
                        y[begin + phase + period * j] = inner[j]

    return cast(Callable[..., None], sweep)


def separable_stencil(x: Tensor, tables: list[Tensor], rows: int, columns: int) -> Tensor:
    """Apply the bands: (n, c, h, w) -> (n, c, rows, columns); see `invdiff.kernels.separable_stencil`."""
    left_first, left_weights, right_first, right_weights, run = tables
    n, c, h, w = x.shape
    out = torch.empty(n, c, rows, columns, dtype=x.dtype)
    if out.numel():
        planes = x.detach().contiguous().reshape(n * c, h, w).numpy()
        tensors = (left_first, left_weights, right_first, right_weights, run)
        least = max(1, 30_000 // max(1, w * left_weights.shape[2] // 8 + columns * right_weights.shape[2] // 8))
        arrays = [t.numpy() for t in tensors]
        share(_compiled(), n * c * rows, planes, out.view(n * c, rows, columns).numpy(), *arrays, least=least)
    return out
