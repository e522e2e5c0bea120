r"""Monte Carlo guided diffusion, MCGDiff (Cardoso et al. 2023, arXiv 2308.07983).

In the singular basis of A = U S V^H the measurement says y~_i = (U^H y)_i / s_i = x_i + (sigma_y / s_i) n_i of the
value x_i = (V^H z_0)_i: as much as the state at the level tau_i = sigma_y / s_i, of which y~_i is taken to be the
value. Weighted particles walk down the levels by the prior's own ancestral step, z' ~ N(m, v) of `tds`, with for each
value that is measured the potential, while sigma >= tau_i,

    psi_sigma(z) = N(y~_i; x_i, sigma^2 - (1 - kappa) tau_i^2)

which at tau_i is all but a point. Both the proposal z' ~ K(z' | z) psi'(z') and its weight have closed forms, value by
value, m_i, v and psi' = N(y~_i; x'_i, r'_i):

    w <- w N(y~_i; m_i, v + r'_i) / psi(z),   x'_i ~ N(m_i + k_i (y~_i - m_i), v (1 - k_i)),   k_i = v / (v + r'_i)

The weight does not depend on z', so that resampling comes before the draw. The step that crosses tau_i is made in two
with the same D: to tau_i with its potential (r' = kappa tau_i^2), and on to sigma' by the prior alone. Below tau_i a
value is the prior's own; values with tau_i > sigma_max are weighted by their likelihood at the end, where z' = D. The
start is N(mean, sigma_max^2) psi, and its mass the first factor of the evidence: an estimate, without bias, of the
density in y of the chain's own values at their levels tau_i.

Departures: the published code (mcg_diff) draws the steps across and below tau_i by the prior, divides by psi where they
cross, and multiplies by p(y | z_0) at the end: the weights of ``bridge=False``, which telescope to p(y | z_0), so that
the target is the posterior of the discretised prior for any kappa. But for a small kappa their variance is infinite: at
the level tau the particles lie within sqrt(kappa) tau of y~, and under that target within sqrt(2) tau. The code leaves
out the potentials' determinants, which the evidence needs.

Exact as particles and steps grow, kappa -> 0, sigma_min -> 0 and sigma_max -> infinity. Measured on the mixtures of
`invdiff.diagnostics.mixtures`, of which 1, 2 and 4 combinations are measured with noise 0.3 (120 steps, 4 ensembles of
4096 particles; docs/mixtures.json):

    dimensions                           2       4       8
    sliced distance W2                   0.029   0.034   0.086     exact draws: 0.014   0.016   0.019
    rms error of log evidence, nats      0.21    0.18    0.22
    the same with bridge=False           0.095   0.140   0.301
                                         0.31    2.58    2.47

The error of the chain is of first order: the target on a Gaussian in two dimensions has, in closed form, 0.61, 0.90
and 0.96 of the posterior's variance at 30, 150 and 400 steps. Draws with bridge=False have 0.76 and 0.78 at 30 and 150.
Without resampling the weights have long tails: hence the threshold. Particles must grow exponentially with what the
measurement tells: on fields and pictures a few hundred collapse, and ``ess`` in the trace shows it.

Cost: one forward pass a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf, isinf, log, pi, prod
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
from invdiff.samplers.particles import Resampling, Systematic, Weighted, check_threshold


@final
@dataclass(frozen=True, kw_only=True)
class MCGDiff(Sampler):
    """Sequential Monte Carlo that meets each singular value's measurement at the level of its noise.

    Parameters
    ----------
    steps
        Noise levels.
    kappa
        Variance of the potential at its own level, as a share of tau^2; in (0, 1].
    bridge
        Whether steps stop at tau on their way. False is the published code: weights that end at p(y | z_0), of
        infinite variance for small kappa.
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
    kappa: float = 1e-4
    bridge: bool = True
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 1.0
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{cardoso2024mcgdiff, title={Monte Carlo Guided Denoising Diffusion Models for {B}ayesian Linear "
        "Inverse Problems}, author={Cardoso, Gabriel and Janati El Idrissi, Yazid and Le Corff, Sylvain and "
        "Moulines, Eric}, booktitle={ICLR}, year={2024}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_threshold(self.threshold)
        if not 0.0 < self.kappa <= 1.0:
            raise InputError(f"MCGDiff's kappa is a share of the noise's variance, in (0, 1]; got {self.kappa}.")

    @property
    def exact(self) -> bool:
        """As particles and steps grow and kappa falls."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and an SVD of the operator with one noise level."""
        return frozenset({"denoiser", "svd"})

    def cost(self) -> Cost:
        """One forward pass a step."""
        return Cost(self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> Weighted:
        """Gaussian noise about the prior's mean at the first level, given the potential there."""
        sigma = self.levels.of(posterior, self.steps)[0]
        mean = posterior.noised_mean().expand(ensembles, 1, *posterior.shape)
        masses: list[Tensor] = []

        def towards_data(linear: LinearGaussian, x: Tensor) -> Tensor:
            move, svd = self._move(linear, inf, sigma), linear.needed_svd()
            r = svd.u_adjoint(linear.residual(x))
            masses.append(log_normal(r, move.total, move.weighed))
            return svd.v(move.gain.to(x) * r)

        mean = mean + posterior.linear_rows(mean, towards_data)
        fresh = noise.like(mean.expand(ensembles, n, *posterior.shape))
        z = mean + spread(posterior, fresh, lambda linear: self._move(linear, inf, sigma).std)
        log_weights = torch.cat(masses)[:, None].expand(ensembles, n).contiguous()
        return Weighted.begin(z, log_weights, shard=noise.shard)

    def done(self, state: Weighted) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: Weighted) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: Weighted, *, noise: Noise) -> tuple[Weighted, Info]:
        """Weight by what the next level's potential will be, resample, and draw the next level."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        sigma, after = levels[k], levels[k + 1]
        denoised = posterior.denoise(state.z, sigma)
        increments: list[Tensor] = []

        def propose(linear: LinearGaussian, z: Tensor, d: Tensor) -> Tensor:
            move, svd = self._move(linear, sigma, after), linear.needed_svd()
            at_z, at_d = svd.u_adjoint(linear.residual(z)), svd.u_adjoint(linear.residual(d))
            r = at_d + move.share.to(z) * (at_z - at_d)
            increment = log_normal(r, move.total, move.weighed) - log_normal(at_z, move.before, move.known)
            if after == 0.0 and self.bridge:
                increment = increment + self._never_met(linear, at_d, levels[0])
            increments.append(increment)
            return d + (after / sigma) ** 2 * (z - d) + svd.v(move.gain.to(z) * r)

        mean = posterior.linear_rows(state.z, propose, denoised)
        increment = torch.cat(increments).reshape(state.log_weights.shape)
        if after == 0.0 and not self.bridge:
            increment = increment + posterior.log_likelihood(denoised).double()
        new = replace(state, z=mean, step=k + 1).reweighted(increment, f" at step {k + 1}, sigma {after:.4g}")
        info = Info(sigma=after, misfit=posterior.misfit(denoised), ess=new.ess)
        if after == 0.0:  # the last weights stay with the draws
            return replace(new, z=denoised), info
        new = new.resampled(self.resampling, noise, self.threshold)
        fresh = spread(posterior, noise.like(mean), lambda linear: self._move(linear, sigma, after).std)
        return replace(new, z=new.z + fresh), info

    def finish(self, posterior: Posterior, state: Weighted, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _move(self, linear: LinearGaussian, sigma: float, after: float) -> "Move":
        """Plan a step; from sigma = infinity the start, a draw of N(mean, sigma'^2) psi'."""
        s = singular_values(linear)
        R = linear.noise_std.double() ** 2
        stays = s * after >= R.sqrt()
        known = stays if isinf(sigma) else s * sigma >= R.sqrt()
        weighed = known if self.bridge else stays
        # Square of the level where the potential is taken: tau on the way, else the next.
        end = torch.where(weighed & ~stays, R / torch.where(known, s, 1.0) ** 2, after**2)
        share = end / sigma**2
        v = end * (1.0 - share).clamp_min(0.0)
        width = s**2 * end - (1.0 - self.kappa) * R
        total = torch.where(weighed, s**2 * v + width, 1.0)
        on = after**2 / torch.where(end > 0.0, end, 1.0)
        left = torch.where(weighed, v * width / total, v)
        return Move(
            known=known,
            before=torch.where(known, s**2 * sigma**2 - (1.0 - self.kappa) * R, 1.0),
            weighed=weighed,
            total=total,
            share=share,
            gain=torch.where(weighed, on * s * v / total, 0.0),
            std=(on**2 * left + (end - after**2).clamp_min(0.0) * on).sqrt(),
        )

    @staticmethod
    def _never_met(linear: LinearGaussian, r: Tensor, first: float) -> Tensor:
        """Log-likelihood of the values with tau above the first level, and of what A cannot reach."""
        R = linear.noise_std.double() ** 2
        met = singular_values(linear) * first >= R.sqrt()
        square = torch.where(met, 0.0, r.abs().double() ** 2).flatten(1).sum(1) / R
        return -0.5 * (square + (prod(linear.operator.out_shape) - met.sum()) * (R.log() + log(2.0 * pi)))


@dataclass(frozen=True)
class Move:
    """A step from sigma to sigma' for each coefficient, float64; potentials and variances are in y's units.

    Parameters
    ----------
    known, before
        Where there is a potential at sigma, and its variance.
    weighed, total
        Where one is taken on the way, and its variance with the kernel's, s^2 v + s^2 r'.
    share
        Of z - D in the mean where it is taken.
    gain
        Of the residual y - A m in the mean at sigma'.
    std
        Standard deviation at sigma', latent units.
    """

    known: Tensor
    before: Tensor
    weighed: Tensor
    total: Tensor
    share: Tensor
    gain: Tensor
    std: Tensor


def singular_values(linear: LinearGaussian) -> Tensor:
    """Of each coefficient, float64: potentials in single precision would lose what is left at their own level."""
    values: Tensor = linear.needed_svd().singular_values.to(device=linear.measurement.device, dtype=torch.float64)
    return values


def log_normal(r: Tensor, variance: Tensor, counted: Tensor) -> Tensor:
    """Log-density of N(0, variance) at the counted coefficients r of rows (n, ...), float64, shape (n,).

    Complex coefficients are those of real values in an orthonormal basis: each has as much of the square and of the
    determinant as a real one.
    """
    exponent = r.abs().double() ** 2 / variance + (2.0 * pi * variance).log()
    return -0.5 * torch.where(counted, exponent, 0.0).flatten(1).sum(1)


def spread(posterior: Posterior, fresh: Tensor, std: Callable[[LinearGaussian], Tensor]) -> Tensor:
    """V std V^H of fresh white noise (ensemble, particle, *shape)."""

    def scaled(linear: LinearGaussian, x: Tensor) -> Tensor:
        svd = linear.needed_svd()
        return svd.v(std(linear).to(x) * svd.v_adjoint(x))

    return posterior.linear_rows(fresh, scaled)
