r"""Random cases of compressible flow: shock tubes, in the manner of PDEBench's set of shocks.

Two constant states meet at x_0 in (-1, 1), and waves may leave through the ends (Takamoto et al. 2022, arXiv
2210.07182: random densities, velocities, pressures and x_0; gamma = 5/3, eta = zeta = 1e-8). The ranges are chosen
here, and are not PDEBench's:

    rho ~ U(0.2, 2),   u ~ U(-1, 1),   p ~ U(0.5, 5),   x_0 ~ U(-0.5, 0.5),

so that no vacuum opens, and every case has an exact solution without viscosity (`riemann_solution`). A state is that of
the averages of density, momentum and energy in cells; the cell where the states meet has some of each.

Case i of a seed depends on the seed and i alone.
"""

from dataclasses import dataclass
from math import sqrt
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.event import Event, Variable
from invdiff.noise import Noise, stream_key
from invdiff.pde.flow import CompressibleFlow, conserved, primitive

Range = tuple[float, float]


@final
@dataclass(frozen=True, kw_only=True)
class ShockTubeSetting:
    """Grid and law of random shock tubes on (-1, 1).

    Parameters
    ----------
    points, states, duration, gamma
        As for `CompressibleFlow`. PDEBench has 1024 points.
    viscosity
        eta and zeta.
    steps
        Between two states, as for `CompressibleFlow`; if None as many as stability asks for.
    density, velocity, pressure, position
        Ranges of uniform laws.

    Raises
    ------
    InputError
        If a range is empty, density or pressure may be not positive, the position may be outside, or a vacuum may open.
    """

    points: int = 128
    states: int = 81
    duration: float = 0.4
    gamma: float = 5.0 / 3.0
    viscosity: float = 1e-8
    steps: int | None = None
    density: Range = (0.2, 2.0)
    velocity: Range = (-1.0, 1.0)
    pressure: Range = (0.5, 5.0)
    position: Range = (-0.5, 0.5)

    def __post_init__(self) -> None:
        ranges = (self.density, self.velocity, self.pressure, self.position)
        if not all(low <= high for low, high in ranges):
            raise InputError(f"A range is (low, high), got {ranges}.")
        if not (min(self.density[0], self.pressure[0]) > 0.0 and self.gamma > 1.0 and max(map(abs, self.position)) < 1):
            raise InputError(
                f"Density and pressure are positive, gamma is above 1 and the position in (-1, 1); got {self.density}, "
                f"{self.pressure}, {self.gamma} and {self.position}."
            )
        apart = 4.0 / (self.gamma - 1.0) * sqrt(self.gamma * self.pressure[0] / self.density[1])
        if not self.velocity[1] - self.velocity[0] < apart:
            raise InputError(
                f"Velocities in {self.velocity} may open a vacuum; with these densities and pressures they differ by "
                f"less than {apart:.4g}."
            )

    @classmethod
    def named(cls, name: str) -> "ShockTubeSetting":
        """Return a setting by name: "shock-tubes", the defaults, for there is no other yet.

        Raises
        ------
        CatalogueError
            If there is no such setting.
        """
        if name != "shock-tubes":
            raise CatalogueError.unknown("setting of compressible flow", name, ("shock-tubes",))
        return cls()

    def solver(self, refine: int = 1) -> CompressibleFlow:
        """Return a solver on this grid, or on one with `refine` cells in each of its cells, and as many more steps."""
        return CompressibleFlow(
            refine * self.points,
            self.states,
            self.duration,
            gamma=self.gamma,
            eta=self.viscosity,
            zeta=self.viscosity,
            length=2.0,
            boundary="outflow",
            steps=None if self.steps is None else refine * self.steps,
        )

    @property
    def event(self) -> Event:
        """The trajectory: `density`, `velocity` and `pressure` at all outputs, of averages in cells; without units.

        Pressure is in units of density times velocity squared, whatever those are.
        """
        x = 2.0 * (torch.arange(self.points, dtype=torch.float64) + 0.5) / self.points - 1.0
        times = torch.linspace(0.0, self.duration, self.states, dtype=torch.float64)
        coords = {"time": tuple(times.tolist()), "x": tuple(x.tolist())}
        return tuple(
            Variable(name=name, dims=("time", "x"), shape=(self.states, self.points), coords=coords)
            for name in ("density", "velocity", "pressure")
        )


def shock_tubes(
    setting: ShockTubeSetting, indices: range, *, seed: int = 0
) -> tuple[Float64[Tensor, "n 3"], Float64[Tensor, "n 3"], Float64[Tensor, " n"]]:
    """Draw the left and the right state (density, velocity, pressure) and the position of some cases.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        Another seed is another set.
    """
    noise = Noise([stream_key(seed, "shock-tube", i) for i in indices], 1, dtype=torch.float64)
    U = noise.uniform(noise.slots, (7,))
    law = torch.tensor([setting.density, setting.velocity, setting.pressure] * 2 + [setting.position], dtype=U.dtype)
    drawn = law[:, 0] + (law[:, 1] - law[:, 0]) * U
    return drawn[:, :3], drawn[:, 3:6], drawn[:, 6]


def flow_cases(setting: ShockTubeSetting, indices: range, *, seed: int = 0) -> Float64[Tensor, "n 3 points"]:
    """Draw initial states of some cases: `shock_tubes` on the grid.

    Parameters
    ----------
    setting, indices, seed
        As for `shock_tubes`.
    """
    left, right, position = shock_tubes(setting, indices, seed=seed)
    edge = (position + 1.0) * (0.5 * setting.points)
    share = (edge[:, None] - torch.arange(setting.points, dtype=torch.float64)).clamp(0.0, 1.0)[:, None]
    one, two = (conserved(s[..., None], setting.gamma) for s in (left, right))
    return primitive(share * one + (1.0 - share) * two, setting.gamma)
