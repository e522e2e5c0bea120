r"""Random cases of linear advection: sums of waves, in the manner of PDEBench.

    u_0(x) = sum_{i=1..N} A_i sin(2 pi n_i x + phi_i),
    A_i ~ U(0, 1),   n_i uniform on 1..k_max,   phi_i ~ U(0, 2 pi),

with N = 2 and k_max = 8 (Takamoto et al. 2022, arXiv 2210.07182). PDEBench takes the absolute value, or
sets to zero what is outside of a window, in some of its cases; these variants are left out. A state is its averages in
cells, in closed form.

Case i of a seed depends on the seed and i alone.
"""

from dataclasses import dataclass
from math import isfinite, pi
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.event import Event, Variable
from invdiff.noise import Noise, stream_key
from invdiff.pde.advection import Advection


@final
@dataclass(frozen=True, kw_only=True)
class AdvectionSetting:
    """Grid and law of random cases on (0, 1).

    Parameters
    ----------
    points, states, duration, speed
        As for `Advection`. PDEBench has 1024 points and 201 states to time 2, and sets of speeds from 0.1 to 7.
    waves
        N, at least 1.
    highest
        k_max, at least 1, and below half of the points so that the grid resolves every wave.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    points: int = 128
    states: int = 201
    duration: float = 2.0
    speed: float = 1.0
    waves: int = 2
    highest: int = 8

    def __post_init__(self) -> None:
        if self.waves < 1 or not 1 <= self.highest < self.points / 2 or not isfinite(self.speed):
            raise InputError(
                "There is at least 1 wave, of number from 1 to below points / 2, and speed is finite; got "
                f"waves={self.waves}, highest={self.highest}, points={self.points}, speed={self.speed}."
            )

    @classmethod
    def named(cls, name: str) -> "AdvectionSetting":
        """Return a setting by name: "waves", the defaults, for there is no other yet.

        Raises
        ------
        CatalogueError
            If there is no such setting.
        """
        if name != "waves":
            raise CatalogueError.unknown("setting of linear advection", name, ("waves",))
        return cls()

    def solver(self) -> Advection:
        """Return a solver on this grid, exact for these cases."""
        return Advection(self.points, self.states, self.duration, speed=self.speed)

    @property
    def event(self) -> Event:
        """The trajectory: `state` at all outputs, averages in cells; the equation has no units."""
        x = (torch.arange(self.points, dtype=torch.float64) + 0.5) / self.points
        times = torch.linspace(0.0, self.duration, self.states, dtype=torch.float64)
        coords = {"time": tuple(times.tolist()), "x": tuple(x.tolist())}
        return (Variable(name="state", dims=("time", "x"), shape=(self.states, self.points), coords=coords),)


def advection_cases(setting: AdvectionSetting, indices: range, *, seed: int = 0) -> Float64[Tensor, "n points"]:
    """Draw initial averages of some cases.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        Another seed is another set.
    """
    noise = Noise([stream_key(seed, "advection", i) for i in indices], 1, dtype=torch.float64)
    size, number, phase = noise.uniform(noise.slots, (3, setting.waves, 1)).unbind(1)
    k = 2.0 * pi * (1.0 + (number * setting.highest).floor())
    x = (torch.arange(setting.points, dtype=torch.float64) + 0.5) / setting.points
    # The average over a cell of width h is the value at its middle times sin(k h / 2) / (k h / 2).
    waves: Tensor = size * torch.sin(k * x + 2.0 * pi * phase) * torch.sinc(k / (2.0 * pi * setting.points))
    return waves.sum(1)
