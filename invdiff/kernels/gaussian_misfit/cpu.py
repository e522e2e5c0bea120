"""Gaussian residuals compiled for a CPU: one read and at most one write, a segment of a row at a time."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.threads import share

_SEGMENT = 8192


@cache
def _compiled(diagonal: bool, gradient: bool) -> Callable[..., None]:
    import numba

    # Sums of a segment may be reassociated, so that they are made in vectors. Quotients stay quotients: they make the
    # gradient bitwise that of the reference, and cost nothing beside the memory's traffic.
    @numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    def residuals(p: Any, y: Any, std: Any, sums: Any, out: Any, start: int, stop: int) -> None:
        m, parts = p.shape[1], sums.shape[1]
        for item in range(start, stop):
            i, first = item // parts, item % parts * _SEGMENT
            last = min(first + _SEGMENT, m)
            values, measured = p[i, first:last], y[i % len(y), first:last]
            scales, written, scale = std[first:last], out[i % len(out), first:last], std[0]
            total = scale * 0
            for k in range(last - first):
                s = scales[k] if diagonal else scale
                w = (measured[k] - values[k]) / s
                total += w * w
                if gradient:
                    written[k] = w / s
            sums[i, item % parts] = total

    return cast(Callable[..., None], residuals)


def _run(p: Tensor, y: Tensor, std: Tensor, out: Tensor, *, gradient: bool) -> Tensor:
    n, m = p.shape
    if len(std) not in (1, m):
        std = std.repeat_interleave(2)  # a complex value's two parts
    sums = torch.empty(n, -(-m // _SEGMENT), dtype=torch.float64)
    tensors = (p.contiguous(), y.contiguous(), std.to(p.dtype).contiguous(), sums, out)
    share(_compiled(len(std) > 1, gradient), sums.numel(), *(t.detach().numpy() for t in tensors), least=8)
    return sums.sum(1).to(p.dtype)


def misfit(p: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, m) of the log-density; see `invdiff.kernels.gaussian_misfit.misfit`."""
    out = torch.empty(p.shape, dtype=p.dtype)
    return _run(p, y, std, out, gradient=True), out


def chi_square(p: Tensor, y: Tensor, std: Tensor) -> Tensor:
    """Chi-square (n,); see `invdiff.kernels.gaussian_misfit.chi_square`."""
    return _run(p, y, std, p.new_empty(1, 0), gradient=False)
