"""Exact posteriors of masked priors by enumeration: every sequence with its probability."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise, stream_key
from invdiff.priors.base import Measurement

if TYPE_CHECKING:
    from invdiff.priors.masked import ExactMaskedPrior

STATES = 2**20
"""Most sequences that are enumerated."""
_CHUNK = 2**14


@final
@dataclass(frozen=True, eq=False)
class EnumeratedPosterior:
    """``p(tokens | y)`` of every sequence, float64.

    Parameters
    ----------
    states
        Every sequence, the last token fastest, shape (V^length, length).
    log_probs
        Log-probability of each given y, normalised, shape (V^length,).
    log_evidence
        log p(y), nats.
    vocabulary_size
        V.
    """

    states: Int[Tensor, "states length"]
    log_probs: Float[Tensor, " states"]
    log_evidence: float
    vocabulary_size: int

    @cached_property
    def marginals(self) -> Float[Tensor, "length vocabulary"]:
        """Probability of each token at each position."""
        return token_marginals(self.states, self.log_probs.exp(), self.vocabulary_size)

    def index(self, tokens: Int[Tensor, "n length"]) -> Int[Tensor, " n"]:
        """Row of ``states`` that each sequence is."""
        V, length = self.vocabulary_size, self.states.shape[1]
        place = V ** torch.arange(length - 1, -1, -1, device=tokens.device)
        return (tokens * place).sum(1)

    def sample(self, n: int, *, seed: int = 0) -> Int[Tensor, "n length"]:
        """Independent exact draws, and independent of what the prior draws with the same seed."""
        noise = Noise([stream_key(seed, "posterior", "sample")], n, device=self.states.device)
        cumulative = self.log_probs.exp().cumsum(0)  # one law for all: searched, where `categorical` would compare
        point = noise.uniform(noise.slots) * cumulative[-1]
        point = torch.minimum(point, torch.nextafter(cumulative[-1], torch.zeros_like(cumulative[-1])))
        return self.states[torch.searchsorted(cumulative, point, right=True)]


def token_marginals(
    tokens: Int[Tensor, "n length"], weights: Float[Tensor, " n"], vocabulary_size: int
) -> Float[Tensor, "length vocabulary"]:
    """Weight of each token at each position, of weighted sequences whose weights sum to 1."""
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device) * vocabulary_size
    flat = torch.zeros(length * vocabulary_size, dtype=weights.dtype, device=weights.device)
    flat.index_add_(0, (tokens + place).flatten(), weights[:, None].expand(*tokens.shape).flatten())
    return flat.reshape(length, vocabulary_size)


def every_sequence(length: int, vocabulary_size: int, device: torch.device) -> Int[Tensor, "states length"]:
    """All sequences, the last token fastest.

    Raises
    ------
    CapabilityError
        If there are more than 2^20.
    """
    if vocabulary_size**length > STATES:
        raise CapabilityError(
            f"{vocabulary_size}^{length} sequences are too many to enumerate, at most {STATES}; take a shorter one."
        )
    number = torch.arange(vocabulary_size**length, device=device)
    place = vocabulary_size ** torch.arange(length - 1, -1, -1, device=device)
    return number[:, None] // place % vocabulary_size


def enumerated_posterior(prior: "ExactMaskedPrior", likelihood: Measurement) -> EnumeratedPosterior:
    """Exact posterior of one measurement; see `ExactMaskedPrior.posterior`."""
    if likelihood.problems != 1:
        raise InputError(f"A posterior is that of one measurement; this likelihood holds {likelihood.problems}.")
    states = every_sequence(prior.length, prior.vocabulary_size, prior.codebook.device)
    joint = torch.cat(
        [prior.log_prob(s) + likelihood.log_prob(prior.decode(s)).double() for s in torch.split(states, _CHUNK)]
    )
    if bool(torch.isnan(joint).any()):
        raise InputError("The log-likelihood of a sequence is NaN.")
    evidence = torch.logsumexp(joint, 0)
    if bool(torch.isneginf(evidence)):
        raise InputError(
            "The likelihood is zero for every sequence that the prior admits: there is no posterior. Check the "
            "measurement and the noise stated for it."
        )
    return EnumeratedPosterior(states, joint - evidence, float(evidence), prior.vocabulary_size)
