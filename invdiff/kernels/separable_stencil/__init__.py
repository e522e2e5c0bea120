"""``Y = L X R^T`` for band matrices L and R: convolutions, decimations and zero insertions along rows and columns.

A matrix holds the boundary, the stride and the zeros between samples, so one kernel serves Gaussian blur, anti-aliased
down-sampling and the exact transpose of each, which is the same kernel with transposed tables.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.separable_stencil import reference
from invdiff.kernels.separable_stencil.bands import bands, periodic_run
from invdiff.kernels.separable_stencil.cost import cheaper_on_cpu, tile_on_gpu


@final
@dataclass(frozen=True)
class Tables:
    """What the kernel needs of both matrices on one device; made by `tables`.

    Parameters
    ----------
    left, right
        The matrices (c, p, h) and (c, q, w) in the dtype of the pictures.
    forward, transposed
        Their windows and those of their transposes; empty where the dense products are faster.
    """

    left: Tensor
    right: Tensor
    forward: list[Tensor]
    transposed: list[Tensor]

    @property
    def mT(self) -> "Tables":
        """Tables of the transposes."""
        return Tables(self.left.mT, self.right.mT, self.transposed, self.forward)


def tables(
    left: Float[Tensor, "c1 p h"], right: Float[Tensor, "c2 q w"], dtype: torch.dtype, device: torch.device
) -> Tables:
    """Make the tables of a pair of matrices, for pictures of one dtype on one device.

    They are made on the CPU and waits for the device, so make them once.

    Parameters
    ----------
    left, right
        Matrices in float64; c1 and c2 are 1, or the pictures' channels.
    dtype, device
        Of the pictures; floating.

    Raises
    ------
    InputError
        If the dtype is not floating.
    """
    if not dtype.is_floating_point:
        raise InputError(f"A stencil takes floating-point pictures, got {dtype}; convert them, e.g. with x.float().")
    L, R = left.detach().double().cpu(), right.detach().double().cpu()
    both = [_windows(L, R, dtype, device), _windows(L.mT, R.mT, dtype, device)]
    # A pair: autograd of one is the other, and a device is worth either both or none.
    forward, transposed = both if all(both) or device.type == "cpu" else ([], [])
    return Tables(left.to(device, dtype), right.to(device, dtype), forward, transposed)


def _windows(left: Tensor, right: Tensor, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    if device.type == "cpu" and dtype in (torch.float32, torch.float64):
        (left_first, left_weights), (right_first, right_weights) = bands(left), bands(right)
        run = periodic_run(right_first, right_weights[:, :, 0])
        if not cheaper_on_cpu(left, right, left_weights.shape[-1], right_weights.shape[-1], run):
            return []
        weights = [t[:, :, 0].to(dtype).contiguous() for t in (left_weights, right_weights)]
        return [left_first, weights[0], right_first, weights[1], torch.tensor(run)]
    if device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16):
        block = tile_on_gpu(left, right)
        if block is None:
            return []
        return [t.to(device) for side in (left, right) for t in _tiles(side, block)]
    return []


def _tiles(matrix: Tensor, block: int, align: int = 32) -> tuple[Tensor, Tensor]:
    first, weights = bands(matrix, block, align)
    return first, weights.float().contiguous()


def separable_stencil(x: Float[Tensor, "n c h w"], matrices: Tables) -> Float[Tensor, "n c p q"]:
    """Apply ``L X R^T`` to every channel of a batch of pictures.

    Differentiable any number of times. The dense products of the reference are taken where no faster way is known: for
    wide bands, for small pictures, and for other dtypes or devices than the tables are made for.

    Parameters
    ----------
    x
        Pictures of the tables' dtype and device, any strides.
    matrices
        Both matrices, from `tables`; ``matrices.mT`` applies the transposes.

    Raises
    ------
    ShapeError
        If the pictures do not fit the matrices.
    InputError
        If dtype or device differ from the tables'.
    """
    left, right = matrices.left, matrices.right
    if x.ndim != 4 or x.shape[-2] != left.shape[-1] or x.shape[-1] != right.shape[-1]:
        raise ShapeError(f"Pictures must be (n, c, {left.shape[-1]}, {right.shape[-1]}), got {tuple(x.shape)}.")
    if any(len(side) not in (1, x.shape[1]) for side in (left, right)):
        raise ShapeError(f"Matrices for {len(left)} and {len(right)} channels do not fit pictures of {x.shape[1]}.")
    if x.dtype != left.dtype or x.device != left.device:
        raise InputError(
            f"The stencil's tables are {left.dtype} on {left.device}, the pictures {x.dtype} on {x.device}; "
            "make tables for them."
        )
    if not matrices.forward or version("separable_stencil", x) == "reference":
        return reference.separable_stencil(x, left, right)
    if plain(x):
        return _run(x, left.shape[-2], right.shape[-2], matrices.forward)
    result: Tensor = _stencil(x, left, right, matrices.forward, matrices.transposed)
    return result


def _run(x: Tensor, rows: int, columns: int, forward: list[Tensor]) -> Tensor:
    if x.is_cuda:
        from invdiff.kernels.separable_stencil import gpu

        return gpu.separable_stencil(x, forward, rows, columns)
    from invdiff.kernels.separable_stencil import cpu

    return cpu.separable_stencil(x, forward, rows, columns)


@torch.library.custom_op("invdiff::separable_stencil", mutates_args=())
def _stencil(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    forward: list[Tensor],
    transposed: list[Tensor],  # noqa: ARG001  for the gradient
) -> Tensor:
    return _run(x, left.shape[-2], right.shape[-2], forward)


@_stencil.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, forward: list[Tensor], transposed: list[Tensor]) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:2], left.shape[-2], right.shape[-2])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # noqa: ARG001
    _, left, right, forward, transposed = inputs
    ctx.matrices = Tables(left, right, forward, transposed)


def _backward(ctx, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    matrices = ctx.matrices
    constants = [None] * len(matrices.forward), [None] * len(matrices.transposed)
    return separable_stencil(gradient, matrices.mT), None, None, *constants


_stencil.register_autograd(_backward, setup_context=_setup)


@_stencil.register_vmap
def _(info, axes, x, left, right, forward, transposed):  # type: ignore[no-untyped-def]
    x = x.movedim(axes[0], 0)
    y = _stencil(x.flatten(0, 1), left, right, forward, transposed)
    return y.unflatten(0, (info.batch_size, -1)), 0
