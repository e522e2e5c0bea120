r"""Viscous Burgers' equation in one dimension, forced in space and time.

    u_t + (u^2 / 2)_x = nu u_xx + f(x, t)     on (0, length),

with u = 0 at both ends, or periodic. State and forcing live on a control grid: a state is its averages in `points`
cells, and the forcing is constant in each cell and in each of `windows` equal windows of time, in data, in control and
in evaluation alike, so that nobody's forcing is interpolated by somebody else. The solver's own cells are `refine`
times finer. The scheme is that of `kernels.burgers_trajectory`.

The initial averages are refined by polynomials of degree four through the averages of five cells, which keep each
cell's average; beyond walls the state is continued oddly.
"""

from functools import cache
from math import ceil
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError, SolverError
from invdiff.kernels.burgers_trajectory import burgers_trajectory
from invdiff.kernels.burgers_trajectory.scheme import least_rate

Boundary = Literal["wall", "periodic"]


@cache
def _reconstruction(refine: int) -> Tensor:
    """Averages of a cell's parts from those of five cells around it, (refine, 5), float64."""
    # A polynomial sum_k c_k x^k has the average (b^(k+1) - a^(k+1)) / ((k + 1) (b - a)) on [a, b].
    k = torch.arange(1, 6, dtype=torch.float64)

    def averages(edges: Tensor) -> Tensor:
        a, b = edges[:-1, None], edges[1:, None]
        return (b**k - a**k) / (k * (b - a))

    cells = averages(torch.arange(-2.5, 3.0, dtype=torch.float64))
    parts = averages(torch.linspace(-0.5, 0.5, refine + 1, dtype=torch.float64))
    table: Tensor = torch.linalg.solve(cells.mT, parts.mT).mT
    return table


@final
class Burgers(nn.Module):
    """Solver of Burgers' equation on a control grid.

    Parameters
    ----------
    points
        Cells of the control grid, at least 5.
    windows
        Windows of constant forcing.
    duration
        Time that all windows take together.
    viscosity
        nu, positive.
    length
        Of the interval.
    boundary
        "wall", u = 0 at both ends, or "periodic".
    refine
        The solver's cells in a cell of the control grid.
    steps
        Steps of every window; if None as many as are stable, by grid and state, for each trajectory and window.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    def __init__(
        self,
        points: int,
        windows: int,
        duration: float,
        *,
        viscosity: float = 0.01,
        length: float = 1.0,
        boundary: Boundary = "wall",
        refine: int = 2,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        if points < 5 or min(windows, refine) < 1 or (steps is not None and steps < 1):
            raise InputError(
                "A control grid has at least 5 points, and windows, refine and steps are at least 1; got "
                f"points={points}, windows={windows}, refine={refine}, steps={steps}."
            )
        if not min(duration, viscosity, length) > 0.0:
            raise InputError(f"duration, viscosity and length are positive, got {duration}, {viscosity} and {length}.")
        if boundary not in ("wall", "periodic"):
            raise InputError(f"boundary is 'wall' or 'periodic', got {boundary!r}.")
        self.points, self.windows, self.duration, self.viscosity = points, windows, duration, viscosity
        self.length, self.boundary, self.refine, self.steps = length, boundary, refine, steps
        self.window, self.width = duration / windows, length / (points * refine)

    def extra_repr(self) -> str:
        """Return the grid."""
        return f"{self.points} points, {self.windows} windows of {self.window:g}, refine={self.refine}, {self.boundary}"

    def refined(self, initial: Float[Tensor, "n points"]) -> Float[Tensor, "n cells"]:
        """Averages in the solver's cells."""
        if self.refine == 1:
            return initial
        if self.boundary == "periodic":
            padded = torch.cat((initial[:, -2:], initial, initial[:, :2]), 1)
        else:
            padded = torch.cat((-initial[:, :2].flip(1), initial, -initial[:, -2:].flip(1)), 1)
        table = _reconstruction(self.refine).to(initial)
        return (padded.unfold(1, 5, 1) @ table.mT).flatten(1)

    def forward(
        self, initial: Float[Tensor, "n points"], forcing: Float[Tensor, "n windows points"]
    ) -> Float[Tensor, "n states points"]:
        """Averages at the start and at the end of every window, (n, windows + 1, points).

        Differentiable once by both.

        Parameters
        ----------
        initial
            Averages at the start, units of speed.
        forcing
            Units of speed over time.

        Raises
        ------
        ShapeError
            If they do not have the grid's shape.
        SolverError
            If a solution is not finite: the message says of which trajectory, when and where.
        InputError
            If `steps` was given and is too few to be stable.
        """
        n = len(initial)
        if tuple(initial.shape) != (n, self.points) or tuple(forcing.shape) != (n, self.windows, self.points):
            raise ShapeError(
                f"This solver takes states (n, {self.points}) and forcing (n, {self.windows}, {self.points}), got "
                f"{tuple(initial.shape)} and {tuple(forcing.shape)}."
            )
        states, _ = burgers_trajectory(
            self.refined(initial),
            forcing,
            self.width,
            self.viscosity,
            self.window,
            steps=self.steps or 0,
            periodic=self.boundary == "periodic",
        )
        self._check(states.detach(), forcing.detach())
        return states.reshape(n, self.windows + 1, self.points, self.refine).mean(-1)

    def _check(self, states: Tensor, forcing: Tensor) -> None:
        """Raise if a window's steps were too few, or a state is not finite."""
        bad = ~torch.isfinite(states).all(-1)
        late = bad.any(0).nonzero()
        if self.steps is not None and states.numel():
            whole = states[:, : max(1, int(late[0])) if len(late) else self.windows]
            push = forcing[:, : whole.shape[1]].abs().amax(-1)
            fastest = float((whole.abs().amax(-1) + self.window * push).max())
            rate = least_rate(fastest, self.width, self.viscosity)
            if self.steps < self.window * rate:
                raise InputError(
                    f"steps={self.steps} makes steps of {self.window / self.steps:.3g}, and speeds of {fastest:.3g} on "
                    f"cells of {self.width:.3g} are stable up to {1.0 / rate:.3g}; take "
                    f"steps={ceil(self.window * rate)} or more, or None."
                )
        if len(late):
            t = int(late[0])
            case = int(bad[:, t].nonzero()[0])
            cell = int((~torch.isfinite(states[case, t])).nonzero()[0])
            raise SolverError(
                f"The solution of trajectory {case} is not finite at time {t * self.window:.4g}, first at x = "
                f"{(cell + 0.5) * self.width:.4g}. Check state and forcing for values that are too large or not finite."
            )
