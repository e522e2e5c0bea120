"""Direct and Fourier convolutions with exact transposes, and the cost model that chooses between the three ways."""

from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from invdiff.kernels.separable_stencil.cost import sweep_on_cpu
from invdiff.operators.boundary import Axis, good_length, pad

Method = Literal["direct", "separable", "fft"]


@dataclass(frozen=True)
class Cost:
    """Nanoseconds a pixel, measured in float32 on 3 x 256 x 256 pictures: one H100, one CPU core. Ratios matter.

    Parameters
    ----------
    fixed, tap
        "direct": fixed cost, and cost a tap of the kernel.
    column
        "separable": cost a column of its dense matrices.
    power_of_two, other_length
        "fft": cost a binary digit of the transform's size, for powers of two and for other lengths.
    """

    fixed: float
    tap: float
    column: float
    power_of_two: float
    other_length: float


COSTS = {"cuda": Cost(0.014, 0.000315, 0.000062, 0.0014, 0.0020), "cpu": Cost(1.2, 0.036, 0.013, 0.21, 0.235)}


def fft_lengths(rows: Axis, columns: Axis) -> tuple[int, int]:
    """Transform lengths that leave the outputs free of wrap-around: exact for "circular", 5-smooth otherwise."""
    return _length(rows), _length(columns)


@lru_cache(maxsize=256)
def _length(axis: Axis) -> int:
    if axis.boundary == "circular":
        return axis.size
    # Wrapped samples may fall on outputs that are cropped anyway: "valid" needs no more than the input's own length.
    outside = {"reflect": axis.taps - 1, "zero": max(axis.origin, axis.taps - 1 - axis.origin), "valid": 0}
    return good_length(axis.size + outside[axis.boundary])


@lru_cache(maxsize=256)
def choose(rows: Axis, columns: Axis, rank_one: bool, device: str) -> Method:
    """Cheapest method for one operator on one kind of device ("cuda" or any other, which counts as a CPU)."""
    cost = COSTS["cuda" if device == "cuda" else "cpu"]
    lengths = fft_lengths(rows, columns)
    size = lengths[0] * lengths[1]
    digit = cost.power_of_two if all(n & (n - 1) == 0 for n in lengths) else cost.other_length
    times: dict[Method, float] = {
        "direct": rows.outputs * columns.outputs * (cost.fixed + cost.tap * rows.taps * columns.taps),
        "fft": size * log2(max(size, 2)) * digit,
    }
    if rank_one:
        p, q, w = rows.outputs, columns.outputs, columns.size
        stencil = sweep_on_cpu(p, q, w, rows.taps, columns.taps, max(0, q - columns.taps + 1))
        if device == "cuda":
            stencil = p * q * cost.tap * (rows.taps + columns.taps)
        times["separable"] = min(cost.column * p * w * (rows.size + q), stencil)
    return min(times, key=lambda method: times[method])


def correlate(x: Tensor, kernel: Tensor, padding: tuple[int, int] = (0, 0)) -> Tensor:
    """Correlation of every channel with its kernel, without boundary: (n, c, h, w) and (1 or c, kh, kw)."""
    n, c, h, w = x.shape
    weight = kernel.expand(c, -1, -1)[:, None].repeat(n, 1, 1, 1)
    # All pictures as groups of one: ten times faster on a CPU than groups of channels. One group alone would go to
    # cuDNN, which rounds to TF32 by default; two never do.
    groups = x.reshape(1, n * c, h, w)
    if n * c == 1 and x.is_cuda:
        groups, weight = groups.expand(1, 2, h, w), weight.expand(2, -1, -1, -1)
    y = conv2d(groups, weight, padding=padding, groups=groups.shape[1])
    return y[:, : n * c].reshape(n, c, *y.shape[-2:])


def direct(x: Tensor, kernel: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Convolution by its definition."""
    return correlate(pad(x, rows, columns), kernel.flip(-2, -1))


def direct_adjoint(y: Tensor, kernel: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Transpose of `direct`: correlation over the padded picture, whose margins then fold back."""
    p = correlate(y, kernel, padding=(rows.taps - 1, columns.taps - 1))
    return columns.fold(rows.fold(p, 2), 3).contiguous()


def spectrum(kernel: Tensor, rows: Axis, columns: Axis, *, half: bool = True) -> Tensor:
    """Fourier transform, or its half, of the kernel with its origin at sample 0, at the lengths of `fft_lengths`."""
    (nh, nw), (kh, kw) = fft_lengths(rows, columns), kernel.shape[-2:]
    if rows.boundary == "reflect":
        # The padded picture begins taps - 1 - origin samples early.
        top, left = kh - 1, kw - 1
    else:
        top, left = rows.origin, columns.origin
    i, j = (torch.arange(kh) - top) % nh, (torch.arange(kw) - left) % nw
    # Summed, not assigned: a kernel larger than the picture wraps around itself. On the CPU, where the order of sums is
    # fixed.
    grid = torch.zeros(len(kernel), nh * nw, dtype=kernel.dtype)
    grid.index_add_(1, (i[:, None] * nw + j).flatten(), kernel.detach().cpu().flatten(1))
    grid = grid.reshape(-1, nh, nw)
    response: Tensor = torch.fft.rfft2(grid) if half else torch.fft.fft2(grid)
    return response.to(kernel.device)


def fourier(x: Tensor, response: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Convolution as a product with the kernel's `spectrum`."""
    lengths = fft_lengths(rows, columns)
    z = pad(x, rows, columns) if rows.boundary == "reflect" else x
    y: Tensor = torch.fft.irfft2(torch.fft.rfft2(z, s=lengths) * response, s=lengths)
    return y[..., : rows.outputs, : columns.outputs].contiguous()


def fourier_adjoint(y: Tensor, response: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Transpose of `fourier`: crops and zero-fills exchanged, and the conjugate spectrum."""
    lengths = fft_lengths(rows, columns)
    z: Tensor = torch.fft.irfft2(torch.fft.rfft2(y, s=lengths) * response.conj(), s=lengths)
    if rows.boundary != "reflect":
        return z[..., : rows.size, : columns.size].contiguous()
    p = z[..., : rows.size + rows.taps - 1, : columns.size + columns.taps - 1]
    return columns.fold(rows.fold(p, 2), 3).contiguous()
