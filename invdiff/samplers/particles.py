r"""Weighted particles: log-weights, resampling, evidence and genealogy, within each ensemble alone.

N particles of an ensemble with weights w_i stand for the law sum_i W_i delta(z_i), W_i = w_i / sum_j w_j. A step that
multiplies the weights by g_i keeps them as logarithms, float64; resampling replaces particle i by particle a_i, with
E[number of copies of i] = N W_i, and makes all weights equal. The product of mean w at the resamplings and at the end
is an unbiased estimate of the normalising constant (Del Moral 2004, section 7.4), here its logarithm.

All that is done to an ensemble depends on its own particles and noise: not on micro-batches, nor on the ensembles
beside it. Each resampling step therefore takes its noise whether or not an ensemble is resampled.

An ensemble may be shared by several processes (`invdiff.parallel`). A state then holds this process's particles and
their log-weights; the functions here take those of the whole ensemble, which `Weighted.all_log_weights` gathers, and
every process raises the same errors and takes the same ancestors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import log
from typing import Any, Self, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.draws import systematic_resample
from invdiff.driver import State
from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise
from invdiff.parallel import ALONE, Shard


def check_weights(log_weights: Float[Tensor, "ensemble n"], when: str = "") -> None:
    """Raise SamplingError if a log-weight is NaN or plus infinity, or all of an ensemble are minus infinity.

    Parameters
    ----------
    log_weights
        Unnormalised log-weights; minus infinity is a dead particle.
    when
        Words that say where the run was, for the message.
    """
    largest = log_weights.amax(-1)  # NaN if any is
    if bool(torch.isfinite(largest).all()):
        return
    broken = torch.isnan(log_weights) | torch.isposinf(log_weights)
    if bool(broken.any()):
        e = int(broken.any(-1).nonzero()[0])
        raise SamplingError(
            f"{int(broken[e].sum())} of {log_weights.shape[1]} particles of ensemble {e} have a log-weight that is NaN "
            f"or infinite{when}. Check the network's output and the scale of noise_std, or take smaller steps."
        )
    e = int(torch.isneginf(largest).nonzero()[0])
    raise SamplingError(
        f"All {log_weights.shape[1]} particles of ensemble {e} are dead: none has a finite log-weight{when}. "
        "Take more particles or more noise levels, or check that the measurement fits the prior."
    )


def log_mean_exp(log_weights: Float[Tensor, "ensemble n"]) -> Float[Tensor, " ensemble"]:
    """Logarithm of the mean weight of each ensemble, float64."""
    value: Tensor = torch.logsumexp(log_weights.double(), dim=-1) - log(log_weights.shape[-1])
    return value


def effective_sample_size(log_weights: Float[Tensor, "ensemble n"]) -> Float[Tensor, " ensemble"]:
    """1 / (n sum W^2), a share of n in [1 / n, 1] (Kong, Liu & Wong 1994)."""
    W = torch.softmax(log_weights.double(), dim=-1)
    return 1.0 / (W.square().sum(-1) * W.shape[-1])


def conditional_ess(
    log_weights: Float[Tensor, "ensemble n"], increment: Float[Tensor, "ensemble n"]
) -> Float[Tensor, " ensemble"]:
    """(sum W g)^2 / sum W g^2 for weights W and increments log g, in (0, 1] (Zhou, Johansen & Aston 2016, eq. 3.17).

    How well the weighted particles stand for the next law: unlike the effective sample size it does not count what
    earlier steps lost, so that levels chosen by it do not depend on when resampling happened. 0 where all g vanish.
    """
    W = torch.log_softmax(log_weights.double(), dim=-1)
    g = increment.double()
    first, second = torch.logsumexp(W + g, dim=-1), torch.logsumexp(W + 2.0 * g, dim=-1)
    return torch.where(torch.isneginf(second), 0.0, torch.exp(2.0 * first - second))


def survivors(first: Int[Tensor, "ensemble n"]) -> Int[Tensor, " ensemble"]:
    """Count the distinct first ancestors in each ensemble."""
    ranked = first.sort(dim=-1).values
    return 1 + (ranked[:, 1:] != ranked[:, :-1]).sum(-1)


class Resampling(ABC):
    """How ancestors are drawn; subclasses are final frozen dataclasses.

    Each keeps E[copies of i] = n W_i exactly and never takes a dead particle.
    """

    @abstractmethod
    def ancestors(self, log_weights: Float[Tensor, "ensemble n"], noise: Noise) -> Int[Tensor, "ensemble n"]:
        """Ancestor of each particle of the ensemble.

        Parameters
        ----------
        log_weights
            Unnormalised log-weights of all processes' particles, float64; minus infinity is a dead particle.
        noise
            Streams of the run.

        Raises
        ------
        SamplingError
            If all particles of an ensemble are dead, or a log-weight is NaN.
        """


@final
@dataclass(frozen=True)
class Systematic(Resampling):
    """Points (i + u) / n with one u an ensemble (Kitagawa 1996): between floor(n W) and ceil(n W) copies.

    Sorted ancestors; the least noise of the three in practice.
    """

    def ancestors(self, log_weights: Float[Tensor, "ensemble n"], noise: Noise) -> Int[Tensor, "ensemble n"]:
        """Ancestor of each particle; see `Resampling.ancestors`."""
        check_weights(log_weights)
        return systematic_resample(log_weights, noise.shared())


@final
@dataclass(frozen=True)
class Stratified(Resampling):
    """Points (i + u_i) / n with one u a particle (Kitagawa 1996); its variance is never above independent draws'."""

    def ancestors(self, log_weights: Float[Tensor, "ensemble n"], noise: Noise) -> Int[Tensor, "ensemble n"]:
        """Ancestor of each particle; see `Resampling.ancestors`."""
        check_weights(log_weights)
        e, n = log_weights.shape
        u = noise.uniform(noise.all_slots).reshape(e, n)
        return _inverse(torch.softmax(log_weights.double(), -1), (torch.arange(n, device=u.device) + u) / n)


@final
@dataclass(frozen=True)
class Residual(Resampling):
    """floor(n W) copies of each, and the rest by independent draws of what is left (Liu & Chen 1998)."""

    def ancestors(self, log_weights: Float[Tensor, "ensemble n"], noise: Noise) -> Int[Tensor, "ensemble n"]:
        """Ancestor of each particle; see `Resampling.ancestors`."""
        check_weights(log_weights)
        e, n = log_weights.shape
        u = noise.uniform(noise.all_slots).reshape(e, n)
        expected = n * torch.softmax(log_weights.double(), -1)
        copies = torch.floor(expected + 1e-9)  # equal weights may come out below their whole number
        left = (expected - copies).clamp_min(0.0)
        position = torch.arange(n, device=u.device, dtype=torch.float64).expand(e, n).contiguous()
        certain = torch.searchsorted(copies.cumsum(-1), position, right=True).clamp_(max=n - 1)
        # Where nothing is left every position is certain, and what is drawn is not used.
        drawn = _inverse(torch.where(left.sum(-1, keepdim=True) > 0, left, expected), u)
        return torch.where(position < copies.sum(-1, keepdim=True), certain, drawn)


@final
@dataclass(frozen=True)
class BirthDeath(Resampling):
    """Particle i dies with probability 1 - n W_i, and one with n W > 1, drawn by what it has too much, takes its place.

    The jumps of Rousset & Stoltz 2006 for a step of any length. Those that live stay where they are, so that with
    weights near one few particles move; its variance is above that of `Systematic`.
    """

    def ancestors(self, log_weights: Float[Tensor, "ensemble n"], noise: Noise) -> Int[Tensor, "ensemble n"]:
        """Ancestor of each particle; see `Resampling.ancestors`."""
        check_weights(log_weights)
        e, n = log_weights.shape
        dies, drawn = (noise.uniform(noise.all_slots).reshape(e, n) for _ in range(2))
        excess = n * torch.softmax(log_weights.double(), -1) - 1.0
        births = excess.clamp_min(0.0)
        # Where there are no births there are no deaths, and what is drawn is not used.
        parent = _inverse(torch.where(births.sum(-1, keepdim=True) > 0, births, torch.ones_like(births)), drawn)
        return torch.where(dies < -excess, parent, torch.arange(n, device=dies.device))


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    """First particle whose cumulative weight exceeds the point, by ensemble: one of no weight is never taken."""
    cumulative = weights.cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    points = points.clamp(max=1.0 - 2.0**-53).contiguous()
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=weights.shape[-1] - 1)


@dataclass(frozen=True, kw_only=True)
class Weighted(State):
    """A state of weighted particles; a sampler's own adds tensors (ensemble, particle, ...), which resampling moves.

    Parameters
    ----------
    log_weights
        Since the last resampling of the ensemble, float64, shape (ensemble, particle).
    log_evidence
        Log normalising constant gathered at the resamplings so far, float64, shape (ensemble,).
    first
        Index of each particle's ancestor at the start, among those of all processes, shape (ensemble, particle).
    shard
        Part of the particles that this process holds.
    """

    log_weights: Tensor
    log_evidence: Tensor
    first: Tensor
    shard: Shard = ALONE

    @classmethod
    def begin(
        cls,
        z: Tensor,
        log_weights: Tensor | None = None,
        *,
        shard: Shard = ALONE,
        **others: Any,
    ) -> Self:
        """Equal weights, or those given (ensemble, particle), for states z (ensemble, particle, *shape).

        Parameters
        ----------
        z, log_weights
            Of this process's particles.
        shard
            The noise's: ``noise.shard``.
        others
            Further fields of a subclass.

        Raises
        ------
        SamplingError
            If a log-weight is NaN, or no particle of an ensemble lives.
        """
        e, n = z.shape[:2]
        w = torch.zeros(e, n, dtype=torch.float64, device=z.device) if log_weights is None else log_weights.double()
        index = torch.arange(shard.rank * n, (shard.rank + 1) * n, device=z.device)
        state = cls(
            z=z,
            log_weights=w,
            log_evidence=torch.zeros(e, dtype=torch.float64, device=z.device),
            first=index.expand(e, n).contiguous(),
            shard=shard,
            **others,
        )
        check_weights(state.all_log_weights, " at the start")
        return state

    @cached_property
    def all_log_weights(self) -> Float[Tensor, "ensemble n"]:
        """Log-weights of all processes' particles, gathered once; a call that every process makes, as those below."""
        return self.shard.gather(self.log_weights)

    @property
    def ess(self) -> float:
        """Effective sample size of the ensemble where it is smallest, as a share of its particles."""
        return float(effective_sample_size(self.all_log_weights).min())

    @property
    def evidence(self) -> Float[Tensor, " ensemble"]:
        """Log normalising constant: what the resamplings gathered, and the mean weight since."""
        return self.log_evidence + log_mean_exp(self.all_log_weights)

    def conditional_ess(self, increment: Float[Tensor, "ensemble particle"]) -> Float[Tensor, " ensemble"]:
        """`conditional_ess` of this process's increments and all others': the same numbers everywhere."""
        return self.shard.first(conditional_ess(self.all_log_weights, self.shard.gather(increment)))

    def survivors(self) -> Int[Tensor, " ensemble"]:
        """Count the distinct first ancestors of all processes' particles in each ensemble."""
        return survivors(self.shard.gather(self.first))

    def reweighted(self, increment: Float[Tensor, "ensemble n"], when: str = "") -> Self:
        """Add the increments to the log-weights.

        Raises
        ------
        SamplingError
            If a log-weight becomes NaN, or an ensemble has no particle left that lives; ``when`` is put in the message.
        """
        new = replace(self, log_weights=self.log_weights + increment.double())
        check_weights(new.all_log_weights, when)
        return new

    def resampled(self, resampling: Resampling, noise: Noise, threshold: float = 0.5) -> Self:
        """Resample the ensembles whose effective sample size is below ``threshold`` of n; leave the others alone.

        Every tensor of shape (ensemble, particle, ...) moves with its particle, those of subclasses too.

        Raises
        ------
        InputError
            If the threshold is not a share, or the state does not know that its particles are shared with others.
        """
        check_threshold(threshold)
        if noise.shard != self.shard:
            raise InputError(
                f"The state holds {self.shard} of the particles, the noise {noise.shard}; begin the state with "
                "shard=noise.shard."
            )
        weights = self.all_log_weights
        below = self.shard.first(effective_sample_size(weights) < threshold)
        stay = torch.arange(weights.shape[1], device=below.device).expand(*weights.shape)
        ancestors = self.shard.first(torch.where(below[:, None], resampling.ancestors(weights, noise), stay))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {
            name: value
            for name, value in values.items()
            if isinstance(value, Tensor) and value.shape[:2] == self.log_weights.shape
        }
        moved: dict[str, Any] = dict(zip(own, self.shard.exchange(list(own.values()), ancestors), strict=True))
        moved["log_weights"] = torch.where(below[:, None], 0.0, self.log_weights)
        moved["log_evidence"] = torch.where(below, self.evidence, self.log_evidence)
        return replace(self, **moved)


def check_threshold(threshold: float) -> None:
    """Raise InputError unless a threshold of the effective sample size is a share: in [0, 1]."""
    if not 0.0 <= threshold <= 1.0:
        raise InputError(f"The effective sample size is a share of the particles, in [0, 1]; got {threshold}.")


def alive(state: Weighted, increment: Tensor) -> Tensor:
    """Increments, 0 for particles that are dead already: theirs may be a difference of infinities."""
    return torch.where(torch.isneginf(state.log_weights), 0.0, increment)
