r"""Denoising diffusion for plug-and-play image restoration, DiffPIR (Zhu et al. 2023, arXiv 2305.08995, algorithm 1).

At each level sigma of a falling ladder, with D = D(z, sigma):

    1. x_0 = argmin_x |y - A x|^2 / (2 noise_std^2) + lambda |x - D|^2 / (2 sigma^2), the proximal point of the data
    2. e = (z - x_0) / sigma, the noise that x_0 leaves in z
    3. z' = x_0 + sigma' (sqrt(1 - zeta) e + sqrt(zeta) eps)

The first line is the paper's argmin |y - A x|^2 + rho |x - D|^2 with rho = lambda noise_std^2 / sigma^2, and is solved
exactly, ``x_0 = D + C A^T (R + C A A^T)^{-1} (y - A D)`` with ``C = (sigma^2 / lambda) identity``. zeta = 0 is DDIM,
zeta = 1 forgets z. The last level's x_0 is the draw, as in the paper (its sigma' is 0).

Departures: the published code takes the noise in [0, 1] and sigma in [-1, 1], so that its data step trusts the
measurement four times as much (its lambda = 1 is 1/4 here); here both are in latent units and lambda is the paper's. It
starts from the noised measurement, which only some operators allow; here the start is N(mean, sigma_max^2). It leaves
out the last level's data step and returns z, still noisy; here the algorithm is followed. Levels are those of Karras et
al. 2022, not the quadratic skips of a thousand.

Biased: C stands for the covariance of z_0 given z, which is smaller where sigma is not small beside the prior's spread,
and sqrt(1 - zeta) takes more of the variance at low sigma than the fresh noise gives back. With lambda = 1 a level
at low sigma is a Langevin step of size zeta sigma^2 / 2, so that with many levels the law nears the posterior, but
for the size of those steps: for Gaussian priors the variance tends to (1 + sqrt(1 - zeta)) / 2 of the posterior's, 0.92
at 0.3, 0.72 at 0.8 and 0.5 at 1. Measured on inpainting, blur and down-sampling of a Gaussian field (12 x 12, noise
0.05; exact draws give 1, 1 and 0.90), with the defaults but for the levels:

    levels   variance             whitened norm        mass in 90 % intervals   mean, posterior std (exact: 0.05)
        50   0.72   0.60   0.61   0.73   0.62   0.61   0.81   0.79   0.80       0.47   0.17   0.07
       100   0.73   0.66   0.66   0.71   0.66   0.67   0.83   0.82   0.82       0.30   0.09   0.06
       400   0.72   0.71   0.71   0.72   0.71   0.70   0.84   0.83   0.83       0.13   0.05   0.05

With zeta = 0.3 the variance is 1.04, 0.81 and 0.84 at 100 levels and 0.96, 0.89 and 0.90 at 400, the mass 0.88, 0.85
and 0.87 and 0.89, 0.88 and 0.88, but the mean is 0.56, 0.25 and 0.09 off at 100: with less fresh noise the errors of
the first levels last longer, and on photographs they stay visible, hence the default of 0.8 in place of the published
0.3. With zeta = 0.1 and lambda = 7, as other packages have it, the field's variance is 2.5, 1.3 and 1.4.

Cost: one forward pass a level, none backward; one proximal step a level.
"""

from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.errors import InputError
from invdiff.linear_gaussian import LinearGaussian
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps, noised_again


@final
@dataclass(frozen=True, kw_only=True)
class DiffPIR(Annealed):
    """Denoising, a proximal step of the data, and noise again.

    Parameters
    ----------
    steps
        Noise levels.
    lam
        lambda, the weight of the denoised state against the measurement, positive; the paper's 1.
    zeta
        Share of fresh noise in a step's noise, in [0, 1]. The published runs take 0.1 to 0.3, and 1 to fill boxes in 20
        steps; less is nearer to the posterior's spread, given levels enough to forget the first ones.
    levels
        Noise levels.

    Raises
    ------
    InputError
        If steps or lam are not positive, or zeta is not in [0, 1].
    """

    steps: int = 100
    lam: float = 1.0
    zeta: float = 0.8
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@inproceedings{zhu2023diffpir, "
        "title={Denoising Diffusion Models for Plug-and-Play Image Restoration}, "
        "author={Zhu, Yuanzhi and Zhang, Kai and Liang, Jingyun and Cao, Jiezhang and Wen, Bihan and Timofte, Radu and "
        "Van Gool, Luc}, "
        "booktitle={CVPR Workshops}, year={2023}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not 0.0 < self.lam < float("inf"):
            raise InputError(f"DiffPIR's lam is a positive weight, got {self.lam}.")
        if not 0.0 <= self.zeta <= 1.0:
            raise InputError(f"DiffPIR's zeta is a share of noise in [0, 1], got {self.zeta}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Denoiser, and a linear-Gaussian problem for the proximal step."""
        return frozenset({"denoiser", "linear"})

    def cost(self) -> Cost:
        """One forward pass a level."""
        return Cost(self.steps)

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """One level: denoise, fit, noise again."""
        levels = self.levels.of(posterior, self.steps)
        sigma, sigma_next = levels[state.step], levels[state.step + 1]

        def proximal(linear: LinearGaussian, d: Tensor) -> Tensor:
            return d + linear.gain(linear.residual(d), sigma**2 / self.lam)

        x = posterior.linear_rows(posterior.denoise(state.z, sigma), proximal)
        misfit = posterior.misfit(x)
        if sigma_next == 0.0:
            return AnnealedState(z=x, step=state.step + 1), Info(sigma=0.0, misfit=misfit)
        z = noised_again(state.z, x, sigma, sigma_next, self.zeta, noise)
        return AnnealedState(z=z, step=state.step + 1), Info(sigma=sigma_next, misfit=misfit)

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the last level's proximal point."""
        return Draws(z=state.z)
