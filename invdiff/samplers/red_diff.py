r"""Regularisation by denoising diffusion, RED-diff (Mardani et al. 2024, arXiv 2305.04391, algorithm 1).

A point mu stands for q = N(mu, s^2 identity) with s -> 0, and is moved down a falling ladder of sigma by Adam with

    G = -gradient log p(y | mu) + w(sigma) (sg[e(mu + sigma eps)] - eps),    e(z) = (z - D(z, sigma)) / sigma

without a gradient of the network (sg). Since e - eps = (mu - D) / sigma, the paper's weight, in proportion to 1 / SNR =
sigma, makes the second term a pull towards the denoised state that does not depend on sigma:

    w(sigma) = lambda L sigma,    G = -gradient log p(y | mu) + lambda L (mu - D(mu + sigma eps, sigma))

L (1 / latent unit^2) is the curvature of the data term, and lambda a pure number: the paper's |y - A mu|^2 / 2 is the
true term over L where ||A|| = 1 and the noise is white, whatever noise_std. Adam moves a value by at most about lr
(latent units) a step, for any scale of G, so neither setting knows the noise. L is ||A||^2 / min noise_std^2 for linear
problems; for others the largest |change of the gradient| / |change of mu| along the particle's own way, forgotten as
fast as Adam's second moment.

Departures: the denoiser is never asked below ``s*`` = 1 / sqrt(lambda L). The mean of (mu - D) / sigma^2 is the
gradient of -log p_sigma about mu, so above ``s*`` the term exceeds the prior's own, at ``s*`` it is that, with the
true likelihood, and below it fades as sigma^2: the paper's walk to sigma = 0 ends at the maximum of the likelihood if
given the time, which fits the noise (on the blur below, 400 steps, 3.5 posterior standard deviations off). The walk
starts from the prior's mean, which every problem has, not from the pseudo-inverse of the measurement; levels are
those of Karras et al. 2022, not equal steps of a variance-preserving schedule; mu is the draw, without noise of s.

Biased: it optimises. Every particle is a run of its own with noise of its own, and the draws are near one mode, spread
by the optimiser's noise (lr and lambda set it), not samples of the posterior. Measured on inpainting, blur and
down-sampling of a Gaussian field (12 x 12, noise 0.05; exact draws give 1, 1 and 0.90), with the defaults:

    steps    variance             whitened norm        mass in 90 % intervals
        50   0.33   0.18   0.08   0.35   0.20   0.09   0.58   0.50   0.36
       100   0.34   0.23   0.11   0.36   0.22   0.11   0.59   0.57   0.41
       400   0.32   0.28   0.12   0.35   0.25   0.12   0.60   0.61   0.43

The mean is off by 0.27, 0.08 and 0.13 posterior standard deviations at 100 steps, and no less at 400 (0.05 is what 400
exact draws leave). With lr = 0.01 (0.075 by default here) and 100 steps the variance is 0.05, 0.03 and 0.01.

Cost: one forward pass and one likelihood gradient a step, none backward through the network.
"""

from dataclasses import dataclass, field, replace
from math import inf
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Levels, check_steps


@final
@dataclass(frozen=True, kw_only=True)
class AdamState(State):
    """The points mu, and what Adam and the curvature remember of their way.

    Parameters
    ----------
    first, second
        Adam's running means of G and of its square, shape of z; not yet divided by 1 - beta^step.
    gradient
        Gradient of log p(y | mu) before the last step, shape of z.
    curvature
        L by particle, (ensemble, particle), 1 / latent unit^2; 0 where nothing is known yet.
    """

    first: Tensor
    second: Tensor
    gradient: Tensor
    curvature: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class REDDiff(Sampler):
    """Stochastic optimisation of a point under denoisers of falling noise.

    Parameters
    ----------
    steps
        Noise levels, each a step of Adam.
    lam
        lambda, the pull of the denoiser in units of the data term's curvature, positive; the paper's 0.25.
    lr
        Adam's learning rate, latent units: about the largest change of a value in a step. sigma_max / 800 if None,
        which is the paper's 0.1 for pictures in [-1, 1] and sigma_max 80.
    betas
        Forgetting of Adam's first and second moments, in [0, 1); the published code's.
    levels
        Noise levels.

    Raises
    ------
    InputError
        If steps, lam or lr are not positive, or the betas are not in [0, 1).
    """

    steps: int = 100
    lam: float = 0.25
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{mardani2024reddiff, "
        "title={A Variational Perspective on Solving Inverse Problems with Diffusion Models}, "
        "author={Mardani, Morteza and Song, Jiaming and Kautz, Jan and Vahdat, Arash}, "
        "booktitle={ICLR}, year={2024}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0.0 < self.lam < inf:
            raise InputError(f"REDDiff's lam is a positive weight, got {self.lam}.")
        if self.lr is not None and not 0.0 < self.lr < inf:
            raise InputError(f"REDDiff's lr is a positive length in latent units, or None, got {self.lr}.")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise InputError(f"REDDiff's betas lie in [0, 1), got {self.betas}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Denoiser, and a likelihood with gradient."""
        return frozenset({"denoiser", "likelihood_gradient"})

    def cost(self) -> Cost:
        """One forward pass a step."""
        return Cost(self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AdamState:  # noqa: ARG002 the contract's
        """Return the prior's mean for every particle."""
        self.levels.of(posterior, self.steps)  # levels that do not fit the prior are refused here
        z = posterior.noised_mean().expand(ensembles, n, *posterior.shape).clone()
        linear = posterior.linear
        known = 0.0 if linear is None else (linear.norm() / linear.least_noise_std) ** 2
        zero = torch.zeros_like(z)
        return AdamState(z=z, first=zero, second=zero, gradient=zero, curvature=z.new_full((ensembles, n), known))

    def step(self, posterior: Posterior, state: AdamState, *, noise: Noise) -> tuple[AdamState, Info]:
        """One step of Adam at one noise level."""
        levels, k, mu = self.levels.of(posterior, self.steps), state.step, state.z
        _, gradient = posterior.log_likelihood_and_grad(mu)
        curvature = state.curvature
        if posterior.linear is None and k > 0:
            change, moved = _norms(gradient - state.gradient), _norms(self._move(posterior, state))
            curvature = torch.maximum(self.betas[1] * curvature, torch.where(moved > 0.0, change / moved, 0.0))
        weight = _like(self.lam * curvature, mu)
        # The ladder's level, but none below 1 / sqrt(lambda L); infinite, and so sigma_max, where L is not known.
        sigma = (self.lam * curvature).rsqrt().clamp(min=levels[k], max=posterior.sigma_max)
        denoised = posterior.denoise(mu + _like(sigma, mu) * noise.like(mu), sigma)
        total = weight * (mu - denoised) - gradient
        new = replace(
            state,
            step=k + 1,
            first=self.betas[0] * state.first + (1.0 - self.betas[0]) * total,
            second=self.betas[1] * state.second + (1.0 - self.betas[1]) * total**2,
            gradient=gradient,
            curvature=curvature,
        )
        new = replace(new, z=mu + self._move(posterior, new))
        return new, Info(sigma=levels[k + 1], misfit=posterior.misfit(new.z))

    def _move(self, posterior: Posterior, state: AdamState) -> Tensor:
        """Return the last step of Adam, which follows from its moments; without their bias towards zero."""
        lr = posterior.sigma_max / 800.0 if self.lr is None else self.lr
        first, second = (
            m / (1.0 - beta**state.step) for m, beta in zip((state.first, state.second), self.betas, strict=True)
        )
        return -lr * first / (second.sqrt() + torch.finfo(first.dtype).tiny)

    def done(self, state: AdamState) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: AdamState) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def finish(self, posterior: Posterior, state: AdamState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the points."""
        return Draws(z=state.z)


def _norms(z: Tensor) -> Tensor:
    """Euclidean length of each particle, (ensemble, particle)."""
    lengths: Tensor = torch.linalg.vector_norm(z.flatten(2), dim=2)
    return lengths


def _like(values: Tensor, z: Tensor) -> Tensor:
    """Values by particle, shaped to multiply z."""
    return values.reshape(*values.shape, *[1] * (z.ndim - 2))
