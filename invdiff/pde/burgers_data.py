r"""Random cases of Burgers' equation: the settings of WDNO and of DiffPhyCon, generated on the control grid.

    u_0 = a_1 G(x; c_1, w_1) + a_2 G(x; c_2, w_2),   a_1 ~ U(0, 2), a_2 ~ U(-2, 0),
          c_1 ~ U(0.2, 0.4), c_2 ~ U(0.6, 0.8), w ~ U(0.05, 0.15),   G(x; c, w) = exp(-(x - c)^2 / (2 w^2)),
    f   = scale sum_{k=1..8} b_k G(x; c_k, w_k) G(t; s_k, v_k),   b_k ~ U(-1.5, 1.5), for k > 1 zero half of the time,
          c_k ~ U(0, 1), w_k ~ U(0.1, 0.4), s_k and v_k likewise times T

(WDNO, Hu et al. 2025; DiffPhyCon, Wei et al. 2024, arXiv 2407.06494, with widths half as large), for walls at 0 and 1
and nu = 0.01. Both papers sample the forcing finely and hold it elsewhere on a coarse grid, so that their solvers see
another forcing than their data; here its averages in the cells and windows of the control grid are the forcing, in
closed form, and so are those of u_0.

Case i of a seed depends on the seed and i alone.
"""

from dataclasses import dataclass
from math import pi, sqrt
from typing import Literal, final

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from invdiff.errors import CatalogueError, InputError
from invdiff.event import Event, Variable
from invdiff.noise import Noise, stream_key
from invdiff.pde.burgers import Burgers

Partial = Literal["none", "control", "observation", "both"]
_BUMPS = 8


@final
@dataclass(frozen=True, kw_only=True)
class BurgersSetting:
    """Grid and law of random cases.

    Parameters
    ----------
    points, windows, duration
        Of the control grid, as for `Burgers`; the interval is (0, 1).
    viscosity
        nu.
    narrow
        Factor of the forcing's widths in space and time.
    scale
        Factor of its amplitudes.
    partial
        What is withheld: "control", no forcing in the middle half; "observation", states are seen, and judged, in the
        outer quarters only; "both" or "none".

    Raises
    ------
    InputError
        If a factor is not positive.
    """

    points: int = 120
    windows: int = 80
    duration: float = 8.0
    viscosity: float = 0.01
    narrow: float = 1.0
    scale: float = 2.0
    partial: Partial = "none"

    def __post_init__(self) -> None:
        if not min(self.narrow, self.scale) > 0.0:
            raise InputError(f"narrow and scale are positive factors, got {self.narrow} and {self.scale}.")
        if self.partial not in ("none", "control", "observation", "both"):
            raise InputError(f"partial is 'none', 'control', 'observation' or 'both', got {self.partial!r}.")

    @classmethod
    def named(cls, name: str, partial: Partial = "none") -> "BurgersSetting":
        """Return a published setting: "wdno", T = 8 on 80 x 120, or "diffphycon", T = 1 on 10 x 128.

        Raises
        ------
        CatalogueError
            If there is no such setting.
        """
        if name == "wdno":
            return cls(partial=partial)
        if name == "diffphycon":
            scale = 4.0 if partial in ("control", "both") else 2.0
            return cls(points=128, windows=10, duration=1.0, narrow=0.5, scale=scale, partial=partial)
        raise CatalogueError.unknown("setting of Burgers' equation", name, ("wdno", "diffphycon"))

    def solver(self, refine: int = 2) -> Burgers:
        """Return a solver on this grid."""
        return Burgers(self.points, self.windows, self.duration, viscosity=self.viscosity, refine=refine)

    @property
    def controlled(self) -> Bool[Tensor, " points"]:
        """Cells that may be forced."""
        return self._outer(self.partial in ("control", "both"))

    @property
    def observed(self) -> Bool[Tensor, " points"]:
        """Cells whose state is seen."""
        return self._outer(self.partial in ("observation", "both"))

    @property
    def event(self) -> Event:
        """The trajectory: `state` at the ends of all windows, from the start on, and `forcing` in the windows.

        Lengths and times are in the interval's length and in units in which speeds are lengths over times; the
        equation has no other unit.
        """
        x = tuple(((torch.arange(self.points).double() + 0.5) / self.points).tolist())
        step = self.duration / self.windows
        ends = tuple((step * torch.arange(self.windows + 1).double()).tolist())
        middles = tuple((step * (torch.arange(self.windows).double() + 0.5)).tolist())
        return (
            Variable(
                name="state", dims=("time", "x"), shape=(self.windows + 1, self.points), coords={"time": ends, "x": x}
            ),
            Variable(
                name="forcing",
                dims=("window", "x"),
                shape=(self.windows, self.points),
                coords={"window": middles, "x": x},
            ),
        )

    def _outer(self, only: bool) -> Tensor:
        i, quarter = torch.arange(self.points), self.points // 4
        return (i < quarter) | (i >= self.points - quarter) if only else torch.ones(self.points, dtype=torch.bool)


def bumps(centre: Tensor, width: Tensor, edges: Tensor) -> Tensor:
    """Averages of exp(-(x - c)^2 / (2 w^2)) between neighbouring edges, (..., len(edges) - 1)."""
    area = width[..., None] * sqrt(pi / 2) * torch.erf((edges - centre[..., None]) / (sqrt(2.0) * width[..., None]))
    return area.diff(dim=-1) / edges.diff()


def burgers_cases(
    setting: BurgersSetting, indices: range, *, seed: int = 0
) -> tuple[Float64[Tensor, "n points"], Float64[Tensor, "n windows points"]]:
    """Draw initial states and forcing of some cases.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        Another seed is another set.

    Returns
    -------
    tuple of Tensor
        Averages of the initial state, units of speed, and of the forcing, units of speed over time.
    """
    n, T = len(indices), setting.duration
    noise = Noise([stream_key(seed, "burgers", i) for i in indices], 1, dtype=torch.float64)
    U = noise.uniform(noise.slots, (6 + 6 * _BUMPS,))
    x = torch.linspace(0.0, 1.0, setting.points + 1, dtype=torch.float64)
    t = torch.linspace(0.0, T, setting.windows + 1, dtype=torch.float64)
    one = 2.0 * U[:, 0:1] * bumps(0.2 + 0.2 * U[:, 1], 0.05 + 0.1 * U[:, 2], x)
    two = -2.0 * U[:, 3:4] * bumps(0.6 + 0.2 * U[:, 4], 0.05 + 0.1 * U[:, 5], x)
    V = U[:, 6:].reshape(n, 6, _BUMPS)
    on = (V[:, 0] < 0.5) | (torch.arange(_BUMPS) == 0)
    size = setting.scale * torch.where(on, 3.0 * V[:, 1] - 1.5, 0.0)
    space = bumps(V[:, 2], setting.narrow * (0.1 + 0.3 * V[:, 3]), x)
    time = bumps(T * V[:, 4], setting.narrow * T * (0.1 + 0.3 * V[:, 5]), t)
    f = torch.einsum("nk,nkt,nkx->ntx", size, time, space)
    return one + two, torch.where(setting.controlled, f, 0.0)
