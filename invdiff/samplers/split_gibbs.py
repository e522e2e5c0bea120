r"""Split Gibbs with a diffusion prior: PnP-DM (Wu et al. 2024, arXiv 2405.18782, algorithm 1; Vono et al. 2019).

The unknown is split into x, which the measurement sees, and z, which the prior sees, tied by a Gaussian of width rho:

    pi_rho(x, z) ~ p(y | x) N(x; z, rho^2) p(z).

At each rho of a falling ladder both are drawn in turn (Gibbs):

    1. z ~ p(z) N(x; z, rho^2): the law of z_0 given z_sigma = x at sigma = rho, so a reverse diffusion from x
    2. x ~ N(x; z, rho^2) p(y | x), exactly where the problem is linear-Gaussian (`ExactInner`), else by `Langevin`

The reverse diffusion is the stochastic one, by K = ``prior_steps`` Euler-Maruyama steps of equal shares of rho^2: with
s_j = rho sqrt(1 - j / K),

    z <- z + (D(z, s_j) - z) / (K - j) + (rho / sqrt(K)) eps,        j = 0 .. K - 1, from z = x.

The probability-flow equation would not do: it takes x to one point, so that z given x has no spread, and only
averaged over x ~ p_rho is its end distributed as the prior. Where rho is small against the prior's features the true
spread is rho, and the steps above have that spread for every K, one included: D(x, rho) + rho eps. `Ancestral` steps
have not: their spread is exact for a prior that is a point, and their variance too small here by a share (1 + 1/2 +
... + 1/K) / K, at any rho. At 100 evaluations they leave half of the posterior's variance with K = 1, and 0.73 (blur)
to 0.9 (inpainting) with K = 4.

What a finite rho does: pi_rho's marginal of x is the true likelihood times the prior smoothed by rho, that of z the
true prior times the likelihood smoothed (R + rho^2 A A^T for R). On a Gaussian of prior variance w and likelihood
precision h, u = rho^2 / w and a = rho^2 h: with K = 1 the variance of x is 1 + (a u + 3 u^2) / (2 (a + u)) of the
posterior's, to first order; nothing if the prior is broad (u = 0), else at most 1 + 3 u / 2. The draw is the last x:
its likelihood is exact, whereas z ends with the noise of its last step on it, which no measurement has seen.

The start is x drawn given z ~ N(mean, rho^2) at the first rho, about the prior's mean; the last rho is a tenth of what
the measurement resolves. A value of posterior variance v needs some v / rho^2 levels to follow, so most are spent at
low rho: by default rho^(-1/4) rises in even steps.

Departures: the paper's rho falls from 10 to 0.3 (0.1 for phase retrieval) by a factor of 0.9 in 100 levels, with pixels
in [-1, 1], and stays there; at noise 0.05 such a last rho is a strong smoothing. Staying at the last rho was measured
to gain nothing here over a slower fall. Its code starts the diffusion at the first of 100 fixed levels below rho with
the noise of rho left in x, uses the probability flow in some experiments, starts from an estimate of the operator's,
and keeps z, also from earlier levels of one chain; here the ladder begins at rho itself and a particle is one draw.

Exact with `ExactInner` in the limit of many levels, slowly falling, and a last rho that is small; for any prior_steps.
Measured on the three Gaussian fields of `invdiff.diagnostics.exactness` (inpainting, blur, down-sampling; noise 0.05;
400 draws; 1 and 1 are exact, a mean error of 1 floor is what 400 exact draws have) with the defaults:

    levels   mean error, floors     variance / posterior's    whitened norm
        10   12.8   6.7   1.8       4.40   2.45   2.26        3.41   2.57   2.19
        30    5.6   1.7   1.2       1.29   1.24   1.22        1.25   1.24   1.22
       100    2.4   1.1   1.1       1.06   1.06   1.06        1.06   1.06   1.06
       400    1.2   1.0   1.1       1.02   1.01   1.03        1.02   1.01   1.04

At 400 levels the figures keep the bounds of exact draws (docs/exactness.md), at 100 not yet: the variance lags behind
rho. More levels serve better than more prior steps: 100 levels of 4 steps, as dear as 400 of one, leave 1.04. With
`Langevin` at its defaults x is too wide at every level, and the draws are biased: 1.14, 1.13 and 1.14 at 100 levels.

Cost: ``prior_steps`` forward passes a level, none backward; and what `inner` takes of the likelihood.
"""

from dataclasses import dataclass, field, replace
from math import sqrt
from typing import ClassVar, final

from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Annealed, AnnealedState, Levels, check_steps
from invdiff.samplers.inner import ExactInner, Inner, Langevin, smoothing


@final
@dataclass(frozen=True, kw_only=True)
class SplitGibbs(Annealed):
    """Split Gibbs sampling at a falling distance between what the measurement and what the prior sees.

    Parameters
    ----------
    steps
        Levels rho, each with one draw of z and one of x.
    prior_steps
        Network evaluations in a draw of z.
    inner
        How x is drawn: ExactInner(), or Langevin(slope=...) for problems that are not linear.
    levels
        Ladder of rho. Its sigma_max is an eighth of the prior's if None, its sigma_min 0.1 noise_std / ||A||, kept
        within the prior's sigma_min and a thousandth of its sigma_max. A negative exponent puts more of the steps at
        low rho than a geometric ladder does.
    """

    steps: int = 100
    prior_steps: int = 1
    inner: Inner = field(default_factory=ExactInner)
    levels: Levels = field(default_factory=lambda: Levels(rho=-4.0))

    citation: ClassVar[str] = (
        "@inproceedings{wu2024pnpdm, "
        "title={Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors}, "
        "author={Wu, Zihui and Sun, Yu and Chen, Yifan and Zhang, Bingliang and Yue, Yisong and Bouman, Katherine L.}, "
        "booktitle={NeurIPS}, year={2024}}\n"
        "@article{vono2019split, title={Split-and-Augmented {Gibbs} Sampler -- Application to Large-Scale Inference "
        "Problems}, author={Vono, Maxime and Dobigeon, Nicolas and Chainais, Pierre}, "
        "journal={IEEE Transactions on Signal Processing}, volume={67}, number={6}, pages={1648--1661}, year={2019}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_steps(self.prior_steps)

    @property
    def exact(self) -> bool:
        """Where x is drawn exactly: in the limit of many steps and a small last rho."""
        return isinstance(self.inner, ExactInner)

    def requires(self) -> frozenset[str]:
        """Return a denoiser, and what the inner draw needs of the likelihood."""
        known = not isinstance(self.inner, Langevin) or self.inner.slope is not None
        # Without its slope Langevin takes ||A||, which only a linear problem has.
        return self.inner.requires | {"denoiser"} | (frozenset() if known else {"linear"})

    def cost(self) -> Cost:
        """``prior_steps`` forward passes a level."""
        return Cost(self.steps * self.prior_steps)

    def ladder(self, posterior: Posterior) -> tuple[float, ...]:
        """Return ``steps`` falling levels rho, latent units, then 0.

        Raises
        ------
        InputError
            If they do not lie within the prior's.
        """
        slope = self.inner.slope if isinstance(self.inner, Langevin) else None
        low, high = self.levels.sigma_min, self.levels.sigma_max
        chosen = replace(
            self.levels,
            sigma_min=smoothing(posterior, slope, 0.1) if low is None else low,
            sigma_max=posterior.sigma_max / 8.0 if high is None else high,
        )
        return chosen.of(posterior, self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AnnealedState:
        """Draw x at the first rho, from z about the prior's mean."""
        rho = self.ladder(posterior)[0]
        z = posterior.noised_mean().expand(ensembles, n, *posterior.shape)
        return AnnealedState(z=self.inner.draw(posterior, z + rho * noise.like(z), rho, noise))

    def step(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> tuple[AnnealedState, Info]:
        """Draw z, then x, at one rho; the state is x."""
        ladder = self.ladder(posterior)
        rho = ladder[state.step]
        z = self.reverse(posterior, state.z, rho, noise)
        x = self.inner.draw(posterior, z, rho, noise)
        return (
            AnnealedState(z=x, step=state.step + 1),
            Info(sigma=ladder[state.step + 1], misfit=posterior.misfit(x)),
        )

    def reverse(self, posterior: Posterior, x: Tensor, rho: float, noise: Noise) -> Tensor:
        """Draw z from p(z) N(x; z, rho^2) by a reverse diffusion from x (ensemble, particle, *shape)."""
        z, steps = x, self.prior_steps
        for j in range(steps):
            # Below sigma_min a network is told sigma_min, as at the end of any other ladder.
            d = posterior.denoise(z, max(rho * sqrt(1.0 - j / steps), posterior.sigma_min))
            z = z + (d - z) / (steps - j) + rho / sqrt(steps) * noise.like(z)
        return z

    def finish(self, posterior: Posterior, state: AnnealedState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the last x."""
        return Draws(z=state.z)
