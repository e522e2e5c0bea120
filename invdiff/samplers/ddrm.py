r"""Denoising diffusion restoration models, DDRM (Kawar et al. 2022, arXiv 2201.11793, section 3 and eqs. 4 to 8).

In the singular basis of A = U S V^H a state z_sigma = z_0 + sigma eps and the measurement y = A z_0 + n, with n ~ N(0,
sigma_y^2), are independent values: ``c(z) = V^H z`` and, where s > 0, ``y~ = U^H y / s``, which is c(z_0) with noise
sigma_y / s. With D = D(z, sigma) in the place of z_0, the next level sigma' is drawn value by value:

    s = 0                   c' ~ N( c(D) + sqrt(1 - eta^2) sigma' (c(z) - c(D)) / sigma,         eta^2 sigma'^2 )
    s > 0, s sigma' < s_y   c' ~ N( c(D) + sqrt(1 - eta^2) sigma' (y~ - c(D)) / (sigma_y / s),   eta^2 sigma'^2 )
    s > 0, s sigma' >= s_y  c' ~ N( (1 - eta_b) c(D) + eta_b y~,            sigma'^2 - (eta_b sigma_y / s)^2 )

(s_y short for sigma_y). Each leaves the total variance of z' - z_0, over n and the fresh noise, at sigma'^2: the level
that the denoiser is told (proposition 3.1). The start at sigma_max is N(y~, sigma_max^2 - sigma_y^2 / s^2) where s
sigma_max >= sigma_y, and N(mean, sigma_max^2) elsewhere. The last step, to sigma' = 0, returns D.

Fresh noise is ``V^H`` of real white noise, so that coefficients that are complex, or more than there are values, stay
those of real states; and (y~ - c(D)) s = U^H (y - A D), so that nothing is divided by a small s.

Departures: none from the equations. The paper assumes sigma_max >= sigma_y / s for every s > 0; values below it start
as unmeasured ones do. Its code sets small singular values to zero, here those of rounding's size are. The start is
about the prior's mean, the paper's about 0. One public implementation (deepinv 0.5.0) divides the fresh noise by
sqrt(2), which halves the variance of the draws below: at 20 steps to 0.40, 0.14 and 0.24 of the posterior's.

Biased, in no limit exact: D is the prior's denoiser, which knows the measurement through the state alone, fresh noise
of share eta forgets it below sigma_y / s, and the same n is put in again at every level as if it were new. Measured on
inpainting, blur and down-sampling of a Gaussian field (12 x 12, noise 0.05; exact draws give 1, 1, 0.90 and 0) at 20
steps: variance 0.79, 0.27 and 0.47 of the posterior's, whitened norm 0.83, 0.51 and 0.47, 0.79, 0.57 and 0.74 of the
mass in 90 % intervals, and the mean off by 0.74, 0.41 and 0.11 posterior standard deviations; at 100 steps variance
0.50, 0.23 and 0.54, whitened 0.51, 1.48 and 0.57, mass 0.67, 0.42 and 0.77, mean 0.33, 1.00 and 0.12. More steps put n
in more often: at 400 the whitened norm of the blur is 4.7. With eta = 1, which puts it in only while s sigma' >=
sigma_y, at 100 steps: variance 1.30, 0.79 and 0.87, whitened 1.52, 0.96 and 0.96, mass 0.85, 0.83 and 0.84, mean 0.37,
0.34 and 0.42.

Cost: one forward pass a step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import CapabilityError, InputError
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps


@final
@dataclass(frozen=True, kw_only=True)
class DDRM(Annealed):
    """Denoising diffusion restoration models: linear-Gaussian problems with an SVD, one value of it at a time.

    Parameters
    ----------
    steps
        Noise levels.
    eta
        Share of fresh noise where the measurement is absent or noisier than the state, in [0, 1]; the rest is carried
        from the state or taken from the measurement.
    eta_b
        Weight of the measurement against the denoised state where the measurement is less noisy than the state, in [0,
        1].
    levels
        Noise levels.
    """

    steps: int = 50
    eta: float = 0.85
    eta_b: float = 1.0
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{kawar2022ddrm, title={Denoising Diffusion Restoration Models}, "
        "author={Kawar, Bahjat and Elad, Michael and Ermon, Stefano and Song, Jiaming}, "
        "booktitle={NeurIPS}, year={2022}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        for name, value in (("eta", self.eta), ("eta_b", self.eta_b)):
            if not 0.0 <= value <= 1.0:
                raise InputError(f"DDRM's {name} lies in [0, 1], got {value}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and an SVD of the operator with one noise level."""
        return frozenset({"denoiser", "svd"})

    def cost(self) -> Cost:
        """One forward pass a step."""
        return Cost(self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AnnealedState:
        """Draw the first level about the measurement where it is known well enough, else about the prior's mean."""
        first = self.levels.of(posterior, self.steps)[0]
        mean = posterior.noised_mean().expand(ensembles, n, *posterior.shape)
        z = transition(posterior, mean, None, noise.like(mean), sigma=first, eta=1.0, eta_b=1.0)
        return AnnealedState(z=z)

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """Denoise, and draw the next level."""
        levels = self.levels.of(posterior, self.steps)
        sigma, sigma_next = levels[state.step], levels[state.step + 1]
        denoised = posterior.denoise(state.z, sigma)
        z = denoised
        if sigma_next > 0.0:
            eps = (state.z - denoised) / sigma
            z = transition(
                posterior, denoised, eps, noise.like(denoised), sigma=sigma_next, eta=self.eta, eta_b=self.eta_b
            )
        info = Info(sigma=sigma_next, misfit=posterior.misfit(denoised))
        return AnnealedState(z=z, step=state.step + 1), info

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the particles at sigma = 0."""
        return Draws(z=state.z)


def transition(
    posterior: Posterior,
    center: Tensor,
    carried: Tensor | None,
    fresh: Tensor,
    *,
    sigma: float,
    eta: float,
    eta_b: float,
) -> Tensor:
    """Draw z at ``sigma > 0`` given y and z_0 = ``center``: the module's three cases.

    Parameters
    ----------
    posterior
        A linear-Gaussian problem with an SVD.
    center
        What stands for z_0, (ensemble, particle, *shape).
    carried
        Predicted noise of the state that the draw starts from, in units of its level; not needed where eta is 1.
    fresh
        Standard normals.
    sigma, eta, eta_b
        Level of the draw, and the shares.
    """
    rest = sqrt(1.0 - eta**2)

    def towards_data(linear: LinearGaussian, x: Tensor) -> Tensor:
        noise_std = linear.noise_std.to(x)

        def weight(s: Tensor) -> Tensor:
            known = s * sigma >= noise_std
            found = torch.where(known, eta_b / torch.where(known, s, 1.0), rest * sigma / noise_std)
            return torch.where(s > 0.0, found, 0.0)

        return pull(linear, x, weight)

    def fresh_noise(linear: LinearGaussian, x: Tensor) -> Tensor:
        noise_std = linear.noise_std.to(x)

        def std(s: Tensor) -> Tensor:
            known = s * sigma >= noise_std
            left = (sigma**2 - (eta_b * noise_std / torch.where(known, s, 1.0)) ** 2).clamp_min(0.0).sqrt()
            return torch.where(known, left, eta * sigma)

        return spectral(linear, x, std)

    z = center + posterior.linear_rows(center, towards_data) + posterior.linear_rows(fresh, fresh_noise)
    if carried is not None and rest > 0.0:
        unmeasured = posterior.linear_rows(carried, lambda linear, x: spectral(linear, x, lambda s: (s == 0.0).to(s)))
        z = z + rest * sigma * unmeasured
    return z


def pull(linear: LinearGaussian, x: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """V weight(S) U^H (y - A x) for rows x of shape (n, *shape); singular values of rounding's size count as 0."""
    svd = linear.operator.svd
    if svd is None:
        raise CapabilityError(f"{type(linear.operator).__name__} has no SVD, in whose basis this sampler works.")
    r = svd.u_adjoint(linear.residual(x))
    return svd.v(weight(_measured(svd.singular_values.to(device=r.device, dtype=x.dtype))) * r)


def spectral(linear: LinearGaussian, x: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
    """V gain(S) V^H x for rows x of shape (n, *shape); singular values of rounding's size count as 0."""
    svd = linear.operator.svd
    if svd is None:
        raise CapabilityError(f"{type(linear.operator).__name__} has no SVD, in whose basis this sampler works.")
    return svd.gram(lambda s2: gain(_measured(s2.sqrt())), x)


def _measured(s: Tensor) -> Tensor:
    # Whether a value is measured at all must not hang on the rounding of a decomposition.
    return torch.where(s > 1e-12 * s.max(), s, 0.0)
