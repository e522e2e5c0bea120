"""``y_r = sum_e w_e x_(i_e)`` over the entries e of an output r: observation at scattered points, and its transpose.

Entries are sorted by output (CSR), so an output is one thread's sum in a fixed order: no atomics, and results repeat
bitwise. The transpose is the same kernel with the entries sorted by input.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.scattered import reference

_FEW = 8
"""Rows up to which the compiled CPU version is taken: for many, the reference sums all of them in vectors."""


@final
@dataclass(frozen=True)
class Tables:
    """Entries of a sparse matrix and of its transpose, sorted by output; made by `tables`.

    Parameters
    ----------
    forward, transposed
        For each: starts (outputs + 1,) int64, the entries' inputs (entries,) int64, and their weights (entries,).
    """

    forward: list[Tensor]
    transposed: list[Tensor]

    @property
    def mT(self) -> "Tables":
        """Tables of the transpose."""
        return Tables(self.transposed, self.forward)


def tables(
    index: Int[Tensor, "outputs k"], weights: Float[Tensor, "outputs k"], inputs: int, dtype: torch.dtype
) -> Tables:
    """Make the tables of a matrix with the same number of entries in each row.

    Parameters
    ----------
    index
        Inputs of each output, in [0, inputs); one may occur twice.
    weights
        Their weights; zeros are left out.
    inputs
        Number of inputs.
    dtype
        Of the pictures.
    """
    kept = weights != 0
    row = torch.arange(len(index), device=index.device)[:, None].expand_as(index)[kept]
    column, values = index[kept], weights[kept].to(dtype)
    order = column.argsort(stable=True)
    return Tables(
        [_starts(row, len(index)), column, values],
        [_starts(column, inputs), row[order], values[order]],
    )


def _starts(of: Tensor, count: int) -> Tensor:
    starts = torch.zeros(count + 1, dtype=torch.int64, device=of.device)
    starts[1:] = torch.bincount(of, minlength=count).cumsum(0)
    return starts


def gather_sum(x: Float[Tensor, "n inputs"], matrix: Tables) -> Float[Tensor, "n outputs"]:
    """Apply a sparse matrix to every row of a batch. Differentiable any number of times.

    Parameters
    ----------
    x
        Rows of the tables' dtype and device, any strides.
    matrix
        From `tables`; ``matrix.mT`` applies the transpose.

    Raises
    ------
    ShapeError
        If the rows do not fit the matrix.
    InputError
        If dtype or device differ from the tables'.
    """
    inputs, weights = len(matrix.transposed[0]) - 1, matrix.forward[2]
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ShapeError(f"Rows must be (n, {inputs}), got {tuple(x.shape)}.")
    if x.dtype != weights.dtype or x.device != weights.device:
        raise InputError(
            f"The tables are {weights.dtype} on {weights.device}, the rows {x.dtype} on {x.device}; "
            "make tables for them."
        )
    if plain(x):
        return _run(x, matrix.forward)
    result: Tensor = _operation(x, matrix.forward, matrix.transposed)
    return result


def _run(x: Tensor, forward: list[Tensor]) -> Tensor:
    chosen = version("scattered", x)
    if chosen == "gpu":
        from invdiff.kernels.scattered import gpu

        return gpu.gather_sum(x, *forward)
    if chosen == "cpu" and len(x) <= _FEW and x.dtype in (torch.float32, torch.float64):
        from invdiff.kernels.scattered import cpu

        return cpu.gather_sum(x, *forward)
    return reference.gather_sum(x, *forward)


@torch.library.custom_op("invdiff::scattered", mutates_args=())
def _operation(
    x: Tensor,
    forward: list[Tensor],
    transposed: list[Tensor],  # noqa: ARG001  for the gradient
) -> Tensor:
    return _run(x, forward)


@_operation.register_fake
def _(x: Tensor, forward: list[Tensor], transposed: list[Tensor]) -> Tensor:  # noqa: ARG001
    return x.new_empty(len(x), len(forward[0]) - 1)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    ctx.matrix = Tables(*inputs[1:])


def _backward(ctx, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    return gather_sum(gradient, ctx.matrix.mT), [None] * 3, [None] * 3


_operation.register_autograd(_backward, setup_context=_setup)


@_operation.register_vmap
def _(info, axes, x, forward, transposed):  # type: ignore[no-untyped-def]
    y = _operation(x.movedim(axes[0], 0).flatten(0, 1), forward, transposed)
    return y.unflatten(0, (info.batch_size, -1)), 0
