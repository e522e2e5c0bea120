r"""Parallel unmasking: draws of a masked prior in T steps, with conditionals that are evaluated only when needed.

At step k of T every masked token is unmasked with probability 1 / (T - k), so that its step is uniform on the T, and
takes a value from its conditional given the tokens known before the step. Tokens of one step are drawn independently of
each other, which is the bias; it vanishes as T grows, when no two tokens share a step.

The conditionals depend on the known tokens alone, not on the time (Ou et al. 2024, arXiv 2406.03736): a sequence of
which no token is unmasked at a step needs no evaluation there. L tokens leave a step of T empty with probability
(1 - 1 / T)^L, so that a draw needs on average

    T (1 - (1 - 1 / T)^L) <= min(T, L)   evaluations.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from invdiff.draws import categorical
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.priors.base import MaskedPrior


@dataclass(frozen=True)
class Unmasked:
    """Draws, and what they cost.

    Parameters
    ----------
    tokens
        Complete sequences, (n, length).
    evaluations
        Evaluations of the conditionals for each sequence, (n,).
    """

    tokens: Int[Tensor, "n length"]
    evaluations: Int[Tensor, " n"]


@torch.no_grad()
def unmask(prior: MaskedPrior, noise: Noise, steps: int) -> Unmasked:
    """Draw one sequence for each of the noise's slots in a number of steps.

    Raises
    ------
    InputError
        If there is no step.
    """
    if steps < 1:
        raise InputError(f"Unmasking takes at least one step, got {steps}.")
    (length,) = prior.shape
    u = noise.uniform(noise.slots, (2, length))
    when, value = (u[:, 0] * steps).long(), u[:, 1]  # the step is drawn before any value is: it depends on none
    tokens = torch.full_like(when, prior.mask_token)
    evaluations = torch.zeros_like(when[:, 0])
    for k in range(steps):
        now = when == k
        rows = now.any(1).nonzero()[:, 0]
        if len(rows):
            drawn = categorical(prior.log_probs(tokens[rows]), value[rows])
            tokens[rows] = torch.where(now[rows], drawn, tokens[rows])
            evaluations[rows] += 1
    return Unmasked(tokens, evaluations)


def expected_evaluations(steps: int, length: int) -> float:
    """Mean evaluations a draw, T (1 - (1 - 1 / T)^L)."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** length)
