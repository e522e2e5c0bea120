r"""Compressible Navier-Stokes equations in one dimension; without viscosity, Euler's.

    rho_t + (rho u)_x = 0,
    (rho u)_t + (rho u^2 + p)_x = tau_x,
    E_t + ((E + p) u)_x = (tau u)_x,     E = p / (gamma - 1) + rho u^2 / 2,     tau = (zeta + 4 eta / 3) u_x,

as PDEBench states them (Takamoto et al. 2022, arXiv 2210.07182): a calorically perfect gas with shear and
bulk viscosity and no conduction of heat. States are density, velocity and pressure of the averages of density, momentum
and energy in `points` equal cells. The scheme is that of `kernels.flow_trajectory`: second order where the solution is
smooth, no new oscillations at shocks and contacts.
"""

from math import ceil
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError, SolverError
from invdiff.kernels.flow_trajectory import flow_trajectory
from invdiff.kernels.flow_trajectory.scheme import BOUNDARIES, LIMIT, Boundary


def conserved(primitive: Float[Tensor, "*n 3 points"], gamma: float) -> Float[Tensor, "*n 3 points"]:
    """Density, momentum and energy of density, velocity and pressure."""
    rho, u, p = primitive.unbind(-2)
    return torch.stack((rho, rho * u, p / (gamma - 1.0) + 0.5 * rho * u * u), -2)


def primitive(conserved: Float[Tensor, "*n 3 points"], gamma: float) -> Float[Tensor, "*n 3 points"]:
    """Density, velocity and pressure of density, momentum and energy."""
    rho, m, E = conserved.unbind(-2)
    u = m / rho
    return torch.stack((rho, u, (gamma - 1.0) * (E - 0.5 * m * u)), -2)


@final
class CompressibleFlow(nn.Module):
    """Solver of compressible flow on a grid of equal cells.

    Parameters
    ----------
    points
        Cells, at least 2.
    states
        Outputs at equally spaced times from 0 to `duration`, both among them; at least 2.
    duration
        Time of the last output.
    gamma
        Ratio of specific heats, above 1.
    eta, zeta
        Shear and bulk viscosity, mass over length and time; at least 0.
    length
        Of the interval.
    boundary
        "outflow", the last cell's state beyond the ends (waves leave), "periodic", or "wall", where u = 0.
    steps
        Steps between two outputs; if None as many as stability asks for, by grid and state, for each trajectory.

    Raises
    ------
    InputError
        If a setting is out of range.
    """

    def __init__(
        self,
        points: int,
        states: int,
        duration: float,
        *,
        gamma: float = 5.0 / 3.0,
        eta: float = 1e-8,
        zeta: float = 1e-8,
        length: float = 1.0,
        boundary: Boundary = "outflow",
        steps: int | None = None,
    ) -> None:
        super().__init__()
        if min(points, states) < 2 or (steps is not None and steps < 1):
            raise InputError(
                "A grid has at least 2 points, there are at least 2 states and at least 1 step between them; got "
                f"points={points}, states={states}, steps={steps}."
            )
        if not (min(duration, length) > 0.0 and gamma > 1.0 and min(eta, zeta) >= 0.0):
            raise InputError(
                "duration and length are positive, gamma is above 1, eta and zeta are at least 0; got "
                f"{duration}, {length}, {gamma}, {eta} and {zeta}."
            )
        if boundary not in BOUNDARIES:
            raise InputError(f"boundary is 'outflow', 'periodic' or 'wall', got {boundary!r}.")
        self.points, self.states, self.duration, self.gamma = points, states, duration, gamma
        self.eta, self.zeta, self.length, self.boundary, self.steps = eta, zeta, length, boundary, steps
        self.window, self.width = duration / (states - 1), length / points

    def extra_repr(self) -> str:
        """Return the grid."""
        return f"{self.points} points, {self.states} states to {self.duration:g}, gamma={self.gamma:g}, {self.boundary}"

    def forward(self, initial: Float[Tensor, "n 3 points"]) -> Float[Tensor, "n states 3 points"]:
        """Density, velocity and pressure at all outputs.

        Differentiable once, by the exact adjoint of the discrete scheme.

        Parameters
        ----------
        initial
            Density, velocity and pressure at the start, in units that agree (pressure is density times velocity
            squared); density and pressure are positive.

        Raises
        ------
        ShapeError
            If it does not have the grid's shape.
        InputError
            If a density or pressure is not positive, a value is not finite, or `steps` was given and is too few to be
            stable.
        SolverError
            If density or pressure stops being positive, or a value finite: the message says of which trajectory, when
            and where.
        """
        if tuple(initial.shape) != (len(initial), 3, self.points):
            raise ShapeError(f"This solver takes states (n, 3, {self.points}), got {tuple(initial.shape)}.")
        given = initial.detach()
        bad = ~(torch.isfinite(given).all(1) & (given[:, 0] > 0.0) & (given[:, 2] > 0.0))
        if bool(bad.any()):
            case, cell = bad.nonzero()[0].tolist()
            rho, u, p = given[case, :, cell].tolist()
            raise InputError(
                f"Density and pressure are positive and all values finite; trajectory {case} has density {rho:.4g}, "
                f"velocity {u:.4g} and pressure {p:.4g} at x = {(cell + 0.5) * self.width:.4g}."
            )
        states, _ = flow_trajectory(
            conserved(initial, self.gamma),
            self.width,
            self.window,
            self.states - 1,
            gamma=self.gamma,
            mu=self._mu,
            steps=self.steps or 0,
            boundary=self.boundary,
        )
        found = primitive(states, self.gamma)
        self._check(found.detach())
        return found

    @property
    def _mu(self) -> float:
        return self.zeta + 4.0 * self.eta / 3.0

    def _check(self, states: Tensor) -> None:
        """Raise if steps were too few, or a state is not one of a gas."""
        bad = ~(torch.isfinite(states).all(2) & (states[:, :, 0] > 0.0) & (states[:, :, 2] > 0.0))
        late = bad.any(-1).any(0).nonzero()
        if self.steps is not None and states.numel():
            rho, u, p = states[:, : max(1, int(late[0])) if len(late) else self.states - 1].unbind(2)
            rate = float((u.abs() + (self.gamma * p / rho).sqrt() + 2.0 * self._mu / (rho * self.width)).max())
            rate /= self.width
            if self.steps * LIMIT < self.window * rate:
                raise InputError(
                    f"steps={self.steps} makes steps of {self.window / self.steps:.3g}, and signals of speed "
                    f"{rate * self.width:.3g} on cells of {self.width:.3g} are stable up to {LIMIT / rate:.3g}; take "
                    f"steps={ceil(self.window * rate / LIMIT)} or more, or None."
                )
        if len(late):
            t = int(late[0])
            case = int(bad[:, t].any(-1).nonzero()[0])
            cell = int(bad[case, t].nonzero()[0])
            raise SolverError(
                f"Density or pressure of trajectory {case} is not positive, or not finite, before time "
                f"{t * self.window:.4g}, first at x = {(cell + 0.5) * self.width:.4g}. States that near a vacuum, or "
                "values too large for the precision, do that; check the initial state, or take float64."
            )
