r"""Masked Metropolis-within-Gibbs: chains that forget a few tokens at a time and draw them anew from the prior.

A move of a complete sequence x masks a random set B of its tokens and draws them again, one after the other, from the
prior's conditionals, which together are p(x_B | x without B), whatever their order. The proposal is reversible for the
prior, so that the likelihood alone decides:

    x'_B ~ p(. | x without B),     taken with probability  min(1, p(y | x') / p(y | x)).

Split Gibbs sampling for discrete diffusions (Chu et al. 2025, arXiv 2503.01161) couples a second sequence by a Hamming
distance in its place; its published code weighs a differing token without the factor 1 / (V - 1), and squared residuals
without 1/2. No coupling is needed where the prior is a masked one, and the ratio above is the exact one.

Exact as moves grow, whatever the likelihood, as long as the prior's conditionals belong to one law (those of a network
nearly do). Draws are the last states of independent walkers, which start from draws of the prior; how many moves it
takes grows where a likelihood ties many tokens together, since few proposals are taken then. Blocks of several sizes
take turns: small ones are accepted more often, large ones cross between modes. Measured on problems that can be
enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: one forward pass a token drawn: L at the start, and as many as the block has tokens a move; none backward.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps


@dataclass(frozen=True, kw_only=True)
class GibbsState(State):
    """Complete sequences, int64 (ensemble, particle, length).

    Parameters
    ----------
    log_likelihood
        log p(y | z), float64, (ensemble, particle).
    """

    log_likelihood: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class MaskedGibbs(Sampler):
    """Walkers that draw a random subset of their tokens anew from the prior, accepted by the likelihood.

    Parameters
    ----------
    steps
        Moves.
    blocks
        Tokens drawn anew in a move; several numbers take turns. Of a sequence shorter than that, all.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 200
    blocks: tuple[int, ...] = (1, 4, 8)

    anytime: ClassVar[bool] = True
    citation: ClassVar[str] = (
        "@article{hastings1970, title={Monte Carlo Sampling Methods Using Markov Chains and Their Applications}, "
        "author={Hastings, W. K.}, journal={Biometrika}, volume={57}, number={1}, pages={97--109}, year={1970}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if not self.blocks or min(self.blocks) < 1:
            raise InputError(f"blocks are numbers of tokens, each at least 1; got {self.blocks}.")

    @property
    def exact(self) -> bool:
        """As moves grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a masked prior."""
        return frozenset({"masked"})

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of MaskedGibbs follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """One pass a token drawn."""
        length = posterior.shape[0]
        return Cost(length + sum(self._block(k, length) for k in range(self.steps)))

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> GibbsState:
        """Draws of the prior, one token after the other."""
        shape = (ensembles, n, *posterior.shape)
        blank = torch.full(shape, posterior.mask_token, dtype=torch.int64, device=posterior.device)
        everywhere = torch.arange(shape[2], device=posterior.device).expand(shape)
        z = _drawn(posterior, blank, everywhere, noise)
        return GibbsState(z=z, log_likelihood=posterior.log_likelihood(z).double())

    def done(self, state: GibbsState) -> bool:
        """All moves made."""
        return state.step >= self.steps

    def progress(self, state: GibbsState) -> float:
        """Share of the moves made."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: GibbsState, *, noise: Noise) -> tuple[GibbsState, Info]:
        """One move of every walker."""
        e, n, length = state.z.shape
        subset = noise.uniform(noise.slots, (length,)).reshape(e, n, length).argsort(-1)
        subset = subset[..., : self._block(state.step, length)]
        z = _drawn(posterior, state.z.scatter(2, subset, posterior.mask_token), subset, noise)
        value = posterior.log_likelihood(z).double()
        # Not NaN where neither has a likelihood: a walker that is nowhere yet goes on as the prior does.
        gained = torch.where(torch.isneginf(state.log_likelihood), torch.inf, value - state.log_likelihood)
        taken = noise.uniform(noise.slots).reshape(e, n).log() < gained
        new = GibbsState(
            z=torch.where(taken[..., None], z, state.z),
            log_likelihood=torch.where(taken, value, state.log_likelihood),
            step=state.step + 1,
        )
        # The draws' misfit alone: it costs as much as the move.
        return new, Info(sigma=0.0, misfit=posterior.misfit(new.z) if self.done(new) else None)

    def finish(self, posterior: Posterior, state: GibbsState, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the walkers where they are; one a draw, so that draws are independent of each other.

        Raises
        ------
        SamplingError
            If a walker has met no sequence of positive likelihood.
        """
        lost = ~torch.isfinite(state.log_likelihood)
        if bool(lost.any()):
            raise SamplingError(
                f"{int(lost.sum())} of {lost.numel()} walkers have met no sequence whose likelihood is above zero. "
                "Take more steps or TwistedSMC, or check that the measurement fits the prior."
            )
        return Draws(z=state.z)

    def _block(self, step: int, length: int) -> int:
        """Tokens of a move."""
        return min(self.blocks[step % len(self.blocks)], length)


def _drawn(posterior: Posterior, z: Tensor, positions: Tensor, noise: Noise) -> Tensor:
    """Fill masked positions (ensemble, particle, number), one after the other, from the prior's conditionals."""
    u = noise.uniform(noise.slots, (positions.shape[-1],)).reshape(positions.shape)
    for b in range(positions.shape[-1]):
        here = positions[..., b : b + 1]
        V = posterior.vocabulary_size
        c = posterior.log_probs(z).gather(2, here[..., None].expand(*here.shape, V))[:, :, 0]
        z = z.scatter(2, here, categorical(c, u[..., b])[..., None])
    return z
