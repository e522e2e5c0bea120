"""Direct and Fourier convolutions with exact transposes, and the cost model that chooses between the three ways."""

from dataclasses import dataclass
from functools import lru_cache
from math import inf, log2
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from invdiff.kernels import ON_GPU, chosen, plain
from invdiff.kernels.separable_stencil.cost import sweep_on_cpu
from invdiff.operators.boundary import Axis, Boundary, good_length, pad

Method = Literal["direct", "separable", "fft"]
Spectra = tuple[Tensor, Tensor]


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
    """Transform lengths that leave the outputs free of wrap-around: exact for "circular", else quick ones."""
    return _length(rows), _length(columns)


@lru_cache(maxsize=256)
def _length(axis: Axis) -> int:
    if axis.boundary == "circular":
        return axis.size
    # Wrapped samples may fall on outputs that are cropped anyway: "valid" needs no more than the input's own length.
    outside = {"reflect": axis.taps - 1, "zero": max(axis.origin, axis.taps - 1 - axis.origin), "valid": 0}
    n = axis.size + outside[axis.boundary]
    # Multiples of 16 are up to twice as fast as odd lengths that are 5-smooth (125 takes twice the time of 128).
    return good_length(n) if n <= 32 else 16 * good_length(-(-n // 16))


@lru_cache(maxsize=256)
def choose(rows: Axis, columns: Axis, rank_one: bool, device: str) -> Method:
    """Cheapest method for one operator on one kind of device ("cuda" or any other, which counts as a CPU)."""
    cost = COSTS["cuda" if device == "cuda" else "cpu"]
    lengths = fft_lengths(rows, columns)
    size = lengths[0] * lengths[1]
    digit = cost.power_of_two if all(n & (n - 1) == 0 for n in lengths) else cost.other_length
    # The transpose makes as many values as the padded picture has: far more than the outputs of "valid".
    margin = (rows.outputs + rows.taps - 1) * (columns.outputs + columns.taps - 1)
    times: dict[Method, float] = {
        "direct": (rows.outputs * columns.outputs + margin) / 2 * (cost.fixed + cost.tap * rows.taps * columns.taps),
        "fft": size * log2(max(size, 2)) * digit,
    }
    if rank_one:
        p, q, w = rows.outputs, columns.outputs, columns.size
        stencil = sweep_on_cpu(p, q, w, rows.taps, columns.taps, max(0, q - columns.taps + 1))
        if device == "cuda":
            stencil = p * q * cost.tap * (rows.taps + columns.taps) if "separable_stencil" in ON_GPU else inf
        times["separable"] = min(cost.column * p * w * (rows.size + q), stencil)
    return min(times, key=lambda method: times[method])


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of every channel with its kernel, without boundary: (n, c, h, w) and (1 or c, kh, kw)."""
    n, c, h, w = x.shape
    weight = kernel.expand(c, -1, -1)[:, None].repeat(n, 1, 1, 1)
    # All pictures as groups of one: ten times faster on a CPU than groups of channels. One group alone would go to
    # cuDNN, which rounds to TF32 by default; two never do.
    groups = x.reshape(1, n * c, h, w)
    if n * c == 1 and x.is_cuda:
        groups, weight = groups.expand(1, 2, h, w), weight.expand(2, -1, -1, -1)
    y = conv2d(groups, weight, groups=groups.shape[1])
    return y[:, : n * c].reshape(n, c, *y.shape[-2:])


def direct(x: Tensor, kernel: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Convolution by its definition."""
    return correlate(pad(x, rows, columns), kernel.flip(-2, -1))


def direct_adjoint(y: Tensor, kernel: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Transpose of `direct`: correlation over the padded picture, whose margins then fold back."""
    # Zeros are laid round the picture here: a convolution that pads by itself takes twenty times as long on a CPU.
    widths = (columns.taps - 1, columns.taps - 1, rows.taps - 1, rows.taps - 1)
    p = correlate(torch.nn.functional.pad(y, widths), kernel)
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


def fourier(x: Tensor, spectra: Spectra, rows: Axis, columns: Axis) -> Tensor:
    """Convolution as a product with the kernel's `spectrum`, given with its conjugate."""
    return _blocked(x, spectra, rows, columns, transpose=False)


def fourier_adjoint(y: Tensor, spectra: Spectra, rows: Axis, columns: Axis) -> Tensor:
    """Transpose of `fourier`: crops and zero-fills exchanged, and the conjugate spectrum."""
    return _blocked(y, spectra, rows, columns, transpose=True)


def _blocked(x: Tensor, spectra: Spectra, rows: Axis, columns: Axis, *, transpose: bool) -> Tensor:
    if x.device.type != "cpu" or len(x) * x.shape[1] <= 2 * _block(rows, columns) or chosen() == "reference":
        return _transpose(x, spectra[1], rows, columns) if transpose else _forward(x, spectra[0], rows, columns)
    if plain(x):
        return _in_blocks(x, spectra, rows, columns, transpose=transpose)
    sizes = [rows.size, rows.taps, columns.size, columns.taps]
    result: Tensor = _operation(x, list(spectra), sizes, rows.boundary, transpose)
    return result


def _forward(x: Tensor, response: Tensor, rows: Axis, columns: Axis) -> Tensor:
    lengths = fft_lengths(rows, columns)
    z = _mirrored(x, rows, columns, lengths) if rows.boundary == "reflect" else x
    y: Tensor = torch.fft.irfft2(torch.fft.rfft2(z, s=lengths).mul_(response), s=lengths)
    return y[..., : rows.outputs, : columns.outputs].contiguous()


def _mirrored(x: Tensor, rows: Axis, columns: Axis, lengths: tuple[int, int]) -> Tensor:
    """Pad by mirroring, up to the transform's lengths where that is possible, which saves a copy into zeros."""
    axes = tuple(zip((columns, rows), lengths[::-1], strict=True))
    widths = [(a.pads[0], min(n - a.size - a.pads[0], a.size - 1)) for a, n in axes]
    return torch.nn.functional.pad(x, [*widths[0], *widths[1]], mode="reflect")


def _transpose(y: Tensor, conjugate: Tensor, rows: Axis, columns: Axis) -> Tensor:
    lengths = fft_lengths(rows, columns)
    z: Tensor = torch.fft.irfft2(torch.fft.rfft2(y, s=lengths).mul_(conjugate), s=lengths)
    if rows.boundary != "reflect":
        return z[..., : rows.size, : columns.size].contiguous()
    p = z[..., : rows.size + rows.taps - 1, : columns.size + columns.taps - 1]
    return columns.fold(rows.fold(p, 2), 3).contiguous()


def _block(rows: Axis, columns: Axis) -> int:
    """Planes of some four million bytes: fresh memory for larger transforms costs more than the transforms."""
    lengths = fft_lengths(rows, columns)
    return max(torch.get_num_threads(), 2**20 // (lengths[0] * lengths[1]))


def _in_blocks(x: Tensor, spectra: Spectra, rows: Axis, columns: Axis, *, transpose: bool) -> Tensor:
    """Transform some planes at a time: twice as fast as all at once for 48 planes of 256 x 256."""
    n, c = x.shape[:2]
    apply, spectrum = (_transpose, spectra[1]) if transpose else (_forward, spectra[0])
    out = x.new_empty(n, c, *_out(rows, columns, transpose=transpose))
    step, a, b = _block(rows, columns), x, out
    if len(spectrum) == 1:  # one kernel for all: any planes will do
        a, b = x.reshape(n * c, 1, *x.shape[2:]), out.view(n * c, 1, *out.shape[2:])
    each = max(1, step // a.shape[1])
    for part, result in zip(torch.split(a, each), torch.split(b, each), strict=True):
        result.copy_(apply(part, spectrum, rows, columns))
    return out


def _axes(sizes: list[int], boundary: str) -> tuple[Axis, Axis]:
    known = cast(Boundary, boundary)
    return Axis(sizes[0], sizes[1], known), Axis(sizes[2], sizes[3], known)


def _out(rows: Axis, columns: Axis, *, transpose: bool) -> tuple[int, int]:
    return (rows.size, columns.size) if transpose else (rows.outputs, columns.outputs)


@torch.library.custom_op("invdiff::fourier", mutates_args=())
def _operation(x: Tensor, spectra: list[Tensor], sizes: list[int], boundary: str, transpose: bool) -> Tensor:
    return _in_blocks(x, (spectra[0], spectra[1]), *_axes(sizes, boundary), transpose=transpose)


@_operation.register_fake
def _(x: Tensor, spectra: list[Tensor], sizes: list[int], boundary: str, transpose: bool) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:2], *_out(*_axes(sizes, boundary), transpose=transpose))


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, ctx.spectra, ctx.sizes, ctx.boundary, ctx.transpose = inputs


def _backward(ctx, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    transposed = _operation(gradient, ctx.spectra, ctx.sizes, ctx.boundary, not ctx.transpose)
    return transposed, [None, None], None, None, None


_operation.register_autograd(_backward, setup_context=_setup)


@_operation.register_vmap
def _(info, axes, x, *rest):  # type: ignore[no-untyped-def]
    return _operation(x.movedim(axes[0], 0).flatten(0, 1), *rest).unflatten(0, (info.batch_size, -1)), 0
