r"""Pseudo-inverse guidance with moment matching, PiGDM.

Song et al. 2023; Boys et al. 2023, arXiv 2310.06721; Rozet et al. 2024, arXiv 2405.13712.

For y = A z + n with n ~ N(0, R), the law of z_0 given z_sigma is approximated by a Gaussian N(D, C) with the denoiser's
mean and a covariance C(z, sigma). The denoiser given the measurement is then the Gaussian's conditional mean

    D_y(z, sigma) = D + C A^T (R + A C A^T)^{-1} (y - A D)

and any reverse-time integrator that walks down with D_y in place of D draws from the posterior. C is what tells the
variants apart: `Jacobian` (C = sigma^2 dD/dz, Tweedie's second moment: moment matching; vector-Jacobian products inside
conjugate gradients), `Spectral` (C from the prior's stored error table: the same for a Gaussian field, and free of
network gradients elsewhere) and `Isotropic` (C A^T replaced by sigma^2 (dD/dz)^T A^T and A C A^T by r^2 A A^T with r^2
= sigma^2 s^2 / (sigma^2 + s^2): the published PiGDM).

Exact for Gaussian priors with `Jacobian` or `Spectral`, in the limit of many steps, sigma_min -> 0 and converged
conjugate gradients; for other priors the law of z_0 given z_sigma is not Gaussian and the draws are biased by that
alone.

Cost: one forward pass a step with `Spectral` (two with Heun), and one backward pass more with `Isotropic`, or one
backward pass for each iteration of the conjugate gradients plus one with `Jacobian`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import CapabilityError
from invdiff.integrators import DPMSolver2M, Integrator
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Block, Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps


@dataclass(frozen=True, kw_only=True)
class GuidedState(AnnealedState):
    """State at a noise level, and the last step's correction D_y - D, from which the next solution starts."""

    correction: Tensor | None = None


class Covariance(ABC):
    """How the covariance of z_0 given z_sigma is modelled; subclasses are final frozen dataclasses."""

    requires: ClassVar[frozenset[str]]
    exact: ClassVar[bool] = True
    """Whether it is the true covariance where the prior is Gaussian."""

    @abstractmethod
    def backward(self) -> int:
        """Backward passes through the network an evaluation, at most."""

    @abstractmethod
    def guided(
        self, posterior: Posterior, z: Tensor, sigma: float, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """D_y(z, sigma) and D(z, sigma); ``start`` is a guess of D_y - D, for those that solve for it."""


def _linear(block: Block) -> LinearGaussian:
    if block.linear is None:
        raise CapabilityError("PiGDM needs a linear-Gaussian problem.")
    return block.linear


@final
@dataclass(frozen=True, kw_only=True)
class Jacobian(Covariance):
    """C = sigma^2 dD/dz: moment matching.

    Parameters
    ----------
    max_iterations, rtol
        Of the conjugate gradients; each iteration is one backward pass through the network.
    """

    max_iterations: int = 30
    rtol: float = 1e-4
    requires: ClassVar[frozenset[str]] = frozenset({"denoiser", "denoiser_vjp", "linear"})

    def backward(self) -> int:
        """One an iteration, and one more."""
        return self.max_iterations + 1

    def guided(
        self,
        posterior: Posterior,
        z: Tensor,
        sigma: float,
        start: Tensor | None = None,  # noqa: ARG002 the contract's
    ) -> tuple[Tensor, Tensor]:
        """D_y and D; see `Covariance.guided`."""

        def cotangent(block: Block) -> Tensor:
            linear = _linear(block)
            r = linear.residual(block.denoised)
            # (dD/dz)^T stands for dD/dz: the Jacobian of an exact denoiser is symmetric.
            w = linear.solve(r, lambda v: sigma**2 * block.vjp(v), rtol=self.rtol, max_iterations=self.max_iterations)
            return linear.operator.adjoint(w)

        denoised, product = posterior.denoise_vjp(z, sigma, cotangent)
        return denoised + sigma**2 * product, denoised


@final
@dataclass(frozen=True, kw_only=True)
class Spectral(Covariance):
    """C from the prior's curvature: its error variance by frequency and sigma.

    Parameters
    ----------
    atol
        Error of the conjugate gradients, in units of the standard deviation of z_0 given z_sigma and y. If None, 1e-11
        in float64, 1e-3 in float32, and 1e-2 where the network runs in half precision, whose rounding is no finer.
    max_iterations
        Bound on their iterations, which cost operator applications only.
    """

    atol: float | None = None
    max_iterations: int = 400
    requires: ClassVar[frozenset[str]] = frozenset({"denoiser", "linear", "curvature"})

    def backward(self) -> int:
        """None."""
        return 0

    def guided(
        self, posterior: Posterior, z: Tensor, sigma: float, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """D_y and D; see `Covariance.guided`."""
        curvature = posterior.curvature
        if curvature is None:
            raise CapabilityError("The covariance Spectral needs a prior with a curvature.")
        denoised = posterior.denoise(z, sigma)

        atol = 1e-2 if self.atol is None and posterior.precision != "float32" else self.atol

        def gain(linear: LinearGaussian, d: Tensor, x: Tensor | None = None) -> Tensor:
            r = linear.residual(d)
            return linear.correction(r, curvature, sigma, start=x, atol=atol, max_iterations=self.max_iterations)

        guess = () if start is None else (start,)
        return denoised + posterior.linear_rows(denoised, gain, *guess), denoised


@final
@dataclass(frozen=True, kw_only=True)
class Isotropic(Covariance):
    """The published PiGDM: r^2 A A^T for A C A^T, with r^2 = sigma^2 s^2 / (sigma^2 + s^2).

    Parameters
    ----------
    prior_std
        s, the standard deviation of the prior's values, latent units; the paper's 1.
    """

    prior_std: float = 1.0
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"denoiser", "denoiser_vjp", "linear"})

    def backward(self) -> int:
        """One."""
        return 1

    def guided(
        self,
        posterior: Posterior,
        z: Tensor,
        sigma: float,
        start: Tensor | None = None,  # noqa: ARG002 the contract's
    ) -> tuple[Tensor, Tensor]:
        """D_y and D; see `Covariance.guided`."""
        r2 = sigma**2 * self.prior_std**2 / (sigma**2 + self.prior_std**2)

        def cotangent(block: Block) -> Tensor:
            linear = _linear(block)
            return linear.operator.adjoint(linear.solve(linear.residual(block.denoised), r2))

        denoised, product = posterior.denoise_vjp(z, sigma, cotangent)
        return denoised + sigma**2 * product, denoised


@final
@dataclass(frozen=True, kw_only=True)
class PiGDM(Annealed):
    """Reverse diffusion with the denoiser given the measurement.

    Parameters
    ----------
    steps
        Noise levels.
    covariance
        Model of the covariance of z_0 given z_sigma: Jacobian(), Spectral() or Isotropic().
    integrator
        Reverse-time stepper.
    levels
        Noise levels.
    """

    steps: int = 50
    covariance: Covariance = field(default_factory=Jacobian)
    integrator: Integrator = field(default_factory=DPMSolver2M)
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{song2023pigdm, title={Pseudoinverse-Guided Diffusion Models for Inverse Problems}, "
        "author={Song, Jiaming and Vahdat, Arash and Mardani, Morteza and Kautz, Jan}, booktitle={ICLR}, year={2023}}\n"
        "@article{boys2023tmpd, title={Tweedie Moment Projected Diffusions for Inverse Problems}, "
        "author={Boys, Benjamin and Girolami, Mark and Pidstrigach, Jakiw and Reich, Sebastian and Mosca, Alan and "
        "Akyildiz, O. Deniz}, "
        "journal={arXiv:2310.06721}, year={2023}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)

    @property
    def exact(self) -> bool:
        """For Gaussian priors, where the covariance is the true one."""
        return self.covariance.exact

    def requires(self) -> frozenset[str]:
        """Return a linear-Gaussian problem, and what the covariance needs of the prior."""
        return self.covariance.requires

    def cost(self) -> Cost:
        """As the integrator and the covariance have it."""
        forward = self.integrator.evaluations * self.steps - (self.integrator.evaluations - 1)
        return Cost(forward, forward * self.covariance.backward())

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> GuidedState:
        """Gaussian noise at the first level."""
        return GuidedState(z=super().init(posterior, ensembles, n, noise=noise).z)

    def step(self, posterior: Posterior, state: GuidedState, *, noise: Noise) -> tuple[GuidedState, Info]:
        """One step with the guided denoiser."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        misfits: list[float] = []
        correction = state.correction

        def guided(z: Tensor, sigma: float) -> Tensor:
            nonlocal correction
            conditional, denoised = self.covariance.guided(posterior, z, sigma, correction)
            correction = conditional - denoised
            misfits.append(posterior.misfit(conditional))
            return conditional

        z, memory = self.integrator.step(
            guided,
            state.z,
            levels[k],
            levels[k + 1],
            memory=state.memory,
            sigma_previous=levels[k - 1] if k else None,
            normal=noise.like,
        )
        new = GuidedState(z=z, step=k + 1, memory=memory, correction=correction)
        return new, Info(sigma=levels[k + 1], misfit=misfits[0])

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0."""
        return Draws(z=state.z)
