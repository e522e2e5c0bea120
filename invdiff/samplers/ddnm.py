r"""Denoising diffusion null-space model for noisy measurements, DDNM+ (Wang et al. 2023, arXiv 2212.00490, eqs. 17-19).

For y = A z_0 + n, n ~ N(0, sigma_y^2), and A^+ the pseudo-inverse, each level sigma is left for sigma' in two steps:

    z^ = D - Sigma A^+ (A D - y),                    D = D(z, sigma)
    z' = a z^ + (1 - a) z + Phi^(1/2) eps,           a = 1 - (sigma' / sigma)^2

that is, q(z' | z, z_0 = z^) with another noise Phi in the place of its own tau^2 = sigma'^2 a. The correction replaces
what A sees of D by what was measured, noise included. In the singular basis of A = U S V^H, value by value,

    s = 0                        phi = tau^2
    s > 0, s tau >= a sigma_y    lambda = 1,                                     phi = tau^2 - (a sigma_y / s)^2
    s > 0, s tau < a sigma_y     lambda = sqrt(1 - eta^2) s tau / (a sigma_y),   phi = eta^2 tau^2

makes the noise that a step adds, a lambda sigma_y / s from the measurement and phi fresh, tau^2 in all; with that of
(1 - a) z the total is sigma'^2, the level that the denoiser is told. The last step, to sigma' = 0, returns D.

Time travel (the paper's algorithm 2, after Lugmayr et al. 2022, arXiv 2201.09865): each stretch of ``travel_length``
levels is walked ``repeats`` times, and in between fresh noise takes the state back to the stretch's first level. The
stretches lie end to end.

Departures: eqs. 17-19 have one lambda and eta = 0, as if A^+ n had the same variance everywhere; the singular values'
own, and a share eta of fresh noise, are those of the paper's appendix I. There, and in the published code, z' = z^ plus
noise of variance sigma'^2, a share eta of it fresh: that walk is `DDRM` with eta_b = 1 from another start, and this one
keeps the main text's. The published code travels back by putting noise of the whole level on D; here, as in the paper,
it is put on the state. An operator without an SVD is refused: a pseudo-inverse alone does not tell how large A^+ n is.

Biased, in no limit exact: D is the prior's denoiser, which knows the measurement through the state alone, and the same
n is put in again at every level as if it were new, so that the draws gather about it. Measured on inpainting, blur and
down-sampling of a Gaussian field (12 x 12, noise 0.05; exact draws give 1, 1, 0.90 and 0) at 20 steps: variance 0.67,
0.64 and 0.58 of the posterior's, whitened norm 0.68, 0.70 and 0.57, 0.75, 0.81 and 0.79 of the mass in 90 % intervals,
and the mean off by 0.69, 0.16 and 0.17 posterior standard deviations; at 100 steps variance 0.95, 0.74 and 0.75,
whitened 0.99, 0.80 and 0.78, mass 0.85, 0.82 and 0.84, mean 0.57, 0.31 and 0.16. At 100 steps with the paper's
eta = 0.85: variance 0.71, 0.37 and 0.65, whitened 0.83, 4.86 and 0.71, mass 0.67, 0.36 and 0.81, mean 0.57, 1.90 and
0.22.

Cost: ``repeats`` forward passes a level.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import InputError
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps
from invdiff.samplers.ddrm import pull, spectral


@final
@dataclass(frozen=True, kw_only=True)
class DDNM(Annealed):
    """Denoising diffusion null-space model for noisy linear-Gaussian problems with an SVD.

    Parameters
    ----------
    steps
        Noise levels.
    eta
        Share of fresh noise where the measurement is noisier than what a step adds, in [0, 1]; the rest is the
        measurement's. 0 is the paper's eq. 19; the paper's 0.85 diverged on Gaussian deblurring under photos-64.
    travel_length
        Levels of a stretch of time travel.
    repeats
        Walks of each stretch; 1 is no time travel.
    levels
        Noise levels.
    """

    steps: int = 100
    eta: float = 1.0
    travel_length: int = 1
    repeats: int = 1
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{wang2023ddnm, "
        "title={Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model}, "
        "author={Wang, Yinhuai and Yu, Jiwen and Zhang, Jian}, "
        "booktitle={ICLR}, year={2023}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0.0 <= self.eta <= 1.0:
            raise InputError(f"DDNM's eta lies in [0, 1], got {self.eta}.")
        for name, value in (("travel_length", self.travel_length), ("repeats", self.repeats)):
            if value < 1:
                raise InputError(f"DDNM's {name} is at least 1, got {value}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and an SVD of the operator with one noise level."""
        return frozenset({"denoiser", "svd"})

    def cost(self) -> Cost:
        """``repeats`` forward passes a level."""
        return Cost(self.steps * self.repeats)

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """One level; at the end of a stretch, its other walks too."""
        levels, k = self.levels.of(posterior, self.steps), state.step
        z, denoised = self._walk(posterior, state.z, levels[k : k + 2], noise)
        if (k + 1) % self.travel_length == 0 or k + 1 == self.steps:
            stretch = levels[k - k % self.travel_length : k + 2]
            for _ in range(self.repeats - 1):
                z = z + sqrt(stretch[0] ** 2 - stretch[-1] ** 2) * noise.like(z)
                z, denoised = self._walk(posterior, z, stretch, noise)
        return AnnealedState(z=z, step=k + 1), Info(sigma=levels[k + 1], misfit=posterior.misfit(denoised))

    def _walk(self, posterior: Posterior, z: Tensor, levels: tuple[float, ...], noise: Noise) -> tuple[Tensor, Tensor]:
        """Take z at the first level to the last; return it with the last D."""
        denoised = z
        for sigma, sigma_next in pairwise(levels):
            denoised = posterior.denoise(z, sigma)
            if sigma_next == 0.0:
                return denoised, denoised
            a = 1.0 - (sigma_next / sigma) ** 2
            corrected, eps = correction(posterior, denoised, noise.like(z), a=a, tau=sigma_next * sqrt(a), eta=self.eta)
            z = a * corrected + (1.0 - a) * z + eps
        return z, denoised

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0."""
        return Draws(z=state.z)


def correction(
    posterior: Posterior, denoised: Tensor, fresh: Tensor, *, a: float, tau: float, eta: float
) -> tuple[Tensor, Tensor]:
    """Return z^ = D - Sigma A^+ (A D - y) and Phi^(1/2) eps: the module's three cases.

    Parameters
    ----------
    posterior
        A linear-Gaussian problem with an SVD.
    denoised, fresh
        D and standard normals eps, (ensemble, particle, *shape).
    a, tau
        Weight of z^ in the next state, and standard deviation of the noise that a step adds, both positive.
    eta
        Share of fresh noise where the measurement is noisier than that.
    """

    def towards_data(linear: LinearGaussian, x: Tensor) -> Tensor:
        noise_std = linear.noise_std.to(x)

        def weight(s: Tensor) -> Tensor:  # lambda / s, which stays finite as s falls
            known = s * tau >= a * noise_std
            found = torch.where(known, 1.0 / torch.where(known, s, 1.0), sqrt(1.0 - eta**2) * tau / (a * noise_std))
            return torch.where(s > 0.0, found, 0.0)

        return pull(linear, x, weight)

    def fresh_noise(linear: LinearGaussian, x: Tensor) -> Tensor:
        own = a * linear.noise_std.to(x)

        def std(s: Tensor) -> Tensor:
            known = s * tau >= own
            left = (tau**2 - (own / torch.where(known, s, 1.0)) ** 2).clamp_min(0.0).sqrt()
            return torch.where(s > 0.0, torch.where(known, left, eta * tau), tau)

        return spectral(linear, x, std)

    return denoised + posterior.linear_rows(denoised, towards_data), posterior.linear_rows(fresh, fresh_noise)
