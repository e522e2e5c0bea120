"""What samplers that walk down the noise levels share."""

from abc import ABC
from dataclasses import dataclass
from math import sqrt

from torch import Tensor

from invdiff.driver import Sampler, State
from invdiff.errors import InputError
from invdiff.integrators import karras_levels
from invdiff.noise import Noise
from invdiff.posterior import Posterior


@dataclass(frozen=True, kw_only=True)
class AnnealedState(State):
    """State at a noise level, and a multistep integrator's memory of the last one."""

    memory: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Noise levels of a run: Karras et al. 2022, eq. 5, then 0.

    Parameters
    ----------
    sigma_min, sigma_max
        First and last level, latent units; the prior's own if None.
    rho
        Exponent: sigma^(1 / rho) falls in even steps. Larger puts more of the steps at low noise, and a negative one
        still more: without bound it nears a geometric ladder from either side.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0

    def of(self, posterior: Posterior, steps: int) -> tuple[float, ...]:
        """Return ``steps + 1`` levels, the last of which is 0."""
        low = posterior.sigma_min if self.sigma_min is None else self.sigma_min
        high = posterior.sigma_max if self.sigma_max is None else self.sigma_max
        if not posterior.sigma_min <= low < high <= posterior.sigma_max:
            raise InputError(
                f"Noise levels from {high:g} to {low:g} do not lie within the prior's, "
                f"{posterior.sigma_max:g} to {posterior.sigma_min:g}."
            )
        return karras_levels(steps, low, high, self.rho)


def check_steps(steps: int) -> None:
    """Raise InputError unless a sampler's steps are positive."""
    if steps < 1:
        raise InputError(f"A sampler needs at least one step, got {steps}.")


def noised_again(z: Tensor, x: Tensor, sigma: float, sigma_next: float, zeta: float, noise: Noise) -> Tensor:
    """Noise x up to the next level, with what it leaves in z and a share zeta of fresh noise."""
    z = x + sqrt(1.0 - zeta) * (sigma_next / sigma) * (z - x)
    return z + sqrt(zeta) * sigma_next * noise.like(x) if zeta > 0.0 else z


class Annealed(Sampler, ABC):
    """What a sampler does that walks down ``steps`` levels: the start, and how far it is."""

    steps: int
    levels: Levels

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AnnealedState:
        """Gaussian noise at the first level."""
        first = self.levels.of(posterior, self.steps)[0]  # levels that do not fit the prior are refused here
        return AnnealedState(z=posterior.start(ensembles, n, noise, first))

    def done(self, state: AnnealedState) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: AnnealedState) -> float:
        """Share of the levels walked."""
        return state.step / self.steps
