r"""Denoising MCMC: walkers that wander between noise levels, extended to posteriors (Kim & Ye 2022, arXiv 2209.14593).

A chain on states and levels together, z at rung k of a ladder sigma_0 < ... < sigma_{K-1}, with the law

    pi(z, k) ~ h_k p_{sigma_k}(z) psi_k(z),      psi_0 = p(y | z)

crosses between modes at the high rungs, where noise has joined them, and gives draws at the lowest; psi_k is the
noised likelihood N(y; A z, R + (sigma_k^2 - sigma_0^2) A A^T) (`sigma_ladder`). A sweep of each walker:

    1. Langevin at its rung, with e_k = step_size / (1 / sigma_k^2 + ||G_k||), G_k the curvature of -log psi_k:
       z <- z + n + e_k (s + grad log psi_k)(z + a n),   n = sqrt(2 e_k) xi,   a = (1 - sqrt(1 - c / 2)) / c,
       c = step_size, s = (D - z) / sigma_k^2 the score
    2. at rung 0 the state is a visit: its image at sigma = 0, (z + D(z, sigma_0)) / 2, may be kept
    3. to the next rung in its direction, k' = k +- 1, along the probability flow, z -> z':
       accepted with min(1, h_k' psi_k'(z') / (h_k psi_k(z))), else it stays and turns round.

3 is exact for an exact flow, which leaves the prior's probability as it is (`sigma_ladder`). So the conditional p(k |
z) is not needed, nor what it takes: the paper's noise classifier, or the divergence of the score at every rung, which
costs passes backward; and rungs need not lie within 1 + sqrt(2 / d) of each other, as those between which z stays where
it is. Rejection turns walkers round (Turitsyn, Chertkov & Vucelja 2011; Sakai & Hukushima 2016), so that one crosses K
rungs in about K moves and not K^2. In 1 the same fresh noise displaces the gradient: on a Gaussian of which e_k times
the curvature is x, the stationary variance is (1 - a x)^2 / (1 - x / 2) of the true one, that is 1 at both ends of [0,
c] and at least 0.97 between for c = 1, where plain Langevin's is 2 at x = 1. (Noise carried from step to step, as in
TransportLangevin, is out of step with the state after each change of rung: it left 4 to 9 % too much variance.)

The weights h give the lowest rung ``share`` of the sweeps and the others equal parts of the rest. They start from means
of psi_{k-1}(z') / psi_k(z) over an ensemble's walkers, which first walk down the ladder together, are adapted during
the rest of the burn-in, and then stay, so that kept draws come from one fixed kernel. A run of n draws an ensemble has
n // keep walkers, at least one, and makes ``steps`` n sweeps of them in all after the burn-in. Of all visits to rung 0
then, n are kept, each with the same chance, in the order of time; where there were fewer, the first are repeated.

The walkers of an ensemble learn its ladder's weights together and their visits compete for the same n places, on
however many processes; each process must have as many walkers as the others.

A warning is given if an ensemble's walkers made fewer than three round trips between the ends of the ladder on average,
or visits were fewer than three quarters of the draws: then there are too few rungs for what is measured, or sweeps for
the rungs. Another is given if neighbouring rungs are more than a factor of 8 apart, which are climbed with the wrong
law. Neither sees a top rung that is too low to join the modes.

Law of the draws: p(z) p(y | Phi(z)), with Phi the flow from 0 to sigma_0, which moves a Gaussian prior of width w by
sigma_0^2 / (2 w^2) of itself; where the prior is thin against sigma_0, p(z) N(y; A z, R + sigma_0^2 A A^T).

Departures: the paper samples priors. Its step has one size at all levels, which is unstable below that size's root; its
code takes the classifier's likeliest level, keeps the least noisy of every ten states, which is not a draw from the
chain's law, and denoises it by an SDE.

Exact as rungs grow, and step_size and sigma_0 fall. Measured on three unit modes in the plane of which one value is
measured (`parted_modes` of `invdiff.diagnostics.mixtures`), 2.5 and 6 deviations apart, at the defaults and so 20
evaluations a kept draw with all burn-in (docs/mixtures.json):

    sliced W2 of a chain of 2000 draws, rms of 32 chains, in units of exact draws'             1.76     1.76
    modes' shares of a chain, total variation, rms of 32 chains (exact draws: 0.009, 0.013)    0.018    0.024
    of four chains together, the largest of 8 runs                                             0.013    0.018
    split R-hat of four chains, the largest of 8 runs                                          1.003    1.002

The defaults were chosen on such mixtures. Rungs that lie too far apart for one step of the flow are climbed all the
same, with the wrong law. Where much is measured, as on fields and pictures, no walker comes up again with a few rungs;
the warning says so, and what is left is a Langevin chain at the lowest rungs, which serves one mode.

Cost: three forward passes a sweep of a walker, none backward: 3 (burn_in / keep + steps) a draw where keep divides
the draws; a run of fewer than ``keep`` draws has one walker and pays all of its burn-in.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, inf, sqrt
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise
from invdiff.parallel import Shard
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.inner import check_slope, smoothing
from invdiff.samplers.particles import log_mean_exp
from invdiff.samplers.preconditioner import Information
from invdiff.samplers.sigma_ladder import LadderState, along, flow, levelled, tilt, to_data

_ROUND_TRIPS = 3.0
"""Round trips a walker below which a run is said to have mixed too little."""
_VISITS = 0.75
"""Visits to the lowest rung a draw, likewise."""
_APART = 8.0
"""Factor between neighbouring rungs above which a midpoint step of the flow is too coarse."""


@final
@dataclass(frozen=True, kw_only=True)
class DMCMC(Sampler):
    """Denoising MCMC: a Markov chain on states and noise levels.

    Parameters
    ----------
    steps
        Sweeps a kept draw.
    rungs
        Noise levels, at least 2.
    burn_in
        Sweeps of each walker before any draw is kept; more than the 2 (rungs - 1) of the first walk down.
    keep
        Kept draws a walker.
    share
        Share of the sweeps at the lowest rung, in (0, 1); steps times share should exceed 1.
    step_size
        c, in (0, 1.6]: the Langevin step in units of the inverse of the largest curvature.
    path
        How the likelihood is tempered: Noised() for linear-Gaussian problems, also if None, or Tempered(scale=...).
    slope
        Bound on the norm of the operator's derivative dA/dz, latent units, for problems that are not linear.
    levels
        The ladder. If None, its sigma_min is 0.3 noise_std / ||A||, kept within the prior's sigma_min and a thousandth
        of its sigma_max, and its sigma_max a sixteenth of the prior's.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 6
    rungs: int = 5
    burn_in: int = 40
    keep: int = 60
    share: float = 0.25
    step_size: float = 1.0
    path: Path | None = None
    slope: float | None = None
    levels: Levels = field(default_factory=lambda: Levels(rho=-4.0))

    anytime: ClassVar[bool] = True
    citation: ClassVar[str] = (
        "@article{kim2022dmcmc, title={Denoising {MCMC} for Accelerating Diffusion-Based Generative Models}, "
        "author={Kim, Beomsu and Ye, Jong Chul}, journal={arXiv preprint arXiv:2209.14593}, year={2022}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_slope(self.slope)
        if self.rungs < 2:
            raise InputError(f"DMCMC needs at least two rungs, got {self.rungs}.")
        if self.burn_in <= self._descent:
            raise InputError(
                f"With {self.rungs} rungs the first walk down takes {self._descent} sweeps; burn_in must be longer, "
                f"got {self.burn_in}."
            )
        if self.keep < 1:
            raise InputError(f"A walker needs at least one kept draw, got keep={self.keep}.")
        if not 0.0 < self.share < 1.0:
            raise InputError(f"share is a share of the sweeps, in (0, 1); got {self.share}.")
        if not 0.0 < self.step_size <= 1.6:
            raise InputError(
                f"step_size lies in (0, 1.6] in units of the inverse curvature, since larger steps diverge; got "
                f"{self.step_size}."
            )

    @property
    def exact(self) -> bool:
        """As rungs grow, and steps and the lowest level fall."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a denoiser and a gradient; and a linear problem, unless a tempering and a slope are given."""
        known = isinstance(self.path, Tempered) and self.slope is not None
        return frozenset({"denoiser", "likelihood_gradient"} | (set() if known else {"linear"}))

    def cost(self) -> Cost:
        """Three forward passes a sweep, and a draw's part of the burn-in."""
        return Cost(ceil(3 * (self.burn_in / self.keep + self.steps)))

    def ladder(self, posterior: Posterior) -> tuple[float, ...]:
        """Return ``rungs`` rising noise levels, latent units.

        Raises
        ------
        InputError
            If they do not lie within the prior's.
        """
        low, high = self.levels.sigma_min, self.levels.sigma_max
        chosen = replace(
            self.levels,
            sigma_min=smoothing(posterior, self.slope, 0.3) if low is None else low,
            sigma_max=posterior.sigma_max / 16.0 if high is None else high,
        )
        return chosen.of(posterior, self.rungs)[-2::-1]

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> LadderState:
        """Walkers at the top rung, about the prior's mean.

        Raises
        ------
        InputError
            If the processes of a distributed run cannot share the walkers evenly.
        """
        draws = n * noise.shard.world
        ladder, w = self.ladder(posterior), self._walkers(draws, noise.shard)
        bounds = [
            Information.along(posterior, self._path, sqrt(s**2 - ladder[0] ** 2), self.slope).largest for s in ladder
        ]
        rates = [self.step_size / (1.0 / s**2 + bound) for s, bound in zip(ladder, bounds, strict=True)]

        def rungs(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=posterior.device).repeat(ensembles, 1)

        center = posterior.noised_mean().expand(ensembles, w, *posterior.shape)
        level = torch.full((ensembles, w), self.rungs - 1, device=posterior.device)
        empty = torch.full((ensembles, draws), inf, dtype=torch.float64, device=posterior.device)
        return LadderState(
            z=torch.zeros(ensembles, draws, *posterior.shape, dtype=center.dtype, device=posterior.device),
            walker=center + ladder[-1] * _normal(noise, center),
            level=level,
            direction=torch.full_like(level, -1),
            sigma=rungs(ladder),
            rate=rungs(rates),
            log_h=self._target(posterior.device).log().repeat(ensembles, 1),
            lot=empty,
            when=empty,
            outward=torch.zeros_like(level, dtype=torch.bool),
            trips=torch.zeros_like(level),
            shard=noise.shard,
        )

    def done(self, state: LadderState) -> bool:
        """All sweeps made."""
        return state.step >= self._sweeps(state)

    def progress(self, state: LadderState) -> float:
        """Share of the sweeps made."""
        return state.step / self._sweeps(state)

    def step(self, posterior: Posterior, state: LadderState, *, noise: Noise) -> tuple[LadderState, Info]:
        """One sweep of all walkers."""
        t, level, z, shard = state.step, state.level, state.walker, state.shard
        sigma, rate = state.sigma.gather(1, level), state.rate.gather(1, level)
        level_now = sigma.to(z.dtype)
        bottom = state.sigma[:, :1]
        n = along(torch.sqrt(2.0 * rate), z) * _normal(noise, z)
        tau = torch.sqrt((sigma**2 - bottom**2).clamp_min(0.0))
        q = z + (1.0 - sqrt(1.0 - 0.5 * self.step_size)) / self.step_size * n
        score = (posterior.denoise(q, level_now) - q) / along(sigma**2, z)
        z = z + n + along(rate, z) * (score + tilt(posterior, self._path, q, tau)[1])
        denoised = posterior.denoise(z, level_now)

        proposed = level + state.direction
        inside = (proposed >= 0) & (proposed < self.rungs)
        proposed = torch.where(inside, proposed, level)
        after = state.sigma.gather(1, proposed)
        moved = flow(posterior, z, denoised, sigma, after)
        if not bool(torch.isfinite(moved).all()):
            raise SamplingError(
                f"A walker left the finite numbers at step {t + 1}. Take a smaller step_size, or check the "
                "network's output and the scale of noise_std."
            )
        later = torch.sqrt((after**2 - bottom**2).clamp_min(0.0))
        there, here = tilt(posterior, self._path, moved, later)[0], tilt(posterior, self._path, z, tau)[0]
        # From where there is no likelihood to where there is none leads no move.
        log_ratio = torch.where(torch.isneginf(there), -inf, there - here)
        log_h, target = state.log_h, self._target(z.device)
        if t < self._descent:
            # Two sweeps a rung: the second goes down, whatever the weights, and measures the ratio of the masses.
            down = t % 2 == 1
            accept = torch.full_like(tau, float(down))
            if down:
                k = self.rungs - 1 - t // 2
                mass = log_mean_exp(shard.gather(log_ratio))
                if not bool(torch.isfinite(mass).all()):
                    raise SamplingError(
                        f"The likelihood is zero, infinite or NaN for DMCMC's walkers on their way to rung {k - 1}, "
                        f"sigma {self.ladder(posterior)[k - 1]:.4g}. Check that the measurement fits the prior, and "
                        "the scale of noise_std."
                    )
                log_h = log_h.clone()
                log_h[:, k - 1] = log_h[:, k] + target[k - 1].log() - target[k].log() - mass
        else:
            change = log_h.gather(1, proposed) - log_h.gather(1, level)
            accept = torch.where(inside, (log_ratio + change).clamp_max(0.0).exp(), 0.0)
            if t < self.burn_in:
                pooled = shard.gather(torch.stack((level.double(), proposed.double(), accept), -1)).unbind(-1)
                log_h, _ = levelled(log_h, target, pooled[0].long(), pooled[1].long(), pooled[2], self._gain(t))
        uniform, lot = noise.uniform(_slots(noise, level.shape[1]), (2,)).reshape(*level.shape, 2).unbind(-1)
        accepted = uniform < accept
        new = replace(
            state,
            walker=torch.where(along(accepted, z).bool(), moved, z),
            level=torch.where(accepted, proposed, level),
            direction=state.direction
            if t < self._descent
            else torch.where(accepted, state.direction, -state.direction),
            log_h=shard.first(log_h) if t < self.burn_in else log_h,
            step=t + 1,
        )
        x = to_data(z, denoised)
        if t >= self.burn_in:
            new = new.kept(x, level, lot)
        visit = level == 0
        deviance = float(torch.where(visit, posterior.deviance(x).double(), 0.0).sum())
        # Over all visits: a process's own mean is none where it has none.
        deviance, visits = map(sum, zip(*shard.agree(deviance, float(visit.sum())), strict=True))
        misfit = deviance / visits / posterior.measurements if visits else None
        return new, Info(sigma=self.ladder(posterior)[0], misfit=misfit)

    def finish(self, posterior: Posterior, state: LadderState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the kept visits in the order of time.

        Raises
        ------
        SamplingError
            If an ensemble has none.
        """
        n = state.z.shape[1]
        fewest = int(state.visits().min())
        trips = float(state.shard.gather(state.trips).double().mean(1).min())
        if fewest == 0:
            raise SamplingError(
                f"DMCMC has no draws after {state.step} sweeps: the burn-in takes {self.burn_in}, and no walker has "
                "been at the lowest rung since. Run longer, or take more rungs."
            )
        if fewest < _VISITS * n or trips < _ROUND_TRIPS:
            warnings.warn(
                f"DMCMC's ladder is too short, or its run: {trips:.1f} round trips a walker, where at least "
                f"{_ROUND_TRIPS:g} are needed, and {'at least ' * (fewest == n)}{fewest} visits to the lowest rung for "
                f"{n} draws. Take more rungs than {self.rungs}, more steps, or more draws a walker (keep).",
                RuntimeWarning,
                stacklevel=2,
            )
        apart = max(b / a for a, b in pairwise(self.ladder(posterior)))
        if apart > _APART:
            warnings.warn(
                f"DMCMC's ladder is too short: neighbouring rungs are a factor of {apart:.1f} apart, which one step of "
                f"the flow does not follow; above {_APART:g} walkers climb and descend with the wrong law. Take more "
                f"rungs than {self.rungs}, or levels with a lower sigma_max.",
                RuntimeWarning,
                stacklevel=2,
            )
        return Draws(z=state.in_time(), is_chain=True)

    # Within.

    @property
    def _path(self) -> Path:
        return Noised() if self.path is None else self.path

    @property
    def _descent(self) -> int:
        """Sweeps of the first walk down."""
        return 2 * (self.rungs - 1)

    def _target(self, device: torch.device) -> Tensor:
        """Share of the sweeps that each rung is to have."""
        target = torch.full((self.rungs,), (1.0 - self.share) / (self.rungs - 1), dtype=torch.float64, device=device)
        target[0] = self.share
        return target

    def _gain(self, t: int) -> float:
        """How fast the weights adapt: by at most a nat a visit of the rarest rung, and ever less."""
        return min(self.share, (1.0 - self.share) / (self.rungs - 1), 1.0 / (t + 1 - self._descent))

    def _sweeps(self, state: LadderState) -> int:
        return self.burn_in + ceil(self.steps * state.z.shape[1] / state.walkers)

    def _walkers(self, draws: int, shard: Shard) -> int:
        """Walkers of an ensemble on this process."""

        def together(keep: int) -> int:
            return max(1, draws // keep)

        w = together(self.keep)
        if w % shard.world:
            keep = next(k for k in range(self.keep, 0, -1) if together(k) % shard.world == 0)
            raise InputError(
                f"The {draws} draws of a chain have {w} {'walkers' if w > 1 else 'walker'} at keep={self.keep}, which "
                f"{shard.world} processes cannot share evenly; take keep={keep}, for {together(keep)}."
            )
        return w // shard.world


def _slots(noise: Noise, walkers: int) -> Tensor:
    """Slots of this process's walkers: all walkers have the first of each ensemble's."""
    first = noise.shard.rank * walkers
    return noise.all_slots.reshape(-1, noise.n)[:, first : first + walkers].flatten()


def _normal(noise: Noise, z: Tensor) -> Tensor:
    return noise.normal(_slots(noise, z.shape[1]), z.shape[2:]).reshape(z.shape).to(z.dtype)
