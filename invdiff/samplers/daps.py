r"""Decoupled annealing posterior sampling, DAPS (Zhang et al. 2025, arXiv 2407.01521, algorithm 1).

At each level sigma of a falling ladder:

    1. x^ = the end of a short probability-flow run from z at sigma to 0 (``ode_steps`` steps)
    2. x_0 ~ N(x_0; x^, r^2) p(y | x_0), r = sigma, by Langevin steps (or exactly, for linear-Gaussian problems)
    3. z at the next level = x_0 + sigma' eps

Departures: the published code sharpens the likelihood 50-fold (tau = 0.01 with |y - A x|^2 / tau^2 for noise 0.05);
here p(y | x_0) is the true likelihood. The Langevin step is e = rate / (1 / r^2 + ||A||^2 / noise_std^2) at each level,
stable for every rate < 2, in place of a learning rate tuned by task. The last level's x_0 is the draw.

Biased: N(x_0; x^, r^2) stands for p(x_0 | z_sigma), whose variance is smaller than sigma^2, so the draws are too wide
where the measurement says little. Measured on inpainting, blur and down-sampling of a Gaussian field (12 x 12, noise
0.05; exact draws give 1, 1 and 0.90) with Langevin and 100 levels: variance 1.20, 1.15 and 1.18 of the posterior's,
whitened norm 1.19, 1.17 and 1.20, and 0.92, 0.92 and 0.93 of the mass in 90 % intervals; with ExactInner 1.11, 1.08 and
1.09, 1.10, 1.08 and 1.09, and 0.91, 0.91 and 0.92 (docs/exactness.json). With one or two ``ode_steps`` x^ is all but
D(z), a level is a Langevin step of size sigma^2, and the bias falls as levels are added (variance 1.02 to 1.03 at 400).
With more, x^ nears the end of the flow, towards which the pull at low noise is half of the score's, and a bias stays:
with 5, variance 1.34 to 1.40 at 100 levels and still 1.21 to 1.28 at 400.

Cost: ``ode_steps`` forward passes a level, none backward; ``Langevin.steps`` likelihood gradients a level.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from typing import ClassVar, final

from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import CapabilityError, InputError
from invdiff.integrators import Euler, karras_levels
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps


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
        slope, std = self.slope, posterior.noise_std
        if slope is None:
            if posterior.linear is None:
                raise CapabilityError(
                    "Langevin needs slope, a bound on the norm of dA/dz, for a problem that is not linear."
                )
            slope, std = posterior.linear.norm(), float(posterior.linear.noise_std.min())
        step = self.rate / (1.0 / r**2 + (slope / (std or 1.0)) ** 2)
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
        return (x + r**2 * rows.operator.adjoint(rows.solve(residual, r**2))).reshape(center.shape)


@final
@dataclass(frozen=True, kw_only=True)
class DAPS(Annealed):
    """Decoupled annealing posterior sampling.

    Parameters
    ----------
    steps
        Levels of the annealing.
    ode_steps
        Probability-flow steps from each level to 0.
    inner
        How x_0 is drawn: Langevin() or ExactInner().
    levels
        Annealing levels; by default from the prior's sigma_max to its sigma_min.
    """

    steps: int = 50
    ode_steps: int = 2
    inner: Inner = field(default_factory=Langevin)
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{zhang2025daps, "
        "title={Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing}, "
        "author={Zhang, Bingliang and Chu, Wenda and Berner, Julius and Meng, Chenlin and Anandkumar, Anima and "
        "Song, Yang}, "
        "booktitle={CVPR}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_steps(self.ode_steps)

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and what the inner draw needs of the likelihood."""
        known = not isinstance(self.inner, Langevin) or self.inner.slope is not None
        # Without its slope Langevin takes ||A||, which only a linear problem has.
        return self.inner.requires | {"denoiser"} | (frozenset() if known else {"linear"})

    def cost(self) -> Cost:
        """``ode_steps`` forward passes a level."""
        return Cost(self.steps * self.ode_steps)

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """One level: flow to 0, draw x_0, noise again."""
        levels = self.levels.of(posterior, self.steps)
        sigma, sigma_next = levels[state.step], levels[state.step + 1]
        flow = (
            karras_levels(self.ode_steps, posterior.sigma_min, sigma) if sigma > posterior.sigma_min else (sigma, 0.0)
        )
        x, euler = state.z, Euler()
        for a, b in pairwise(flow):
            x, _ = euler.step(posterior.denoise, x, a, b)
        x = self.inner.draw(posterior, x, sigma, noise)
        misfit = posterior.misfit(x)
        z = x + sigma_next * noise.like(x) if sigma_next > 0.0 else x
        return AnnealedState(z=z, step=state.step + 1), Info(sigma=sigma_next, misfit=misfit)

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the last level's x_0."""
        return Draws(z=state.z)
