r"""What samplers of tokens share that fit a law of independent tokens to the measurement by gradients.

The law is q = prod_i softmax(phi_i), and phi is moved by Adam (Kingma & Ba 2015) against the gradient of

    -log p(y | decode(e)) + k KL(q || c),      e_i = sum_v q_i(v) E_v   or an estimate that a sampler puts in its place,

with c the prior's conditionals and E the codebook. Whatever e is, the gradient passes as if it were the mean,

    d e_i / d phi_i(v) = q_i(v) (E_v - e_i),

the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432). k = 1 is the weight of Bayes' rule: at a fixed
point q_i(v) ~ c_i(v) exp(E_v . g_i), g the gradient of log p(y | decode(e)) at e, which is what a mean-field posterior
has if log p(y | .) is taken to be linear around e.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, cos, log, pi, sqrt
from typing import Literal

import torch
from torch import Tensor

from invdiff.errors import InputError, SamplingError
from invdiff.noise import Noise
from invdiff.parallel import Shard
from invdiff.posterior import Posterior

Estimator = Literal["hard", "soft", "entropy"]
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8

Point = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Logits (..., V) to (weights w with sum 1 whose mean sum_v w E is differentiated, vectors that are decoded)."""


def check_inner(steps: int, lr: float, kl: float) -> None:
    """Raise InputError unless the settings of a fit are in range."""
    if steps < 1:
        raise InputError(f"A fit takes at least one inner step, got {steps}.")
    if not lr > 0.0:
        raise InputError(f"lr is a step of logits, positive; got {lr}.")
    if not kl >= 0.0:
        raise InputError(f"kl is a weight, not negative; got {kl}.")


def nearest(E: Tensor, mean: Tensor) -> Tensor:
    """Code nearest to each mean (..., c); the first of equally near ones."""
    return E[(0.5 * E.square().sum(1) - mean @ E.mT).argmin(-1)]


def estimate(E: Tensor, estimator: Estimator) -> Point:
    """Vectors that are decoded in place of the mean.

    "soft" is the mean itself; "hard" the code nearest to it; "entropy" lies between, the more to the hard end the more
    entropy a token has: mean + w (hard - mean), w = H(q_i) / log V.
    """

    def point(logits: Tensor) -> tuple[Tensor, Tensor]:
        q = logits.softmax(-1)
        mean = q @ E
        if estimator == "soft":
            return q, mean
        hard = nearest(E, mean)
        if estimator == "hard":
            return q, hard
        w = torch.special.entr(q).sum(-1, keepdim=True) / log(max(len(E), 2))
        return q, mean + w * (hard - mean)

    return point


def gumbel(E: Tensor, temperature: float, noise: Noise) -> Point:
    """Gumbel-softmax (Jang et al. 2017, arXiv 1611.01144): a random point near a vertex, new at every call."""

    def point(logits: Tensor) -> tuple[Tensor, Tensor]:
        u = noise.uniform(noise.slots, tuple(logits.shape[2:])).reshape(logits.shape).to(logits.dtype)
        g = -torch.log(-torch.log(u.clamp(1e-12, 1.0 - 1e-7)))
        w = ((logits + g) / temperature).softmax(-1)
        return w, w @ E

    return point


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Adam's settings, and the weight of the divergence.

    Parameters
    ----------
    steps
        Steps, one decoder call each, forward and backward.
    lr
        Step of the logits.
    kl
        k, the weight of KL(q || c).
    rectified
        Whether the first steps wait until the second moment is known, as RAdam's do (Liu et al. 2020, arXiv
        1908.03265), and then grow.
    sharpness
        By how much the gradient of e with respect to the logits is larger than that of the softmax's mean: 1 over the
        temperature.
    """

    steps: int
    lr: float
    kl: float
    rectified: bool = False
    sharpness: float = 1.0

    def run(self, posterior: Posterior, logits: Tensor, log_c: Tensor, z: Tensor, free: Tensor, point: Point) -> Tensor:
        """Logits (ensemble, particle, length, V) after the fit; log-probabilities.

        Parameters
        ----------
        posterior
            Where the likelihood and its gradient come from.
        logits, log_c
            Where to start, and log c; minus infinity where c is zero.
        z, free
            Tokens (ensemble, particle, length), and which of them the fit may move; the others stay as they are.
        point
            What is decoded, of logits.
        """
        E = posterior.codebook
        possible = ~torch.isneginf(log_c)
        known = E[z.clamp_max(len(E) - 1)]
        # A token of probability zero stays so; it enters no sum as 0 times infinity.
        log_c = torch.where(possible, log_c, 0.0)
        phi = torch.where(possible, logits, -torch.inf)
        first, second = torch.zeros_like(phi), torch.zeros_like(phi)
        for t in range(1, self.steps + 1):
            w, vectors = point(phi)
            value, g = posterior.embedding_log_likelihood_and_grad(torch.where(free[..., None], vectors, known))
            # Where the likelihood is zero its logarithm has no slope that could be followed: the prior alone leads on.
            g = torch.where(torch.isneginf(value)[..., None, None], 0.0, g)
            gain = g @ E.mT  # of log p along each token's vector
            loss_grad = -self.sharpness * w * (gain - (w * gain).sum(-1, keepdim=True))
            if self.kl > 0.0:
                q, log_q = phi.softmax(-1), phi.log_softmax(-1)
                ratio = torch.where(possible, log_q - log_c, 0.0)
                loss_grad = loss_grad + self.kl * q * (ratio - (q * ratio).sum(-1, keepdim=True))
            first = _BETA1 * first + (1.0 - _BETA1) * loss_grad
            second = _BETA2 * second + (1.0 - _BETA2) * loss_grad.square()
            phi = phi - self._move(first, second, t)
        return torch.where(free[..., None], phi.log_softmax(-1), logits)

    def _move(self, first: Tensor, second: Tensor, t: int) -> Tensor:
        m = first / (1.0 - _BETA1**t)
        v = (second / (1.0 - _BETA2**t)).sqrt()
        if not self.rectified:
            return self.lr * m / (v + _EPSILON)
        longest = 2.0 / (1.0 - _BETA2) - 1.0
        length = longest - 2.0 * t * _BETA2**t / (1.0 - _BETA2**t)
        if length <= 5.0:
            return self.lr * m
        r = sqrt(
            (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        )  # share of the variance of v^-1/2 that t steps have left
        return self.lr * r * m / (v + _EPSILON)


def final_misfit(posterior: Posterior, z: Tensor, shard: Shard) -> float:
    """Reduced misfit of this process's complete sequences (ensemble, particle, length), one decoder call each.

    Raises
    ------
    SamplingError
        If no draw of an ensemble has a likelihood above zero. Some may have none: the samplers here are biased.
    """
    deviance = posterior.deviance(z)
    every = shard.gather(deviance)
    nowhere = torch.isposinf(every).all(-1)
    if bool(nowhere.any()):
        e = int(nowhere.nonzero()[0])
        raise SamplingError(
            f"None of the {every.shape[1]} draws of ensemble {e} has a likelihood above zero. Take more draws or "
            "TwistedSMC, or check that the measurement fits the prior."
        )
    return float(deviance.mean()) / posterior.measurements


def kept(schedule: Literal["cosine", "linear"], step: int, steps: int, length: int) -> int:
    """How many tokens are known after a step; all of them after the last."""
    done = (step + 1) / steps
    share = done if schedule == "linear" else 1.0 - cos(0.5 * pi * done)
    return length if step + 1 >= steps else min(length, max(1, ceil(length * share)))
