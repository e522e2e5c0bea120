r"""Linear advection in one dimension, u_t + c u_x = 0, periodic.

The solution is u(x, t) = u_0(x - c t), so there is no time step, and no kernel of its own: a whole trajectory is one
reconstruction of u_0 from its averages in cells, shifted exactly and averaged again. Errors do not grow with time.

"spectral" takes the trigonometric polynomial through the averages. Its averages shift as its values do, by a phase for
each wave number: hat U_k(t) = exp(-2 pi i k c t / length) hat U_k, one pair of Fourier transforms for all times.
Exact for waves that the grid resolves; rings at jumps. With an even number of points the highest wave is known by its
cosine alone, and is multiplied by cos(pi c t / h).

"conservative" takes a line in each cell, with the average and van Leer's (1977) monotonised central slope. A shift by
j + d cells, 0 <= d < 1, averages the parts of two lines:

    U_i(t) = (1 - d) (U_{i-j} - d s_{i-j} / 2) + d (U_{i-j-1} + (1 - d) s_{i-j-1} / 2),
    s = minmod(2 a, (a + b) / 2, 2 b),   a and b the differences to the left and to the right.

Second order where the solution is smooth, less at extrema; every average lies between those of the cells around it, so
that no new extremum appears at a jump.
"""

from math import isfinite, pi
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError, ShapeError

Scheme = Literal["spectral", "conservative"]


@final
class Advection(nn.Module):
    """Solver of linear advection on a periodic grid of equal cells.

    Parameters
    ----------
    points
        Cells, at least 3.
    states
        Outputs at equally spaced times from 0 to `duration`, both among them; at least 2.
    duration
        Time of the last output.
    speed
        c, of either sign.
    length
        Of the interval.
    scheme
        "spectral", linear, for smooth states, or "conservative", for states with jumps.

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
        speed: float = 1.0,
        length: float = 1.0,
        scheme: Scheme = "spectral",
    ) -> None:
        super().__init__()
        if points < 3 or states < 2:
            raise InputError(f"A grid has at least 3 points and 2 states, got points={points}, states={states}.")
        if not (min(duration, length) > 0.0 and isfinite(speed)):
            raise InputError(
                f"duration and length are positive and speed is finite, got {duration}, {length} and {speed}."
            )
        if scheme not in get_args(Scheme):
            raise InputError(f"scheme is 'spectral' or 'conservative', got {scheme!r}.")
        self.points, self.states, self.duration = points, states, duration
        self.speed, self.length, self.scheme = speed, length, scheme
        # In cells; multiples of the grid's length would only cost digits.
        self.shifts = [(speed * duration * k / (states - 1) / length * points) % points for k in range(states)]

    def extra_repr(self) -> str:
        """Return the grid."""
        return f"{self.points} points, {self.states} states to {self.duration:g}, speed={self.speed:g}, {self.scheme}"

    def forward(self, initial: Float[Tensor, "n points"]) -> Float[Tensor, "n states points"]:
        """Averages at all outputs; differentiable, and linear if the scheme is "spectral".

        Parameters
        ----------
        initial
            Averages at the start, any units; float32 or float64.

        Raises
        ------
        ShapeError
            If they do not have the grid's shape.
        InputError
            If they are of another type.
        """
        if tuple(initial.shape) != (len(initial), self.points):
            raise ShapeError(f"This solver takes states (n, {self.points}), got {tuple(initial.shape)}.")
        if initial.dtype not in (torch.float32, torch.float64):
            raise InputError(f"States are float32 or float64, got {initial.dtype}.")
        if self.scheme == "spectral":
            waves = torch.fft.rfft(initial)[:, None] * self._phases(initial)
            found: Tensor = torch.fft.irfft(waves, self.points)
            return found
        return self._lines(initial)

    def adjoint(self, states: Float[Tensor, "n states points"]) -> Float[Tensor, "n points"]:
        """Adjoint of the linear scheme: all states shifted back, and added.

        Raises
        ------
        CapabilityError
            If the scheme is "conservative", which is not linear: take its gradient instead.
        ShapeError
            If they do not have the grid's shape.
        """
        if self.scheme != "spectral":
            raise CapabilityError("The limited scheme 'conservative' is not linear; take scheme='spectral'.")
        if tuple(states.shape) != (len(states), self.states, self.points):
            raise ShapeError(f"The adjoint takes (n, {self.states}, {self.points}), got {tuple(states.shape)}.")
        waves = (torch.fft.rfft(states) * self._phases(states).conj()).sum(1)
        found: Tensor = torch.fft.irfft(waves, self.points)
        return found

    def _phases(self, like: Tensor) -> Tensor:
        """Factors of the waves at all times, (states, points // 2 + 1)."""
        k = torch.arange(self.points // 2 + 1, dtype=torch.float64)
        turns = torch.tensor(self.shifts, dtype=torch.float64)[:, None] * k / self.points
        angle = -2.0 * pi * (turns % 1.0)
        phases = torch.complex(angle.cos(), angle.sin())
        return phases.to(device=like.device, dtype=torch.complex128 if like.dtype == torch.float64 else torch.complex64)

    def _lines(self, u: Tensor) -> Tensor:
        shifts = torch.tensor(self.shifts, dtype=torch.float64)
        j = shifts.floor().long()[:, None]
        d = (shifts[:, None] - j).to(u)
        here = (torch.arange(self.points) - j).remainder(self.points).to(u.device)
        before = (here - 1).remainder(self.points)
        a, b = u - u.roll(1, 1), u.roll(-1, 1) - u
        steepest = torch.minimum(torch.minimum(2.0 * a.abs(), 2.0 * b.abs()), 0.5 * (a + b).abs())
        s = torch.where(a * b > 0.0, steepest * a.sign(), 0.0)
        return (1.0 - d) * (u[:, here] - 0.5 * d * s[:, here]) + d * (u[:, before] + 0.5 * (1.0 - d) * s[:, before])
