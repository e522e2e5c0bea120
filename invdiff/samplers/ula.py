r"""Unadjusted Langevin with a diffusion prior, PnP-ULA (Laumont et al. 2022, arXiv 2103.04715, algorithm 1).

Every particle is a walker, and its last state is the draw. With D the denoiser at one fixed, small level sigma, whose
score is (D - z) / sigma^2,

    z' = z + e [(D(z, sigma) - z) / sigma^2 + grad log p(y | z)] + sqrt(2 e) eps,
    e  = rate / (1 / sigma^2 + ||A||^2 / noise_std^2).

Walkers start from N(mean, sigma^2) about the prior's mean, at the level that the denoiser is told: no guess at the
prior's width enters, and problems that are not linear start alike. The price is a spread that is too small until the
walkers have mixed.

Departures: the paper adds a pull towards a compact set of values, which its proof of ergodicity needs, and weights the
prior's score by a power alpha; here there is neither. Its step is at most 1/3 of the inverse of the same sum of
curvatures.

Biased: the prior is smoothed by sigma, which widens what is narrow against sigma, and the step widens what is stiff, by
up to 1 / (1 - rate / 2). Until the walkers have mixed, which takes some v / e steps for a posterior variance v, they
are too narrow and their mean is off instead. On the three Gaussian fields of `invdiff.diagnostics.exactness`
(inpainting, blur, down-sampling; noise 0.05; 400 draws; 1 and 1 are exact, a mean error of 1 floor is what 400 exact
draws have; 4000 steps worked out from the chain's moments) with the defaults:

    steps   mean error, floors     variance / posterior's    whitened norm
      100   20.3   7.3   2.1       0.85   0.81   1.04        1.19   0.99   1.08
     1000    2.1   1.0   1.0       1.02   1.01   1.06        1.02   1.02   1.09
     4000    1.0   1.0   1.0       1.02   1.01   1.05        1.03   1.02   1.08

What is left at 4000 steps is the bias; with half that sigma and four times the steps it falls to a quarter. A rate of
0.3 takes three times the steps and leaves variance 1.01, 1.01 and 1.04.

Cost: one forward pass a step, none backward.
"""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, final

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps
from invdiff.samplers.inner import check_slope, smoothing, stiffness


@final
@dataclass(frozen=True, kw_only=True)
class ULA(Sampler):
    """Unadjusted Langevin walkers at one noise level.

    Parameters
    ----------
    steps
        Steps of each walker.
    rate
        Step size in units of the inverse of the largest curvature, in (0, 2). In that stiffest direction the steps'
        stationary variance is 1 / (1 - rate / 2) of the true one; in softer directions the error is smaller.
    sigma
        Level at which the prior is smoothed, latent units. If None, 0.2 noise_std / ||A||, kept within the prior's
        sigma_min and a thousandth of its sigma_max.
    slope
        Bound on the norm of the operator's derivative dA/dz, latent units, for problems that are not linear.
    """

    steps: int = 1000
    rate: float = 1.0
    sigma: float | None = None
    slope: float | None = None

    anytime: ClassVar[bool] = True
    citation: ClassVar[str] = (
        "@article{laumont2022pnpula, "
        "title={Bayesian Imaging Using Plug \\& Play Priors: When Langevin Meets Tweedie}, "
        "author={Laumont, R{\\'e}mi and De Bortoli, Valentin and Almansa, Andr{\\'e}s and Delon, Julie and "
        "Durmus, Alain and Pereyra, Marcelo}, "
        "journal={SIAM Journal on Imaging Sciences}, volume={15}, number={2}, pages={701--737}, year={2022}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_slope(self.slope)
        if not 0.0 < self.rate < 2.0:
            raise InputError(f"ULA's rate lies in (0, 2), got {self.rate}.")

    @property
    def exact(self) -> bool:
        """No."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a denoiser and the likelihood's gradient; a linear problem too where no slope is given."""
        return frozenset({"denoiser", "likelihood_gradient"}) | ({"linear"} if self.slope is None else frozenset())

    def cost(self) -> Cost:
        """One forward pass a step."""
        return Cost(self.steps)

    def level(self, posterior: Posterior) -> float:
        """Noise level of the run, latent units.

        Raises
        ------
        InputError
            If the level asked for is not one of the prior's.
        """
        low, high = posterior.sigma_min, posterior.sigma_max
        if self.sigma is None:
            return smoothing(posterior, self.slope, 0.2)
        if not low <= self.sigma <= high:
            raise InputError(f"ULA's sigma {self.sigma:g} does not lie within the prior's levels, {low:g} to {high:g}.")
        return self.sigma

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> State:
        """Walkers about the prior's mean."""
        z = posterior.noised_mean().expand(ensembles, n, *posterior.shape)
        return State(z=z + self.level(posterior) * noise.like(z))

    def step(self, posterior: Posterior, state: State, *, noise: Noise) -> tuple[State, Info]:
        """One Langevin step."""
        sigma, z = self.level(posterior), state.z
        e = self.rate / (1.0 / sigma**2 + stiffness(posterior, self.slope) ** 2)
        _, grad = posterior.log_likelihood_and_grad(z)
        score = (posterior.denoise(z, sigma) - z) / sigma**2
        z = z + e * (score + grad) + sqrt(2.0 * e) * noise.like(z)
        return State(z=z, step=state.step + 1), Info(sigma=sigma, misfit=posterior.misfit(z))

    def done(self, state: State) -> bool:
        """All steps made."""
        return state.step >= self.steps

    def progress(self, state: State) -> float:
        """Share of the steps made."""
        return state.step / self.steps

    def finish(self, posterior: Posterior, state: State, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the walkers where they are; one a draw, so that draws are independent of each other."""
        return Draws(z=state.z)
