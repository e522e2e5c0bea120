"""Fourier magnitudes and their residuals compiled for a CPU, a row of the half spectrum at a time.

Frequency b of row a lies at column w // 2 + b of row (a + h // 2) mod h, and its negative at column w // 2 - b of row
(h // 2 - a) mod h. Columns b = 0, and b = w / 2 of an even width, are their own images: they are counted once.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from invdiff.kernels.threads import share


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    import numba
    import numpy as np

    @numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    def polar(re: Any, im: Any) -> Any:
        """Cosine and sine of the phase, zero where there is none, and magnitude; safe from under- and overflow."""
        unit = max(abs(re), abs(im))
        if not unit > 0:
            return re, im, abs(re) + abs(im)  # not a number stays so
        re, im = re / unit, im / unit
        r = np.sqrt(re * re + im * im)
        return re / r, im / r, r * unit

    @numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    def magnitudes(half: Any, out: Any, scale: Any, start: int, stop: int) -> None:
        _, h, w = out.shape
        middle = w // 2
        for item in range(start, stop):
            plane, a = item // h, item % h
            row, to, image = half[plane, a], out[plane, (a + h // 2) % h], out[plane, (h + h // 2 - a) % h]
            for b in range((w + 1) // 2):
                to[middle + b] = polar(row[b, 0], row[b, 1])[2] * scale[0]
            for b in range(1, (w + 1) // 2):
                image[middle - b] = to[middle + b]
            if w % 2 == 0:
                to[0] = polar(row[middle, 0], row[middle, 1])[2] * scale[0]

    @numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
    def misfit(half: Any, y: Any, std: Any, sums: Any, channels: int, scale: Any, start: int, stop: int) -> None:
        _, h, w = y.shape
        middle, factor, half_of_it = w // 2, scale[0], scale[1]
        for item in range(start, stop):
            plane, a = item // h, item % h
            row, i, j = half[plane, a], (a + h // 2) % h, (h + h // 2 - a) % h
            seen = y[plane % len(y)]
            noise = std[plane % len(std)]
            here, there = seen[i], seen[j]
            s_here, s_there = noise[i % noise.shape[0]], noise[j % noise.shape[0]]
            last = noise.shape[1] - 1  # 0 for a scalar
            total = factor * 0
            for b in range(row.shape[0]):
                at, image = (middle + b) % w, middle - b
                cosine, sine, r = polar(row[b, 0], row[b, 1])
                s, t = s_here[min(at, last)], s_there[min(image, last)]
                v, u = (here[at] - r * factor) / s, (there[image] - r * factor) / t
                total += v * v
                if b > 0 and 2 * b < w:
                    total += u * u
                even = (v / s + u / t) * half_of_it
                row[b, 0], row[b, 1] = even * cosine, even * sine
            sums[plane // channels, plane % channels * h + a] = total

    return magnitudes, misfit


def _scale(half: Tensor, width: int) -> Tensor:
    # The half of it too, in the same type: numba makes float64 of a float32 over an integer.
    scale: float = (half.shape[-2] * width) ** -0.5
    return torch.tensor([scale, 0.5 * scale], dtype=half.real.dtype)


def magnitudes(half: Tensor, width: int) -> Tensor:
    """Magnitudes (n, c, h, w); see `invdiff.kernels.fourier_magnitude.magnitudes`."""
    n, c, h, k = half.shape
    out = torch.empty(n, c, h, width, dtype=half.real.dtype)
    tensors = (torch.view_as_real(half).view(n * c, h, k, 2), out.view(n * c, h, width), _scale(half, width))
    share(_compiled()[0], n * c * h, *(t.numpy() for t in tensors), least=128)
    return out


def misfit(half: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and spectrum of the gradient; see `invdiff.kernels.fourier_magnitude.misfit`."""
    n, c, h, k = half.shape
    sums = torch.empty(n, c * h, dtype=torch.float64)
    noise = std.contiguous() if std.ndim else std.reshape(1, 1, 1)
    tensors = (torch.view_as_real(half).view(n * c, h, k, 2), y.contiguous().flatten(0, 1), noise, sums)
    arrays = [t.numpy() for t in tensors]
    share(_compiled()[1], n * c * h, *arrays, c, _scale(half, y.shape[-1]).numpy(), least=64)
    return sums.sum(1).to(y.dtype), half
