r"""Filtering posterior sampling, FPS-SMC (Dou & Song, ICLR 2024, "A filtering perspective").

The measurement is noised as the state is, y_sigma = y + A xi_sigma with xi_sigma ~ N(0, sigma^2), so that y_sigma has
the likelihood N(y_sigma; A z_sigma, R) at every level. ``trajectory="drawn"`` is the paper: for each ensemble one
trajectory is drawn from sigma_max down, by the prior's own ancestral step about y,

    xi' = (sigma'^2 / sigma^2) xi + sqrt(v) eps,   v = (sigma^2 - sigma'^2) sigma'^2 / sigma^2

and weighted particles walk down by K(z' | z) = N(m, v) of `tds`, as in a hidden Markov model that is seen through
y_sigma'. Proposal and weight are in closed form through the SVD, and the weight does not depend on z':

    z' ~ N(m + G (y_sigma' - A m), v (1 - G A)),   G = v A^T S^{-1},   S = R + v A A^T,   w <- w N(y_sigma'; A m, S)

The last step is z' = D, with p(y | D). Where R > 0 that target is not the posterior, for any number of steps: every
level counts the measurement again, each with fresh noise, though y_sigma - A z_sigma is one and the same noise at all
of them. It gives no evidence. (The published code draws the trajectory with a fixed share of fresh noise, 0.95, which
leaves xi_sigma with the same law at each level.)

``trajectory="averaged"``, the default, takes for the potential the mean over all trajectories, psi_sigma(z) =
E N(y_sigma; A z, R) = N(y; A z, R + sigma^2 A A^T), and divides each weight by the last one:

    z' ~ N(m + G (y - A m), v (1 - G A)),   S = R + (v + sigma'^2) A A^T,   w <- w N(y; A m, S) / psi_sigma(z)

The product telescopes to p(y | z_0): the target is the posterior of the discretised prior, and the evidence without
bias. (Division by a drawn trajectory's N(y_sigma; A z, R) has the same target, but weights of infinite variance.) The
start is N(mean, sigma_max^2) times the first potential.

Exact if averaged, as particles and steps grow, sigma_min -> 0 and sigma_max -> infinity; biased if drawn. Measured on
the mixtures of `invdiff.diagnostics.mixtures`, of which 1, 2 and 4 combinations are measured with noise 0.3 (120 steps,
4 ensembles of 4096 particles; docs/mixtures.json):

    dimensions                           2       4       8
    averaged: sliced distance W2         0.020   0.026   0.064     exact draws: 0.014   0.016   0.019
    rms error of log evidence, nats      0.06    0.18    0.17
    drawn: sliced distance W2            0.111   0.437   0.204

Drawn, the measured combination of the first has 0.39, 0.26 and 0.17 of the posterior's standard deviation at 30, 120
and 480 steps. Averaged, the target on a Gaussian in two dimensions has, in closed form, 0.79, 0.95 and 0.98 of the
posterior's variance at 30, 150 and 400 steps: the chain's error is of first order. Particles must grow exponentially
with what the measurement tells: on fields and pictures a few hundred collapse, and ``ess`` in the trace shows it.

Cost: one forward pass a step.
"""

from dataclasses import dataclass, field, replace
from math import log, pi, prod, sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.mcgdiff import singular_values, spread
from invdiff.samplers.particles import Resampling, Systematic, Weighted, check_threshold
from invdiff.samplers.tds import ancestral

TRAJECTORIES = ("averaged", "drawn")


@dataclass(frozen=True, kw_only=True)
class FilteredState(Weighted):
    """Weighted particles at a noise level.

    Parameters
    ----------
    shift
        xi of the ensemble, of z's shape, the same for all its particles; None where the trajectory is averaged.
    """

    shift: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True)
class FPS(Sampler):
    """Sequential Monte Carlo through a trajectory of noised measurements.

    Parameters
    ----------
    steps
        Noise levels.
    trajectory
        "averaged" for potentials that are means over trajectories, exact; "drawn" for one trajectory an ensemble as in
        the paper, which counts the measurement at every level.
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample, in [0, 1]; 1, at
        every step, as in the paper.
    levels
        Noise levels.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 100
    trajectory: str = "averaged"
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 1.0
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{dou2024fps, title={Diffusion Posterior Sampling for Linear Inverse Problem Solving: "
        "A Filtering Perspective}, author={Dou, Zehao and Song, Yang}, booktitle={ICLR}, year={2024}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_threshold(self.threshold)
        if self.trajectory not in TRAJECTORIES:
            raise InputError(f"trajectory is one of {', '.join(TRAJECTORIES)}; got {self.trajectory!r}.")

    @property
    def exact(self) -> bool:
        """As particles and steps grow, if the trajectory is averaged."""
        return self.trajectory == "averaged"

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and an SVD of the operator with one noise level."""
        return frozenset({"denoiser", "svd"})

    def cost(self) -> Cost:
        """One forward pass a step."""
        return Cost(self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> FilteredState:
        """Gaussian noise about the prior's mean at the first level, given the potential there."""
        sigma = self.levels.of(posterior, self.steps)[0]
        mean = posterior.noised_mean().expand(ensembles, 1, *posterior.shape)
        shift = None if self.exact else sigma * common(noise, mean)
        mean, mass = self._proposal(posterior, mean, shift, v=sigma**2, after=sigma)
        eps = noise.like(mean.expand(ensembles, n, *posterior.shape))
        z = mean + self._fresh(posterior, eps, sigma**2, sigma)
        shift = None if shift is None else shift.expand(z.shape).contiguous()
        return FilteredState.begin(z, mass.expand(ensembles, n).contiguous(), shard=noise.shard, shift=shift)

    def done(self, state: FilteredState) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: FilteredState) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: FilteredState, *, noise: Noise) -> tuple[FilteredState, Info]:
        """Weight by what the next level's measurement will be, resample, and draw the next level."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        sigma, after = levels[k], levels[k + 1]
        denoised = posterior.denoise(state.z, sigma)
        mean, std = ancestral(state.z, denoised, sigma, after)
        shift = state.shift
        if shift is not None:
            shift = (after / sigma) ** 2 * shift + std * common(noise, shift)
        beside = state.z if shift is None else shift
        mean, increment = self._proposal(posterior, mean, beside, v=std**2, after=after, before=sigma)
        new = replace(state, z=mean, step=k + 1, shift=shift)
        new = new.reweighted(increment, f" at step {k + 1}, sigma {after:.4g}")
        info = Info(sigma=after, misfit=posterior.misfit(denoised), ess=new.ess)
        if after == 0.0:  # the last weights stay with the draws
            return replace(new, z=denoised), info
        new = new.resampled(self.resampling, noise, self.threshold)
        return replace(new, z=new.z + self._fresh(posterior, noise.like(mean), std**2, after)), info

    def finish(self, posterior: Posterior, state: FilteredState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0, their weights, and the evidence if the trajectory is averaged."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence if self.exact else None)

    # Within.

    def _variances(self, linear: LinearGaussian, v: float, sigma: float) -> tuple[Tensor, Tensor]:
        """S and R' of each coefficient, float64: the potential's variance at sigma with the kernel's, and without."""
        s2 = singular_values(linear) ** 2
        width = linear.noise_std.double() ** 2 + (sigma**2 * s2 if self.exact else 0.0)
        return width + v * s2, torch.broadcast_to(width, s2.shape)

    def _proposal(
        self, posterior: Posterior, mean: Tensor, beside: Tensor | None, *, v: float, after: float, before: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Mean of N(m, v) times the potential at ``after``, and the log-weight, of shape (ensemble, particle).

        ``beside`` is xi of a drawn trajectory, or else the z whose potential at ``before`` divides the weight, if any.
        """
        values: list[Tensor] = []

        def towards_data(linear: LinearGaussian, m: Tensor, *other: Tensor) -> Tensor:
            svd, S = linear.needed_svd(), self._variances(linear, v, after)[0]
            r = svd.u_adjoint(linear.residual(m if self.exact else m - other[0]))
            value = log_density(linear, r, S)
            if self.exact and other:
                at_z = svd.u_adjoint(linear.residual(other[0]))
                value = value - log_density(linear, at_z, self._variances(linear, v, before)[1])
            values.append(value)
            return m + svd.v((v * singular_values(linear) / S).to(m) * r)

        moved = posterior.linear_rows(mean, towards_data, *(() if beside is None else (beside,)))
        return moved, torch.cat(values).reshape(mean.shape[:2])

    def _fresh(self, posterior: Posterior, eps: Tensor, v: float, sigma: float) -> Tensor:
        def std(linear: LinearGaussian) -> Tensor:
            S, width = self._variances(linear, v, sigma)
            return sqrt(v) * (width / S).sqrt()

        return spread(posterior, eps, std)


def log_density(linear: LinearGaussian, r: Tensor, variance: Tensor) -> Tensor:
    """Log N(r; 0, U variance U^H) of coefficients U^H (y - A z) of rows (n, ...), float64, shape (n,).

    What A cannot reach has the variance R, whether or not it has coefficients.
    """
    R = linear.noise_std.double() ** 2
    log_det = (variance / R).log().sum() + prod(linear.operator.out_shape) * (R.log() + log(2.0 * pi))
    return -0.5 * ((r.abs().double() ** 2 / variance).flatten(1).sum(1) + log_det)


def common(noise: Noise, like: Tensor) -> Tensor:
    """Draw standard normals (ensemble, particle, *shape) that are the same for all particles of an ensemble."""
    one = noise.normal(noise.all_slots[:: noise.n], like.shape[2:]).to(like.dtype)  # on every process the first's
    return one[:, None].expand(like.shape)
