"""Pixelwise measurements compiled for a CPU: one read and one write, a segment of a picture at a time."""

from collections.abc import Callable
from functools import cache
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.pixelwise.curve import Curve
from invdiff.kernels.threads import share

_SEGMENT = 8192


@cache
def _movers() -> tuple[Callable[..., None], ...]:
    import numba
    import numpy as np

    @numba.njit(nogil=True)
    def gather(x: Any, index: Any, out: Any, start: int, stop: int) -> None:
        m = len(index)
        parts = (m + _SEGMENT - 1) // _SEGMENT
        for item in range(start, stop):
            begin = item % parts * _SEGMENT
            row, at, to = (
                x[item // parts],
                index[begin : begin + _SEGMENT],
                out[item // parts, begin : begin + _SEGMENT],
            )
            for k in range(len(at)):
                to[k] = row[np.uint64(at[k])]  # an unsigned index needs no check for a negative one

    @numba.njit(nogil=True)
    def spread(y: Any, index: Any, out: Any, start: int, stop: int) -> None:
        d = out.shape[1]
        parts = (d + _SEGMENT - 1) // _SEGMENT
        for item in range(start, stop):
            begin = item % parts * _SEGMENT
            first, last = np.searchsorted(index, begin), np.searchsorted(index, begin + _SEGMENT)
            row, at, to = y[item // parts, first:last], index[first:last], out[item // parts]
            to[begin : begin + _SEGMENT] = 0
            for k in range(len(at)):
                to[np.uint64(at[k])] = row[k]  # an unsigned index needs no check for a negative one

    return gather, spread


@cache
def _misfit(masked: bool, diagonal: bool, clipped: bool) -> Callable[..., None]:
    import numba
    import numpy as np

    # Sums of a segment may be reassociated, so that they are made in vectors.
    @numba.njit(nogil=True, fastmath={"reassoc", "contract"})
    def misfit(
        x: Any, y: Any, inverse: Any, index: Any, numbers: Any, sums: Any, out: Any, start: int, stop: int
    ) -> None:
        d, parts = x.shape[1], sums.shape[1]
        gain, offset, low, high = numbers[0], numbers[1], numbers[2], numbers[3]
        zero = gain * 0
        for item in range(start, stop):
            i, begin = item // parts, item % parts * _SEGMENT
            first, last = begin, min(begin + _SEGMENT, d)
            if masked:
                out[i, first:last] = zero
                first, last = np.searchsorted(index, first), np.searchsorted(index, last)
            origin = 0 if masked else first
            values, gradient, measured = x[i, origin:], out[i, origin:], y[i % len(y), first:last]
            at, scales, total, scale = index[first:last], inverse[first:last], zero, inverse[0]
            for k in range(last - first):
                j = np.uint64(at[k]) if masked else k
                if diagonal:
                    scale = scales[k]
                seen, slope = gain * values[j] - offset, gain
                if clipped:
                    slope = gain if (seen >= low) & (seen <= high) else zero
                    seen = low if seen < low else seen  # not a number stays so
                    seen = high if seen > high else seen
                w = (measured[k] - seen) * scale
                total += w * w
                gradient[j] = w * scale * slope
            sums[i, item % parts] = total

    return cast(Callable[..., None], misfit)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the seen entries: (n, d) -> (n, m)."""
    out = torch.empty(len(x), len(index), dtype=x.dtype)
    parts = -(-len(index) // _SEGMENT)
    share(_movers()[0], len(x) * parts, x.contiguous().numpy(), index.numpy(), out.numpy(), least=8)
    return out


def spread(y: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Return zeros with the seen entries in their places: (n, m) -> (n, d)."""
    out = torch.empty(len(y), len(place), dtype=y.dtype)
    parts = -(-len(place) // _SEGMENT)
    share(_movers()[1], len(y) * parts, y.contiguous().numpy(), index.numpy(), out.numpy(), least=8)
    return out


def misfit(
    x: Tensor,
    y: Tensor,
    std: Tensor,
    index: Tensor | None,
    place: Tensor | None,  # noqa: ARG001  one signature
    curve: Curve,
) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, d) of the log-density; see `invdiff.kernels.pixelwise.misfit`."""
    n, d = x.shape
    out, sums = torch.empty_like(x), torch.empty(n, -(-d // _SEGMENT), dtype=torch.float64)
    numbers = torch.tensor([curve.gain, curve.offset, curve.low, curve.high], dtype=x.dtype)
    at = torch.empty(0, dtype=torch.int64) if index is None else index
    tensors = (x, y.contiguous(), std.reciprocal().reshape(-1).contiguous(), at, numbers, sums, out)
    kernel = _misfit(index is not None, std.numel() > 1, isfinite(curve.low) or isfinite(curve.high))
    share(kernel, sums.numel(), *(t.numpy() for t in tensors), least=8)
    return sums.sum(1).to(x.dtype), out
