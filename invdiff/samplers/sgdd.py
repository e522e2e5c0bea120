r"""Split Gibbs for tokens (SGDD, Chu et al. 2025, arXiv 2503.01161) with a masked prior.

The sequence is split into x, which the prior sees, and z, which the measurement sees, tied by a kernel that replaces
each token, with probability b, by a uniform one of the V:

    pi_b(x, z) ~ p(x) p(y | z) prod_i k_b(z_i | x_i),     k_b(z_i | x_i) = (1 - b) 1[z_i = x_i] + b / V.

In the paper's parameter, the probability a of another token, k = 1 - a or a / (V - 1), with b = a V / (V - 1). A level
b of a falling ladder draws in turn

    1. x given z. "Was z_i copied from x_i?" is a flag, r_i, of which k_b is the sum: given x and z it is raised with
       probability (1 - b) / (1 - b + b / V) where x_i = z_i, and never elsewhere. Given the flags x_i = z_i where one
       is raised, and what remains is p(x_rest | x_copied), the conditionals of the masked prior, in any order.
    2. z given x: Metropolis-Hastings moves of one token at a time, each walker's own. Position and another token for
       it, v, are uniform, which is symmetric; with z' the sequence after it,
       log accept = log p(y | z') - log p(y | z) + log k_b(v | x_i) - log k_b(z_i | x_i).

Both leave pi_b as it is, from wherever x and z are. The draw is the last z, as in the published code: z has seen the
measurement itself, x only through the kernel.

Departures: the published prior is a uniform diffusion, which is run backwards from z; the flags do the same for a
masked one, exactly. Its code weighs a token that differs by a in place of a / (V - 1), which loosens the coupling by a
factor V - 1 a token, and squared residuals without 1/2; the ratio above is the exact one. It restarts step 2 at x in
every level, which leaves no law as it is for a finite number of moves; here z goes on from where it was. It starts z
from uniform tokens; here both start from one draw of the prior. Its b falls linearly, with some 50 levels of hundreds
to thousands of moves; by default there are more levels here, of fewer moves, and b falls geometrically.

Exact as levels grow, for a ladder that falls to b = 0 ever more slowly; the marginals of pi_b are not the posterior for
any b > 0, and no token moves for b = 0. Up to ``prior_steps`` tokens are drawn one after the other. Where more are to
be drawn, as at loose levels of long sequences, some share a pass and are independent given what was known before it;
that bias ends with the levels that have it. Moves of single tokens stall where a likelihood ties many together.
Measured on problems that can be enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: ``prior_steps`` forward passes (the number of tokens, if that is less) at the start and a level; none backward.
Decoder calls: ``mh_steps`` a level, one at the start, and one at the end for the misfit; none backward.
"""

from dataclasses import dataclass
from math import exp, log
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps


@dataclass(frozen=True, kw_only=True)
class SplitTokens(State):
    """Both sequences, int64 (ensemble, particle, length); z is the one that the measurement sees.

    Parameters
    ----------
    x
        The one that the prior sees.
    log_likelihood
        log p(y | z), float64, (ensemble, particle).
    """

    x: Tensor
    log_likelihood: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class SGDD(Sampler):
    """Split Gibbs: a sequence drawn from the prior and one moved by the likelihood, tied ever more closely.

    Parameters
    ----------
    steps
        Levels of the coupling.
    mh_steps
        Moves of single tokens a level, a decoder call each.
    prior_steps
        Passes of the prior a level, in which tokens that differ are drawn anew; at most one a token is taken.
    loosest, tightest
        First and last b, the probability that the kernel replaces a token; 1 >= loosest >= tightest > 0.
    schedule
        "geometric" or, as published, "linear": how b falls between the two.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 100
    mh_steps: int = 20
    prior_steps: int = 32
    loosest: float = 1.0
    tightest: float = 0.01
    schedule: Literal["geometric", "linear"] = "geometric"

    citation: ClassVar[str] = (
        "@article{chu2025sgdd, title={Split Gibbs Discrete Diffusion Posterior Sampling}, "
        "author={Chu, Wenda and Wu, Zihui and Chen, Yifan and Song, Yang and Yue, Yisong}, "
        "journal={arXiv:2503.01161}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.mh_steps < 1 or self.prior_steps < 1:
            raise InputError(
                f"A level takes at least one move and one pass, got mh_steps={self.mh_steps}, "
                f"prior_steps={self.prior_steps}."
            )
        if not 1.0 >= self.loosest >= self.tightest > 0.0:
            raise InputError(
                "The coupling falls from loosest to tightest, 1 >= loosest >= tightest > 0; got "
                f"loosest={self.loosest}, tightest={self.tightest}."
            )
        if self.schedule not in ("geometric", "linear"):
            raise InputError(f"schedule is 'geometric' or 'linear', got {self.schedule!r}.")

    @property
    def exact(self) -> bool:
        """As levels grow and the coupling tightens."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a masked prior."""
        return frozenset({"masked"})

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of SGDD follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """``prior_steps`` passes at the start and a level, or as many as there are tokens."""
        return Cost((1 + self.steps) * min(self.prior_steps, posterior.shape[0]))

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> SplitTokens:
        """Draws of the prior, for both."""
        shape = (ensembles, n, *posterior.shape)
        blank = torch.full(shape, posterior.mask_token, dtype=torch.int64, device=posterior.device)
        x = self._completed(posterior, blank, noise)
        return SplitTokens(z=x, x=x, log_likelihood=posterior.log_likelihood(x).double())

    def done(self, state: SplitTokens) -> bool:
        """All levels walked."""
        return state.step >= self.steps

    def progress(self, state: SplitTokens) -> float:
        """Share of the levels walked."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: SplitTokens, *, noise: Noise) -> tuple[SplitTokens, Info]:
        """Draw x given z, then move z given x."""
        b, V = self.level(state.step), posterior.vocabulary_size
        copied = noise.uniform(noise.slots, posterior.shape).reshape(state.z.shape) < (1.0 - b) / (1.0 - b + b / V)
        kept = torch.where((state.x == state.z) & copied, state.z, posterior.mask_token)
        x = self._completed(posterior, kept, noise)
        z, value = self._moved(posterior, x, state, b, noise)
        new = SplitTokens(z=z, x=x, log_likelihood=value, step=state.step + 1)
        if self.done(new):
            return new, Info(sigma=0.0, misfit=posterior.misfit(z))
        return new, Info(sigma=self.level(new.step))

    def finish(self, posterior: Posterior, state: SplitTokens, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return z, one a walker, so that draws are independent of each other.

        Raises
        ------
        SamplingError
            If a walker has met no sequence of positive likelihood.
        """
        lost = ~torch.isfinite(state.log_likelihood)
        if bool(lost.any()):
            raise SamplingError(
                f"{int(lost.sum())} of {lost.numel()} walkers have met no sequence whose likelihood is above zero. "
                "Take more moves or TwistedSMC, or check that the measurement fits the prior."
            )
        return Draws(z=state.z)

    def level(self, step: int) -> float:
        """Return b of a step, counted from 0."""
        t = step / max(self.steps - 1, 1)
        if self.schedule == "geometric":
            return self.loosest * exp(t * log(self.tightest / self.loosest))
        return (1.0 - t) * self.loosest + t * self.tightest

    # Within.

    def _completed(self, posterior: Posterior, x: Tensor, noise: Noise) -> Tensor:
        """Draw the masked tokens in random order, one a pass unless they are more than the passes."""
        e, n, length = x.shape
        u = noise.uniform(noise.slots, (2, length)).reshape(e, n, 2, length)
        masked, passes = x == posterior.mask_token, min(self.prior_steps, length)
        rank = torch.where(masked, u[:, :, 0], torch.inf).argsort(-1).argsort(-1)
        number = masked.sum(-1, keepdim=True).clamp_min(1)
        turn = torch.where(masked, rank * passes // number, passes)  # known tokens have none
        for k in range(passes):
            x = torch.where(turn == k, categorical(posterior.log_probs(x), u[:, :, 1]), x)
        return x

    def _moved(
        self, posterior: Posterior, x: Tensor, state: SplitTokens, b: float, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Metropolis-Hastings moves of z given x; z and its log-likelihood."""
        e, n, length = x.shape
        V, z, value = posterior.vocabulary_size, state.z, state.log_likelihood
        u = noise.uniform(noise.slots, (self.mh_steps, 3)).reshape(e, n, self.mh_steps, 3)
        gain = log((1.0 - b + b / V) / (b / V))  # of a token that is x's own over one that is not
        for k in range(self.mh_steps):
            here = (u[:, :, k, :1] * length).long().clamp_max(length - 1)
            old, own = z.gather(2, here), x.gather(2, here)
            other = (old + 1 + (u[:, :, k, 1:2] * (V - 1)).long().clamp_max(V - 2)) % V
            proposed = z.scatter(2, here, other)
            found = posterior.log_likelihood(proposed).double()
            # Not NaN where neither has a likelihood: a walker that is nowhere yet goes on as the kernel does.
            nowhere = torch.isneginf(value) & torch.isneginf(found)
            gained = torch.where(nowhere, 0.0, found - value)
            gained = gained + gain * ((other == own).double() - (old == own).double())[..., 0]
            taken = u[:, :, k, 2].log() < gained
            z, value = torch.where(taken[..., None], proposed, z), torch.where(taken, found, value)
        return z, value
