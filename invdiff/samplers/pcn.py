r"""Preconditioned Crank-Nicolson moves on the prior's noise, tempered: no gradient of anything is asked for.

The prior's probability flow, with its numerical steps, is a map G from white noise to clean states. With z = G(xi) the
posterior is a law of xi,

    pi_b(xi) ~ N(xi; 0, I) exp(b log p(y | G(xi))),   b = 1,

and b in [0, 1] tempers it. Particles start at b = 0, as draws of the prior. At each of ``steps``

    1. b rises to b', as far as the conditional effective sample size stays at `conditional_ess`, each ensemble its own
       way, and at least so far that b = 1 is reached at the last step in even ratios;  log w <- log w + (b' - b) log p
    2. where the effective sample size is below `threshold`, ancestors are drawn by w
    3. ``moves`` times:  xi' = sqrt(1 - v^2) xi + v eta with eta white, taken with probability
       min(1, exp(b' log p(y | G(xi')) - b' log p(y | G(xi)))).

The proposal leaves N(0, I) as it is and is reversible, so that the likelihood alone decides and the acceptance does not
fall as the grid is refined (Cotter, Roberts, Stuart & White 2013); G takes the moves to the prior's own geometry. v is
adapted after each move by the share accepted in the ensemble, towards 0.25. Tempered particles with such moves are
Kantas, Beskos & Jasra 2014, who took the prior for a Gaussian.

Exact as particles grow, for the prior that the flow's ``prior_steps`` make of the denoiser; that prior is the
denoiser's own as they grow. Every likelihood will do: a simulation whose code has no derivatives, counts, thresholds.
The price is a full flow and an evaluation of the model for each move; a sampler that uses gradients needs fewer. The
walk is local: how far it gets in ``steps`` times ``moves`` moves falls with the information in the measurement, and
the evidence shows it first.

Cost: 1 + ``steps`` times ``moves`` flows of ``prior_steps`` forward passes each (fewer than twice as many with Heun),
none backward.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Never, final

import torch
from torch import Tensor

from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError, SamplingError
from invdiff.integrators import Ancestral, DPMSolver2M, Integrator
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import Levels, check_steps
from invdiff.samplers.particles import Resampling, Systematic, Weighted, check_threshold, conditional_ess

_ACCEPTED = 0.25
"""Share of moves accepted to which the width is adapted; near the best for walks (Roberts, Gelman & Gilks 1997)."""
_GAIN = 1.0
"""Change of the logarithm of the width for an error of one in the share accepted."""
_NARROWEST = 1e-4
_BISECTIONS = 40


@dataclass(frozen=True, kw_only=True)
class PCNState(Weighted):
    """Weighted particles G(xi) at a share of the likelihood.

    Parameters
    ----------
    white
        xi, of z's shape.
    log_likelihood
        log p(y | z), float64, shape (ensemble, particle).
    share, width
        b and v of each ensemble, float64, shape (ensemble,).
    """

    white: Tensor
    log_likelihood: Tensor
    share: Tensor
    width: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class PCN(Sampler):
    """Tempered particles moved by preconditioned Crank-Nicolson steps in the prior's noise.

    Parameters
    ----------
    steps
        Shares of the likelihood, from its first to all of it.
    moves
        Moves at each.
    prior_steps
        Steps of the flow that makes clean states.
    conditional_ess
        In (0, 1): conditional effective sample size at which the next share is chosen.
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].
    integrator
        Steps of the flow: DPMSolver2M(), Euler() or Heun(); they may take no noise.
    levels
        Noise levels of the flow.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 20
    moves: int = 5
    prior_steps: int = 10
    conditional_ess: float = 0.5
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5
    integrator: Integrator = field(default_factory=DPMSolver2M)
    levels: Levels = field(default_factory=Levels)

    citation: ClassVar[str] = (
        "@article{cotter2013, title={{MCMC} Methods for Functions: Modifying Old Algorithms to Make Them Faster}, "
        "author={Cotter, Simon L. and Roberts, Gareth O. and Stuart, Andrew M. and White, David}, "
        "journal={Statistical Science}, volume={28}, number={3}, pages={424--446}, year={2013}}\n"
        "@article{kantas2014, title={Sequential {Monte Carlo} Methods for High-Dimensional Inverse Problems: A Case "
        "Study for the {Navier-Stokes} Equations}, author={Kantas, Nikolas and Beskos, Alexandros and Jasra, Ajay}, "
        "journal={SIAM/ASA Journal on Uncertainty Quantification}, volume={2}, number={1}, pages={464--489}, "
        "year={2014}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_steps(self.prior_steps)
        check_threshold(self.threshold)
        if self.moves < 1:
            raise InputError(f"PCN needs at least one move a step, got {self.moves}.")
        if not 0.0 < self.conditional_ess < 1.0:
            raise InputError(f"conditional_ess is a share, in (0, 1); got {self.conditional_ess}.")
        if isinstance(self.integrator, Ancestral):
            raise InputError(
                "PCN's prior is a map of its noise, so that its integrator may take no more: not Ancestral()."
            )

    @property
    def exact(self) -> bool:
        """As particles and the flow's steps grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a denoiser."""
        return frozenset({"denoiser"})

    def cost(self) -> Cost:
        """One flow at the start, and one a move."""
        flow = self.integrator.evaluations * self.prior_steps - (self.integrator.evaluations - 1)
        return Cost(flow * (1 + self.steps * self.moves))

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> PCNState:
        """Draw from the prior."""
        white = noise.like(posterior.noised_mean().expand(ensembles, n, *posterior.shape))
        z, value = self._clean(posterior, white)
        share = torch.zeros(ensembles, dtype=torch.float64, device=white.device)
        width = torch.full_like(share, 0.5)
        return PCNState.begin(z, shard=noise.shard, white=white, log_likelihood=value, share=share, width=width)

    def done(self, state: PCNState) -> bool:
        """All shares walked."""
        return state.step >= self.steps

    def progress(self, state: PCNState) -> float:
        """Share of the steps taken."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: PCNState, *, noise: Noise) -> tuple[PCNState, Info]:
        """Raise the share of the likelihood, weight, resample and move."""
        share = self._next(state)
        # A share that is 1 already adds nothing, also to particles of log-likelihood minus infinity.
        rise = (share - state.share)[:, None]
        increment = torch.where(rise > 0.0, rise * state.log_likelihood, 0.0)
        weighted = state.reweighted(increment, f" at step {state.step + 1}")
        info = Info(sigma=0.0, ess=weighted.ess)
        new = replace(weighted, share=share).resampled(self.resampling, noise, self.threshold)
        for _ in range(self.moves):
            new = self._moved(posterior, new, noise)
        return replace(new, step=state.step + 1), replace(info, misfit=posterior.misfit(new.z))

    def finish(self, posterior: Posterior, state: PCNState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the clean states, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _clean(self, posterior: Posterior, white: Tensor) -> tuple[Tensor, Tensor]:
        """G(xi), and its log-likelihood."""

        def no_noise(z: Tensor) -> Never:  # noqa: ARG001 an integrator's contract
            raise InputError(
                f"{type(self.integrator).__name__} takes noise; PCN's prior is a map of what it starts from."
            )

        levels = self.levels.of(posterior, self.prior_steps)
        z, memory = posterior.noised_mean() + levels[0] * white, None
        for k, (sigma, after) in enumerate(pairwise(levels)):
            previous = levels[k - 1] if k else None
            z, memory = self.integrator.step(
                posterior.denoise, z, sigma, after, memory=memory, sigma_previous=previous, normal=no_noise
            )
        value = posterior.log_likelihood(z).double()
        if bool((torch.isnan(value) | torch.isposinf(value)).any()):
            raise SamplingError(
                "The log-likelihood of a draw is NaN or plus infinity. Check the network's output and the forward "
                "model; a state that it cannot run on has log-likelihood minus infinity."
            )
        return z, value

    def _next(self, state: PCNState) -> Tensor:
        """Share of the likelihood of each ensemble at the next step, by bisection; the same in all processes."""
        left = self.steps - state.step
        if left == 1:
            return torch.ones_like(state.share)
        weights, value = state.all_log_weights, state.shard.gather(state.log_likelihood)
        low, high = state.share, torch.ones_like(state.share)

        def stands(share: Tensor) -> Tensor:
            increment = (share - state.share)[:, None] * value
            return conditional_ess(weights, increment) >= self.conditional_ess

        full = stands(high)
        for _ in range(_BISECTIONS):
            # Shares of the first steps may be tiny: halve the logarithm from there on.
            middle = torch.where(low > 0.0, torch.sqrt(low * high), 0.5 * high)
            enough = stands(middle)
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        chosen = torch.where(full, torch.ones_like(low), low)
        due = torch.where(state.share > 0.0, state.share ** ((left - 1) / left), 0.0)
        return state.shard.first(torch.maximum(chosen, due))

    def _moved(self, posterior: Posterior, state: PCNState, noise: Noise) -> PCNState:
        """One move of every particle, and the width adapted to what was accepted."""
        e, n = state.log_weights.shape
        axes = (e, *(1,) * (state.z.ndim - 1))
        v = state.width.to(state.white).reshape(axes)
        white = torch.sqrt(1.0 - v**2) * state.white + v * noise.like(state.white)
        z, value = self._clean(posterior, white)
        gained = state.share[:, None] * (value - state.log_likelihood)
        gained = torch.where(torch.isneginf(value), -torch.inf, gained)  # not NaN where both are dead
        taken = noise.uniform(noise.slots).reshape(e, n) < torch.exp(gained.clamp(max=0.0))
        accepted = state.shard.first(state.shard.gather(taken.double()).mean(-1))
        width = (state.width * torch.exp(_GAIN * (accepted - _ACCEPTED))).clamp(_NARROWEST, 1.0)
        pick = taken.reshape(e, n, *(1,) * (state.z.ndim - 2))
        return replace(
            state,
            white=torch.where(pick, white, state.white),
            z=torch.where(pick, z, state.z),
            log_likelihood=torch.where(taken, value, state.log_likelihood),
            width=width,
        )
