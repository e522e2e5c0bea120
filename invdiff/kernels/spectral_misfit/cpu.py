"""A circular convolution's residuals in the Fourier domain compiled for a CPU, a row of the half spectra at a time."""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from invdiff.kernels.threads import share


@cache
def _compiled() -> Callable[..., None]:
    import numba

    @numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    def misfit(
        half: Any, measured: Any, response: Any, numbers: Any, sums: Any, width: int, start: int, stop: int
    ) -> None:
        _, c, h, k, _ = half.shape
        s, inverse = numbers[0], numbers[1]
        for item in range(start, stop):
            i, plane, a = item // (c * h), item // h % c, item % h
            x, y, f = half[i, plane, a], measured[i % len(measured), plane, a], response[plane % len(response), a]
            once = s * 0
            total = once
            for b in range(k):
                re = (y[b, 0] - (f[b, 0] * x[b, 0] - f[b, 1] * x[b, 1])) / s
                im = (y[b, 1] - (f[b, 0] * x[b, 1] + f[b, 1] * x[b, 0])) / s
                total += re * re + im * im
                if b == 0 or 2 * b == width:  # its own mirror image; all others count twice
                    once += re * re + im * im
                x[b, 0], x[b, 1] = (f[b, 0] * re + f[b, 1] * im) * inverse, (f[b, 0] * im - f[b, 1] * re) * inverse
            sums[i, plane * h + a] = 2 * total - once

    return cast(Callable[..., None], misfit)


def misfit(half: Tensor, measured: Tensor, response: Tensor, std: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and spectrum of the gradient; see `invdiff.kernels.spectral_misfit.misfit`."""
    n, c, h, _ = half.shape
    sums = torch.empty(n, c * h, dtype=torch.float64)
    numbers = torch.stack((std, 1.0 / (std * (h * width))))
    spectra = [torch.view_as_real(t).numpy() for t in (half, measured, response)]
    share(_compiled(), n * c * h, *spectra, numbers.numpy(), sums.numpy(), width, least=64)
    return (sums.sum(1) / (h * width)).to(std.dtype), half
