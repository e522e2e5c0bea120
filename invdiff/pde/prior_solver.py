r"""A trained prior of trajectories in the place of a solver: states from an initial state and a forcing, by denoising.

The prior is told both and asked for the states at falling noise levels sigma_1 > sigma_2 > ...,

    d_1 = D(sigma_1 eps_1, sigma_1),   d_{k + 1} = D(d_k + sigma_{k + 1} eps_{k + 1}, sigma_{k + 1}),

whose last is the answer. Each denoised state is the mean of the prior's law given what was asked, blurred where it is
unsure; adding noise and denoising again at a lower level draws what the level before could not tell. The noise eps is
fixed by a seed, so the answer is a smooth function of initial state and forcing with exact gradients, which pass
through the network. What a network was not trained on it answers wrongly, and a search for a cheap forcing finds such
answers: averages over several noises, and changes that are smooth (`optimal_forcing`), keep it honest.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.noise import Noise, stream_key


@runtime_checkable
class TrajectoryPrior(Protocol):
    """A prior whose event is a state (windows + 1, points) and a forcing (windows, points), in this order."""

    shape: tuple[int, ...]

    @property
    def event(self) -> Any:
        """State and forcing."""

    @property
    def sigma_min(self) -> float:
        """Smallest noise level, latent units."""

    @property
    def sigma_max(self) -> float:
        """Largest noise level, latent units."""

    def condition(self, given: Mapping[str, Tensor]) -> "TrajectoryPrior":
        """Give the same prior with something known, a row for each latent."""

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        """E[z_0 | z, what is known]."""

    def decode(self, z: Tensor) -> Tensor:
        """State and forcing, flat, physical units."""


@final
class PriorSolver:
    """Solve by a prior of trajectories, as `Burgers` does by its equation.

    Parameters
    ----------
    prior
        With the conditions "initial" and the variables "state" and "forcing".
    levels
        Falling noise levels, latent units; as many evaluations of the network. The prior's largest if None.
    draws
        Noises for each initial state; the answers stand one after the other, (draws * n, windows + 1, points).
    seed
        Of the noises.

    Raises
    ------
    CapabilityError
        If the prior cannot be told what is known.
    ShapeError
        If the prior's event is not a state and a forcing.
    InputError
        If the levels do not fall within the prior's, or there is no draw.
    """

    def __init__(
        self, prior: TrajectoryPrior, *, levels: Sequence[float] | None = None, draws: int = 1, seed: int = 0
    ) -> None:
        if not hasattr(prior, "condition"):
            raise CapabilityError(f"{type(prior).__name__} has no condition(given): it cannot be told what to solve.")
        shapes = {v.name: tuple(v.shape) for v in prior.event}
        state, forcing = shapes.get("state", ()), shapes.get("forcing", ())
        if list(shapes) != ["state", "forcing"] or (state[0] - 1, *state[1:]) != forcing:
            raise ShapeError(
                f"A prior that solves has the variables state (windows + 1, points) and forcing (windows, points); "
                f"this one has {shapes}."
            )
        chosen = tuple(float(s) for s in ((prior.sigma_max,) if levels is None else levels))
        ordered = all(a > b for a, b in pairwise(chosen))
        if not chosen or not ordered or not prior.sigma_min <= chosen[-1] <= chosen[0] <= prior.sigma_max:
            raise InputError(
                f"Noise levels fall within the prior's, {prior.sigma_max:g} to {prior.sigma_min:g}, got {chosen}."
            )
        if draws < 1:
            raise InputError(f"At least one noise is drawn, got {draws}.")
        self.prior, self.levels, self.draws, self.seed = prior, chosen, draws, seed
        self.windows, self.points = forcing

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for one initial state."""
        return len(self.levels) * self.draws

    def __call__(
        self, initial: Float[Tensor, "n points"], forcing: Float[Tensor, "n windows points"]
    ) -> Float[Tensor, "m states points"]:
        """Return states at the ends of all windows, the first being the initial state as the prior has it.

        Parameters
        ----------
        initial
            Averages at the start.
        forcing
            Held in each window and cell; zero where it does not act.

        Raises
        ------
        ShapeError
            If they do not have the prior's points and windows.
        """
        n = len(forcing)
        if tuple(initial.shape) != (n, self.points) or tuple(forcing.shape) != (n, self.windows, self.points):
            raise ShapeError(
                f"The prior has {self.windows} windows of {self.points} points, got an initial state of shape "
                f"{tuple(initial.shape)} and a forcing of {tuple(forcing.shape)}."
            )
        dtype = getattr(self.prior, "dtype", None) or forcing.dtype
        rows = {"initial": initial, "forcing": forcing}
        known = self.prior.condition({k: v.to(dtype).repeat(self.draws, *[1] * (v.ndim - 1)) for k, v in rows.items()})
        keys = [stream_key(self.seed, "solver", i) for i in range(self.draws)]
        noise = Noise(keys, 1, device=forcing.device, dtype=dtype)
        d: Tensor = torch.zeros((), dtype=dtype, device=forcing.device)
        for sigma in self.levels:
            eps = noise.normal(noise.slots, self.prior.shape).repeat_interleave(n, 0)
            d = known.denoise(d + sigma * eps, sigma)
        states = (self.windows + 1) * self.points
        return known.decode(d)[:, :states].reshape(-1, self.windows + 1, self.points).to(forcing.dtype)
