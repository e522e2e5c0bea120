r"""Twisted diffusion sampler, TDS (Wu et al. 2023, arXiv 2306.17775, algorithm 1).

Weighted particles walk down the noise levels towards p_sigma(z) psi_sigma(z), where the twisting function

    psi_sigma(z) = N(y; A D(z, sigma), R + r^2 A A^T),   r^2 = sigma^2 tau^2 / (sigma^2 + tau^2),   psi_0 = p(y | z)

guesses p(y | z_sigma = z) from the denoised state D. The prior's own chain is ancestral sampling,

    K(z' | z) = N(m, v),   m = D + (sigma'^2 / sigma^2) (z - D),   v = (sigma^2 - sigma'^2) sigma'^2 / sigma^2

and with g = gradient of log psi_sigma at z, through the network, a step to sigma' proposes and weights by

    z' ~ q = N(m + v g, v),   w <- w  K(z' | z) / q(z' | z)  psi_sigma'(z') / psi_sigma(z)

where log K / q = -sqrt(v) eps.g - v |g|^2 / 2 for the noise eps of z'. The first weight is psi at sigma_max; the last
step is z' = D with the weight p(y | z') / psi. The product telescopes: psi cancels but at the end, so that any positive
psi gives the posterior of the discretised prior, and the weights' means the evidence without bias.

This freedom is used where R + r^2 A A^T has no closed form (no SVD, or R not scalar): ||A||^2 stands for A A^T, in the
solution and in the determinant; and for likelihoods that are not linear-Gaussian, where psi is p(y | D) to the power
1 / (1 + r^2 / noise_std^2), or plain, which is so narrow at high noise that it needs many particles. The shift v g is
cut to the length sqrt(d) sigma of the noise in the state: a narrow psi can ask for steps that diverge.

Departures: the paper's code shifts by (sigma^2 - sigma'^2) g, which is more than v g by sigma^2 / sigma'^2; v g is what
a linear log psi asks for. Resampling waits for the effective sample size to fall below a threshold.

Exact as particles grow, for the discretised prior, whose own error vanishes as steps grow, sigma_min -> 0 and
sigma_max -> infinity (the start is N(mean, sigma_max^2)). Measured on the mixtures of `invdiff.diagnostics.mixtures`,
of which 1, 2 and 4 combinations are measured with noise 0.3 (120 steps, 4096 particles; 16 ensembles where tau is the
prior's 2.4 to 2.6, 4 where it is 1; docs/mixtures.json):

    dimensions                           2       4       8
    sliced distance W2                   0.028   0.041   0.071     exact draws: 0.014   0.016   0.019
    rms error of log evidence, nats      0.04    0.05    0.18
    the same with tau = 1                0.053   0.124   0.112
                                         0.29    0.39    1.56

The error of the chain is the prior's own: ancestral steps are of first order, and leave a Gaussian in two dimensions
with 0.90, 0.93 and 0.98 of the posterior's variance at 60, 150 and 400 steps. Particles must grow exponentially with
what the measurement tells: fields and pictures with many measured values collapse to few ancestors, which ``ess`` in
the trace shows.

Cost: one forward pass a step, and one backward pass for each but the last.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Block, Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.particles import Resampling, Systematic, Weighted, alive, check_threshold


@dataclass(frozen=True, kw_only=True)
class TwistedState(Weighted):
    """Weighted particles at a noise level, with what the network said there.

    Parameters
    ----------
    denoised
        D(z, sigma), of z's shape.
    log_twist
        Log psi_sigma(z), float64, shape (ensemble, particle).
    gradient
        Gradient of log psi_sigma at z, of z's shape; zero at the last level, where no step uses it.
    """

    denoised: Tensor
    log_twist: Tensor
    gradient: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class TDS(Sampler):
    """Sequential Monte Carlo with proposals and weights twisted by the denoised state's likelihood.

    Parameters
    ----------
    steps
        Noise levels.
    prior_std
        tau, latent units: the standard deviation of the prior's values; from the prior's curvature where it has one,
        else 1, if None.
    path
        What widens the likelihood at D by the denoiser's error r: Noised(), Noised(kappa=0.0) for plain p(y | D), or
        Tempered(scale=...). If None, Noised() for linear-Gaussian problems, else Tempered(scale=noise_std), and plain
        where the likelihood has no noise_std.
    resampling
        Systematic(), Stratified() or Residual().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].
    levels
        Noise levels.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 100
    prior_std: float | None = None
    path: Path | None = None
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{wu2023tds, "
        "title={Practical and Asymptotically Exact Conditional Sampling in Diffusion Models}, "
        "author={Wu, Luhuan and Trippe, Brian L. and Naesseth, Christian A. and Blei, David M. and "
        "Cunningham, John P.}, booktitle={NeurIPS}, year={2023}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_threshold(self.threshold)
        check_prior_std(self.prior_std)

    @property
    def exact(self) -> bool:
        """As the number of particles grows, whatever the twisting."""
        return True

    def requires(self) -> frozenset[str]:
        """Denoiser and likelihood with gradients; a linear problem for Noised() if it is asked for."""
        linear = isinstance(self.path, Noised) and self.path.kappa > 0.0
        return frozenset({"denoiser", "denoiser_vjp", "likelihood_gradient"} | ({"linear"} if linear else set()))

    def cost(self) -> Cost:
        """One forward pass a step, one backward pass for each but the last."""
        return Cost(self.steps, self.steps - 1)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> TwistedState:
        """Gaussian noise about the prior's mean at the first level, weighted by psi."""
        sigma = self.levels.of(posterior, self.steps)[0]
        center = posterior.noised_mean().expand(ensembles, n, *posterior.shape)
        z = center + sigma * noise.like(center)
        denoised, log_twist, gradient = self._look(posterior, z, sigma, with_gradient=self.steps > 1)
        state = TwistedState.begin(
            z, log_twist, shard=noise.shard, denoised=denoised, log_twist=log_twist, gradient=gradient
        )
        return state.resampled(self.resampling, noise, self.threshold)

    def done(self, state: TwistedState) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: TwistedState) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: TwistedState, *, noise: Noise) -> tuple[TwistedState, Info]:
        """Propose with the gradient, look at the next level, weight, and resample."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        sigma, after = levels[k], levels[k + 1]
        misfit = posterior.misfit(state.denoised)
        when = f" at step {k + 1}, sigma {after:.4g}"
        if after == 0.0:
            z = state.denoised
            increment = posterior.log_likelihood(z).double() - state.log_twist
            new = replace(state, z=z, step=k + 1).reweighted(alive(state, increment), when)
            return new, Info(sigma=after, misfit=misfit, ess=new.ess)  # the last weights stay with the draws
        mean, std = ancestral(state.z, state.denoised, sigma, after)
        shift = std * state.gradient  # in units of the step's noise
        length = shift.flatten(2).norm(dim=2).clamp_min(torch.finfo(shift.dtype).tiny)
        longest = sqrt(state.z[0, 0].numel()) * sigma / std
        shift = shift * (longest / length).clamp_max(1.0).reshape(*length.shape, *[1] * (shift.ndim - 2))
        eps = noise.like(mean)
        z = mean + std * (shift + eps)
        kernel = -((eps + 0.5 * shift).double() * shift.double()).flatten(2).sum(2)
        denoised, log_twist, gradient = self._look(posterior, z, after, with_gradient=k + 2 < self.steps)
        increment = kernel + log_twist - state.log_twist
        new = replace(state, z=z, step=k + 1, denoised=denoised, log_twist=log_twist, gradient=gradient)
        new = new.reweighted(alive(state, increment), when)
        info = Info(sigma=after, misfit=misfit, ess=new.ess)
        return new.resampled(self.resampling, noise, self.threshold), info

    def finish(self, posterior: Posterior, state: TwistedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _look(
        self, posterior: Posterior, z: Tensor, sigma: float, *, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D, log psi and its gradient at z."""
        r, path = denoiser_std(posterior, sigma, self.prior_std), twisting_path(posterior, self.path)
        if not with_gradient:
            denoised = posterior.denoise(z, sigma)
            return denoised, posterior.potential(r, path)(denoised)[0].double(), torch.zeros_like(z)
        values: list[Tensor] = []

        def cotangent(block: Block) -> Tensor:
            value, grad = path.potential(r, block.linear, block.log_likelihood_and_grad)(block.denoised)
            values.append(value.double())
            # A dead particle has no gradient to follow.
            return torch.where(torch.isneginf(value).reshape(-1, *[1] * (grad.ndim - 1)), 0.0, grad)

        denoised, gradient = posterior.denoise_vjp(z, sigma, cotangent)
        return denoised, torch.cat(values).reshape(z.shape[:2]), gradient


def ancestral(z: Tensor, denoised: Tensor, sigma: float, after: float) -> tuple[Tensor, float]:
    """Mean and standard deviation of the prior's own step from sigma to ``after``, as `Ancestral` with eta = 1."""
    share = (after / sigma) ** 2
    return denoised + share * (z - denoised), after * sqrt(1.0 - share)


def twisting_path(posterior: Posterior, path: Path | None) -> Path:
    """Return the path; if None, the noised one for linear-Gaussian problems, and for others what the noise allows.

    Without a linear problem the widened noise is taken as noise_std^2 + r^2, as of an operator with derivative 1, and
    the likelihood is tempered by noise_std^2 over it; where noise_std is not known either it is taken as it is.
    """
    if path is not None:
        return path
    if posterior.linear is not None:
        return Noised()
    return Noised(kappa=0.0) if posterior.noise_std is None else Tempered(scale=posterior.noise_std)


def denoiser_std(posterior: Posterior, sigma: float, prior_std: float | None) -> float:
    """Spread r of z_0 given z_sigma under N(., tau^2): r^2 = sigma^2 tau^2 / (sigma^2 + tau^2); latent units."""
    tau = prior_std
    if tau is None:
        curvature = posterior.curvature
        tau = 1.0 if curvature is None else float(curvature.variance(posterior.sigma_max).mean().sqrt())
    return sigma * tau / sqrt(sigma**2 + tau**2)


def check_prior_std(prior_std: float | None) -> None:
    """Raise InputError unless a prior's standard deviation is positive, or None."""
    if prior_std is not None and not prior_std > 0.0:
        raise InputError(f"prior_std is the standard deviation of the prior's values, positive; got {prior_std}.")
