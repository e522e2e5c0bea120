r"""Whole trajectories of compressible flow in one dimension in one call.

The scheme is that of `kernels.flow_trajectory.scheme`: averages of density, momentum and energy, second order in space
and time, HLLC fluxes. The gradient is the exact adjoint of the discrete scheme, with the outputs as checkpoints: on a
CPU written out by hand and compiled; after the Triton version by autograd of the reference, a window at a time.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import version
from invdiff.kernels.flow_trajectory import reference
from invdiff.kernels.flow_trajectory.scheme import BOUNDARIES, Boundary

__all__ = ["flow_trajectory"]


def flow_trajectory(
    U: Float[Tensor, "n 3 cells"],
    h: float,
    window: float,
    windows: int,
    *,
    gamma: float,
    mu: float = 0.0,
    steps: int = 0,
    boundary: Boundary = "outflow",
) -> tuple[Float[Tensor, "n states 3 cells"], Int64[Tensor, "n windows"]]:
    """Solve from averages in cells.

    Differentiable once by the initial averages; the number of steps is taken as constant. Where a limiter, a signal's
    speed or the side of a contact switches, the gradient is that of one of the two pieces; where a state is uniform the
    slopes count as constant, and it is that of the scheme of first order.

    Parameters
    ----------
    U
        Averages of density, momentum and energy at the start, in units that agree; float32 or float64.
    h, window
        Width of a cell and time between two outputs; positive.
    windows
        Outputs after the first; at least 0.
    gamma
        Ratio of specific heats, above 1.
    mu
        zeta + 4 eta / 3, the viscosity of compression; at least 0.
    steps
        Steps between two outputs; 0 takes what stability asks for, for each trajectory and window.
    boundary
        "outflow", "periodic" or "wall".

    Returns
    -------
    tuple of Tensor
        Averages at the start and at each window's end, (n, windows + 1, 3, cells), and the steps that were taken. A
        trajectory that meets density or pressure not positive has NaN in those cells at the next output, and in all
        cells after it.

    Raises
    ------
    ShapeError
        If the state is not (n, 3, cells) with at least two cells.
    InputError
        If dtype or a number is out of range.
    """
    if U.ndim != 3 or U.shape[1] != 3 or U.shape[2] < 2:
        raise ShapeError(f"Averages are (n, 3, cells) with at least 2 cells, got {tuple(U.shape)}.")
    if U.dtype not in (torch.float32, torch.float64):
        raise InputError(f"Averages are float32 or float64, got {U.dtype}.")
    if not (min(h, window) > 0.0 and gamma > 1.0 and mu >= 0.0) or min(windows, steps) < 0:
        raise InputError(
            "Width and window are positive, gamma is above 1, mu, windows and steps are at least 0; got "
            f"h={h}, window={window}, gamma={gamma}, mu={mu}, windows={windows}, steps={steps}."
        )
    if boundary not in BOUNDARIES:
        raise InputError(f"boundary is 'outflow', 'periodic' or 'wall', got {boundary!r}.")
    if version("flow_trajectory", U) == "reference":
        return reference.flow_trajectory(U, h, gamma, mu, window, windows, steps, boundary)
    result: tuple[Tensor, Tensor] = _operation(U, h, gamma, mu, window, windows, steps, boundary)
    return result


@torch.library.custom_op("invdiff::flow_trajectory", mutates_args=())
def _operation(
    U: Tensor, h: float, gamma: float, mu: float, window: float, windows: int, steps: int, boundary: str
) -> tuple[Tensor, Tensor]:
    if U.is_cuda:
        from invdiff.kernels.flow_trajectory import gpu

        return gpu.flow_trajectory(U, h, gamma, mu, window, windows, steps, boundary)
    from invdiff.kernels.flow_trajectory import cpu

    return cpu.flow_trajectory(U, h, gamma, mu, window, windows, steps, boundary)


@_operation.register_fake
def _(U, h, gamma, mu, window, windows, steps, boundary):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return U.new_empty(len(U), windows + 1, *U.shape[1:]), U.new_empty(len(U), windows, dtype=torch.int64)


@torch.library.custom_op("invdiff::flow_adjoint", mutates_args=())
def _adjoint(
    states: Tensor, counts: Tensor, bar: Tensor, h: float, gamma: float, mu: float, window: float, boundary: str
) -> Tensor:
    from invdiff.kernels.flow_trajectory import cpu

    return cpu.adjoint(states, counts, bar, h, gamma, mu, window, boundary)


@_adjoint.register_fake
def _(states, counts, bar, h, gamma, mu, window, boundary):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return torch.empty_like(states[:, 0])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, h, gamma, mu, window, _, _, boundary = inputs
    ctx.save_for_backward(*output)
    ctx.numbers = (h, gamma, mu, window, boundary)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, bar: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
    # On a GPU the windows are made again in plain PyTorch and undone by autograd.
    undo: Any = reference.adjoint if bar.is_cuda else _adjoint
    return undo(*ctx.saved_tensors, bar, *ctx.numbers), None, None, None, None, None, None, None


_operation.register_autograd(_backward, setup_context=_setup)
