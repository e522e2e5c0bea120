"""Wavelet filter banks along one axis: a signal into its low and high band, and the bands into a signal.

A `Bank` is a sparse matrix M of shape (2 m, N) that holds the filters and the boundary. `split` applies M and `merge`
its transpose, so the gradient of one is the other. With the analysis bank of a wavelet `split` is the forward transform
and `merge` its adjoint; with the synthesis bank `merge` is the inverse transform and `split` its adjoint. For
orthogonal wavelets with the mode "periodization" and an even length the two banks are equal.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.wavelet import reference
from invdiff.kernels.wavelet.filters import Mode, Triplets, check_mode, coefficients, filter_bank, matrices
from invdiff.kernels.wavelet.taps import merge_run, split_run, taps

__all__ = ["Bank", "Mode", "banks", "check_mode", "coefficients", "filter_bank", "merge", "split"]


@final
@dataclass(frozen=True)
class Bank:
    """A filter bank for signals of one length, dtype and device; made by `banks`.

    Parameters
    ----------
    length
        Values N of a signal.
    size
        Coefficients m of a band.
    forward, transposed
        Tables of M and of its transpose: inputs of each output, their weights, their number, and the outputs that
        share a stencil.
    dense
        M written out, (2 m, N), where it is small, else None.
    """

    length: int
    size: int
    forward: list[Tensor]
    transposed: list[Tensor]
    dense: Tensor | None


def banks(length: int, wavelet: str, mode: Mode, dtype: torch.dtype, device: torch.device) -> tuple[Bank, Bank]:
    """Make the analysis and the synthesis bank of a wavelet.

    They are made on the CPU and wait for the device, so make them once.

    Parameters
    ----------
    length
        Values of a signal, at least one.
    wavelet
        Name of an orthogonal or biorthogonal wavelet of PyWavelets.
    mode
        What lies beyond the ends, as PyWavelets names it; see `filters.Mode`.
    dtype, device
        Of the signals; floating.

    Raises
    ------
    CatalogueError
        If there is no such wavelet or mode; the message holds the nearest names.
    InputError
        If the dtype is not floating, or the length not positive.
    """
    if not dtype.is_floating_point:
        raise InputError(f"Wavelets take floating-point signals, got {dtype}; convert them, e.g. with x.float().")
    m, analysis, synthesis = matrices(length, wavelet, mode)
    return _bank(length, m, analysis, dtype, device), _bank(length, m, synthesis, dtype, device)


def _bank(length: int, m: int, triplets: Triplets, dtype: torch.dtype, device: torch.device) -> Bank:
    rows, columns, values = triplets
    index, weights, count = taps(triplets, 2 * m, length)
    forward = [index, weights, count, torch.tensor(split_run(index, weights, count))]
    index, weights, count = taps((columns, rows, values), length, 2 * m)
    transposed = [index, weights, count, torch.tensor(merge_run(index, weights, count))]
    dense = None
    if 2 * m * length <= reference.DENSE:
        dense = torch.zeros(2 * m, length, dtype=torch.float64).index_put_((rows, columns), values, accumulate=True)

    def ready(t: Tensor) -> Tensor:
        return t.to(device, dtype if t.is_floating_point() else None)

    return Bank(
        length, m, [ready(t) for t in forward], [ready(t) for t in transposed], dense if dense is None else ready(dense)
    )


def split(x: Float[Tensor, "o d length i"], bank: Bank) -> Float[Tensor, "o 2 d m i"]:
    """Apply a bank's matrix along the third axis: the low and the high band of signals.

    Differentiable any number of times.

    Parameters
    ----------
    x
        Signals of the bank's length, dtype and device, any strides; any unit.

    Raises
    ------
    ShapeError
        If the signals have another length.
    InputError
        If dtype or device differ from the bank's.
    """
    if x.ndim != 4 or x.shape[2] != bank.length:
        raise ShapeError(f"Signals must be (o, d, {bank.length}, i), got {tuple(x.shape)}.")
    return _call(x, bank, split=True)


def merge(c: Float[Tensor, "o 2 d m i"], bank: Bank) -> Float[Tensor, "o d length i"]:
    """Apply the transpose of a bank's matrix: signals of a low and a high band.

    Differentiable any number of times.

    Parameters
    ----------
    c
        Coefficients of the bank's size, dtype and device, any strides; any unit.

    Raises
    ------
    ShapeError
        If the coefficients have another size.
    InputError
        If dtype or device differ from the bank's.
    """
    if c.ndim != 5 or c.shape[1] != 2 or c.shape[3] != bank.size:
        raise ShapeError(f"Coefficients must be (o, 2, d, {bank.size}, i), got {tuple(c.shape)}.")
    return _call(c, bank, split=False)


def _call(x: Tensor, bank: Bank, *, split: bool) -> Tensor:
    weights = bank.forward[1]
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"The filter bank is {weights.dtype} on {weights.device}, the values {x.dtype} on {x.device}; "
            "make a bank for them."
        )
    chosen = version("wavelet", x)
    if chosen == "reference" or (chosen == "cpu" and x.dtype not in (torch.float32, torch.float64)):
        if split:
            return reference.split(x, bank.forward, bank.dense)
        return reference.merge(x, bank.transposed, None if bank.dense is None else bank.dense.mT)
    if plain(x):
        return _run(x, bank.forward if split else bank.transposed, bank.size if split else bank.length, split=split)
    result: Tensor = _bank_operation(x, bank.forward, bank.transposed, bank.length, bank.size, split)
    return result


def _run(x: Tensor, tables: list[Tensor], outputs: int, *, split: bool) -> Tensor:
    if x.is_cuda:
        from invdiff.kernels.wavelet import gpu

        return gpu.split(x, tables, outputs) if split else gpu.merge(x, tables, outputs)
    from invdiff.kernels.wavelet import cpu

    return cpu.split(x, tables, outputs) if split else cpu.merge(x, tables, outputs)


@torch.library.custom_op("invdiff::wavelet", mutates_args=())
def _bank_operation(
    x: Tensor, forward: list[Tensor], transposed: list[Tensor], length: int, size: int, split: bool
) -> Tensor:
    return _run(x, forward if split else transposed, size if split else length, split=split)


@_bank_operation.register_fake
def _(x: Tensor, forward: list[Tensor], transposed: list[Tensor], length: int, size: int, split: bool) -> Tensor:  # noqa: ARG001
    if split:
        o, d, _, inner = x.shape
        return x.new_empty(o, 2, d, size, inner)
    o, _, d, _, inner = x.shape
    return x.new_empty(o, d, length, inner)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, forward, transposed, length, size, split = inputs
    ctx.bank, ctx.split = Bank(length, size, forward, transposed, None), split


def _backward(ctx, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    bank = ctx.bank
    back = _call(gradient, bank, split=not ctx.split)
    return back, [None] * len(bank.forward), [None] * len(bank.transposed), None, None, None


_bank_operation.register_autograd(_backward, setup_context=_setup)


@_bank_operation.register_vmap
def _(info, axes, x, forward, transposed, length, size, split):  # type: ignore[no-untyped-def]
    x = x.movedim(axes[0], 0)
    y = _bank_operation(x.flatten(0, 1), forward, transposed, length, size, split)
    return y.unflatten(0, (info.batch_size, -1)), 0
