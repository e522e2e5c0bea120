r"""Whole trajectories of viscous Burgers' equation, u_t + (u^2 / 2)_x = nu u_xx + f, in one call.

The scheme is that of `kernels.burgers_trajectory.scheme`: cell averages, fourth order in space and time, forcing
constant in cells and windows of time. The gradient is the exact adjoint of the discrete scheme, with the states at the
windows' starts as checkpoints.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import version
from invdiff.kernels.burgers_trajectory import reference

__all__ = ["burgers_trajectory"]


def burgers_trajectory(
    u: Float[Tensor, "n cells"],
    f: Float[Tensor, "n windows points"],
    h: float,
    nu: float,
    window: float,
    *,
    steps: int = 0,
    periodic: bool = False,
) -> tuple[Float[Tensor, "n states cells"], Int64[Tensor, "n windows"]]:
    """Solve from averages in cells, under forcing that is constant in each window of time.

    Differentiable once by the initial averages and the forcing; the number of steps is taken as constant.

    Parameters
    ----------
    u
        Averages at the start, units of speed; float32 or float64.
    f
        Forcing, units of speed over time. Each of its points forces an equal number of neighbouring cells.
    h, nu, window
        Width of a cell, viscosity, and length of a window; positive, in units that agree.
    steps
        Steps of every window; 0 takes what stability asks for, for each trajectory and window.
    periodic
        Periodic ends, or walls with u = 0.

    Returns
    -------
    tuple of Tensor
        Averages at the start and at each window's end, (n, windows + 1, cells), and the steps that were taken.

    Raises
    ------
    ShapeError
        If the shapes do not fit: as many trajectories, at least four cells, a multiple of the forcing's points.
    InputError
        If dtypes or devices differ, or a number is out of range.
    """
    if u.ndim != 2 or f.ndim != 3 or len(u) != len(f) or u.shape[1] < 4 or f.shape[2] < 1 or u.shape[1] % f.shape[2]:
        raise ShapeError(
            "Averages are (n, cells) and forcing (n, windows, points), with at least 4 cells and a multiple of the "
            f"points; got {tuple(u.shape)} and {tuple(f.shape)}."
        )
    if u.dtype != f.dtype or u.device != f.device or u.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"State and forcing share a device and float32 or float64, got {u.dtype} on {u.device} and {f.dtype} on "
            f"{f.device}."
        )
    if not min(h, nu, window) > 0.0 or steps < 0:
        raise InputError(f"Width, viscosity and window are positive, got {h}, {nu} and {window}, and steps={steps}.")
    if version("burgers_trajectory", u) != "reference":
        result: tuple[Tensor, Tensor] = _operation(u, f, h, nu, window, steps, periodic)
        return result
    return reference.burgers_trajectory(u, f, h, nu, window, steps, periodic)


@torch.library.custom_op("invdiff::burgers_trajectory", mutates_args=())
def _operation(
    u: Tensor, f: Tensor, h: float, nu: float, window: float, steps: int, periodic: bool
) -> tuple[Tensor, Tensor]:
    if u.is_cuda:
        from invdiff.kernels.burgers_trajectory import gpu

        return gpu.burgers_trajectory(u, f, h, nu, window, steps, periodic)
    from invdiff.kernels.burgers_trajectory import cpu

    return cpu.burgers_trajectory(u, f, h, nu, window, steps, periodic)


@_operation.register_fake
def _(u, f, h, nu, window, steps, periodic):  # type: ignore[no-untyped-def]  # noqa: ARG001
    n, windows, _ = f.shape
    return u.new_empty(n, windows + 1, u.shape[1]), u.new_empty(n, windows, dtype=torch.int64)


@torch.library.custom_op("invdiff::burgers_adjoint", mutates_args=())
def _adjoint(
    states: Tensor, f: Tensor, counts: Tensor, bar: Tensor, h: float, nu: float, window: float, periodic: bool
) -> tuple[Tensor, Tensor]:
    if states.is_cuda:
        from invdiff.kernels.burgers_trajectory import gpu

        return gpu.adjoint(states, f, counts, bar, h, nu, window, periodic)
    from invdiff.kernels.burgers_trajectory import cpu

    return cpu.adjoint(states, f, counts, bar, h, nu, window, periodic)


@_adjoint.register_fake
def _(states, f, counts, bar, h, nu, window, periodic):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return torch.empty_like(states[:, 0]), torch.empty_like(f)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, f, h, nu, window, _, periodic = inputs
    states, counts = output
    ctx.save_for_backward(states, f, counts)
    ctx.numbers = (h, nu, window, periodic)
    ctx.mark_non_differentiable(counts)


def _backward(ctx, bar: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    u_bar, f_bar = _adjoint(*ctx.saved_tensors, bar, *ctx.numbers)
    return u_bar, f_bar, None, None, None, None, None


_operation.register_autograd(_backward, setup_context=_setup)
