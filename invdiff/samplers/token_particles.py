"""What weighted samplers of tokens share: blank particles, a uniform masked position, and the weight of one token."""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from invdiff.driver import Info
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.particles import Resampling, Weighted, alive
from invdiff.samplers.twists import Twist


@dataclass(frozen=True, kw_only=True)
class TokenParticles(Weighted):
    """Weighted particles of tokens, int64 (ensemble, particle, length), with what the prior said of them.

    Parameters
    ----------
    log_probs
        Conditionals, float64, (ensemble, particle, length, V).
    log_twist
        Log psi, float64, (ensemble, particle).
    """

    log_probs: Tensor
    log_twist: Tensor


S = TypeVar("S", bound=TokenParticles)


def blank(posterior: Posterior, ensembles: int, n: int, twist: Twist) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences whose tokens are all masked, their conditionals, and log psi."""
    shape = (ensembles, n, *posterior.shape)
    z = torch.full(shape, posterior.mask_token, dtype=torch.int64, device=posterior.device)
    log_probs = posterior.log_probs(z)
    return z, log_probs, twist.log_twist(posterior, log_probs)


def random_position(masked: Tensor, u: Tensor) -> Tensor:
    """Return a masked position of each sequence (ensemble, particle, length), from a uniform (ensemble, particle)."""
    left = masked.sum(-1)
    rank = (u * left).long().minimum(left - 1)[..., None]
    return ((masked.cumsum(-1) == rank + 1) & masked).to(torch.int8).argmax(-1)


def weighed(
    posterior: Posterior,
    state: S,
    z: Tensor,
    ratio: Tensor,
    *,
    twist: Twist,
    resampling: Resampling,
    threshold: float,
    noise: Noise,
) -> tuple[S, Info]:
    """Weigh particles that have one token more, and resample them unless it was the last.

    Parameters
    ----------
    posterior, state
        Of what, and before the token.
    z
        With it.
    ratio
        Log of the prior's probability of the token over the proposal's, (ensemble, particle).
    twist, resampling, threshold, noise
        The sampler's, and the step's.

    Raises
    ------
    SamplingError
        If no particle of an ensemble has a likelihood above zero.
    """
    length, known = z.shape[-1], state.step + 1
    last = known == length
    if last:
        log_probs, log_twist = state.log_probs, posterior.log_likelihood(z).double()
    else:
        log_probs = posterior.log_probs(z)
        log_twist = twist.log_twist(posterior, log_probs)
    increment = ratio + log_twist - state.log_twist
    new = replace(state, z=z, step=known, log_probs=log_probs, log_twist=log_twist).reweighted(
        alive(state, increment), f" at token {known} of {length}: no particle has a likelihood above zero"
    )
    info = Info(sigma=1.0 - known / length, ess=new.ess)
    if last:  # the last weights stay with the draws
        return new, replace(info, misfit=posterior.misfit(z))
    return new.resampled(resampling, noise, threshold), info
