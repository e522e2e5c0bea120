"""What alternating samplers share: the likelihood's stiffness, and draws of x_0 from N(x_0; x^, r^2) p(y | x_0)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, final

from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps


def stiffness(posterior: Posterior, slope: float | None) -> float:
    """Square root of a bound on the likelihood's curvature: ||A|| / noise_std.

    Parameters
    ----------
    posterior
        The posterior.
    slope
        Bound on the norm of dA/dz in place of ||A||, latent units; needed where the problem is not linear. For an
        objective, which has no noise, it is that square root itself.

    Raises
    ------
    CapabilityError
        If the problem is not linear and no slope is given.
    """
    if slope is not None:
        return slope / (posterior.noise_std or 1.0)
    if posterior.linear is None:
        raise CapabilityError("A problem that is not linear needs slope, a bound on the norm of dA/dz.")
    return posterior.linear.norm() / posterior.linear.least_noise_std


def smoothing(posterior: Posterior, slope: float | None, share: float) -> float:
    """Return a level that is small against what the measurement resolves: ``share`` of noise_std / ||A||, latent units.

    It is kept within the prior's sigma_min and a thousandth of its sigma_max, for measurements that say little.
    """
    low, high = posterior.sigma_min, 1e-3 * posterior.sigma_max
    s = stiffness(posterior, slope)
    return max(low, min(high, share / s)) if s > 0.0 else max(low, high)


def check_slope(slope: float | None) -> None:
    """Raise InputError unless a slope is positive or None."""
    if slope is not None and not slope > 0.0:
        raise InputError(f"slope is a positive bound on the norm of dA/dz, got {slope}.")


class Inner(ABC):
    """How x_0 is drawn from N(x_0; x^, r^2) p(y | x_0); subclasses are final frozen dataclasses."""

    requires: ClassVar[frozenset[str]]

    @abstractmethod
    def draw(self, posterior: Posterior, center: Tensor, r: float, noise: Noise) -> Tensor:
        """One x_0 for each center of shape (ensemble, particle, *shape)."""


@final
@dataclass(frozen=True, kw_only=True)
class Langevin(Inner):
    """Unadjusted Langevin steps from the center.

    Parameters
    ----------
    steps
        Steps a level.
    rate
        Step size in units of the inverse of the largest curvature, in (0, 2). In that stiffest direction the steps'
        stationary variance is 1 / (1 - rate / 2) of the true one; in softer directions the error is smaller.
    slope
        Bound on the norm of the operator's derivative dA/dz, latent units, for problems that are not linear.
    """

    steps: int = 50
    rate: float = 0.3
    slope: float | None = None
    requires: ClassVar[frozenset[str]] = frozenset({"likelihood_gradient"})

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0.0 < self.rate < 2.0:
            raise InputError(f"Langevin's rate lies in (0, 2), got {self.rate}.")

    def draw(self, posterior: Posterior, center: Tensor, r: float, noise: Noise) -> Tensor:
        """One x_0 for each center; see `Inner.draw`."""
        step = self.rate / (1.0 / r**2 + stiffness(posterior, self.slope) ** 2)
        x = center
        for _ in range(self.steps):
            _, grad = posterior.log_likelihood_and_grad(x)
            x = x + step * (grad - (x - center) / r**2) + sqrt(2.0 * step) * noise.like(x)
        return x


@final
@dataclass(frozen=True, kw_only=True)
class ExactInner(Inner):
    """The exact Gaussian draw for linear-Gaussian problems, by perturbation and solution (Papandreou & Yuille 2010)."""

    requires: ClassVar[frozenset[str]] = frozenset({"linear"})

    def draw(self, posterior: Posterior, center: Tensor, r: float, noise: Noise) -> Tensor:
        """One x_0 for each center; see `Inner.draw`."""
        linear = posterior.linear
        if linear is None:
            raise CapabilityError("ExactInner needs a linear-Gaussian problem.")
        perturbed = center + r * noise.like(center)
        eps = noise.normal(noise.slots, linear.operator.out_shape).to(center.dtype)
        x = perturbed.flatten(0, 1)
        rows = linear.rows(posterior.rows(perturbed))
        residual = rows.residual(x) - rows.noise_std.to(x.dtype) * eps
        return (x + rows.gain(residual, r**2)).reshape(center.shape)
