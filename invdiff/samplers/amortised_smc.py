r"""Sequential Monte Carlo on masked tokens with a proposal that was learnt, weighed so that it is exact.

A network has learnt, for this measurement, how to tilt the prior's conditionals c towards the posterior's: q ~ c exp h
(`priors.AmortisedPrior`, after Wang et al. 2024, arXiv 2410.13643). It is right only nearly, and here its weight says
so. One token a step, at a masked position i that is uniform, with a twist psi (`samplers.twists`):

    q^ = (1 - d) q + d c,     v ~ q^_i,     w <- w  c_i(v) / q^_i(v)  psi(x, x_i = v) / psi(x).

psi of the empty sequence begins the weight, and psi of a complete one is p(y | x): the weights telescope to
p(x) p(y | x) / q^(x), and their means estimate the evidence without bias, whatever was learnt. The share d of the prior
keeps the first ratio below 1 / d. Without a proposal q^ = c, and what is left is the twist.

Exact as particles grow. `AnchoredSMC` fits such a proposal anew for every particle; here it is paid for once, before
the run, and then costs a pass of a small network a token. How good it is differs from one training to the next.
Measured on the problem `chain-8` with 512 particles, 16 runs, for three trainings with the defaults of
`training.amortise`, beside the prior as the proposal:

    marginal TV                                          0.061, 0.071, 0.042   prior 0.082   (exact draws 0.023)
    effective sample size at the end, never resampled    0.14, 0.07, 0.22      prior 0.008
    smallest one of all runs and steps, resampled        0.20, 0.03, 0.24      prior 0.18

`TwistedSMC`, which asks the prior about every token of the vocabulary, has a TV of 0.031 there: where that can be paid,
take it.

Cost: one forward pass of the prior a token, and one of the proposal, counted alike; none backward. Decoder calls with L
tokens: forward L + 2.
"""

from dataclasses import dataclass, field
from math import log, log1p
from typing import ClassVar, Protocol, final, runtime_checkable

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.particles import Resampling, Systematic, check_threshold
from invdiff.samplers.token_particles import TokenParticles, blank, random_position, weighed
from invdiff.samplers.twists import Twist, default_twist


@runtime_checkable
class Tilt(Protocol):
    """A proposal, by what it adds to the prior's log-conditionals; its repr tells it from others."""

    def tilt(self, tokens: Tensor) -> Tensor:
        """Give h (n, length, V) at tokens (n, length), finite; it is not read where a token is known."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class AmortisedSMC(Sampler):
    """Sequential Monte Carlo on masked tokens, one token a step, proposed by a network that was fitted beforehand.

    Parameters
    ----------
    proposal
        An `AmortisedPrior` of the posterior's prior, on its device, from `invdiff.training.amortise`; the prior itself
        if None.
    defence
        d in (0, 1), the prior's share of the proposal.
    twist
        MomentMatched() or PlugIn(); if None, MomentMatched() for Gaussian noise with a gradient, else PlugIn().
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    proposal: Tilt | None = None
    defence: float = 0.1
    twist: Twist | None = None
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5

    citation: ClassVar[str] = (
        "@article{wang2024drakes, title={Fine-Tuning Discrete Diffusion Models via Reward Optimization with "
        "Applications to {DNA} and Protein Design}, author={Wang, Chenyu and Uehara, Masatoshi and He, Yichun and "
        "Wang, Amy and Biancalani, Tommaso and Lal, Avantika and Jaakkola, Tommi and Levine, Sergey and Wang, Hanchen "
        "and Regev, Aviv}, journal={arXiv:2410.13643}, year={2024}}"
    )

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not 0.0 < self.defence < 1.0:
            raise InputError(f"defence is the prior's share of the proposal, in (0, 1); got {self.defence}.")

    @property
    def exact(self) -> bool:
        """As particles grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a masked prior, and what the twist asks for."""
        return frozenset({"masked"}) | (frozenset() if self.twist is None else self.twist.requires())

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of AmortisedSMC follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """One pass a token, and one of the proposal."""
        return Cost(posterior.shape[0] * (1 if self.proposal is None else 2))

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> TokenParticles:
        """Every token masked; the weight is psi."""
        z, log_probs, log_twist = blank(posterior, ensembles, n, self._twist(posterior))
        return TokenParticles.begin(z, log_twist, shard=noise.shard, log_probs=log_probs, log_twist=log_twist)

    def done(self, state: TokenParticles) -> bool:
        """All tokens known."""
        return state.step >= state.z.shape[-1]

    def progress(self, state: TokenParticles) -> float:
        """Share of the tokens known."""
        return state.step / state.z.shape[-1]

    def step(self, posterior: Posterior, state: TokenParticles, *, noise: Noise) -> tuple[TokenParticles, Info]:
        """Draw the token of one position from the proposal, and weigh it."""
        e, n, _ = state.z.shape
        u = noise.uniform(noise.slots, (2,)).reshape(e, n, 2)
        position = random_position(state.z == posterior.mask_token, u[..., 0])[..., None]
        own = position[..., None].expand(e, n, 1, posterior.vocabulary_size)
        c = state.log_probs.gather(2, own)[:, :, 0]
        q = c if self.proposal is None else self._tilted(posterior, state.z, own, c, self.proposal)
        token = categorical(q, u[..., 1])[..., None]
        z = state.z.scatter(2, position, token)
        return weighed(
            posterior,
            state,
            z,
            (c.gather(2, token) - q.gather(2, token))[..., 0],
            twist=self._twist(posterior),
            resampling=self.resampling,
            threshold=self.threshold,
            noise=noise,
        )

    def finish(self, posterior: Posterior, state: TokenParticles, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the complete sequences, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _twist(self, posterior: Posterior) -> Twist:
        return default_twist(posterior) if self.twist is None else self.twist

    def _tilted(self, posterior: Posterior, z: Tensor, own: Tensor, c: Tensor, proposal: Tilt) -> Tensor:
        """Log q^ at each particle's position, float64, (ensemble, particle, V)."""
        e, n, length = z.shape
        posterior.evaluations.denoiser += e * n
        parts = torch.split(z.reshape(-1, length), posterior.micro_batch or e * n)
        h = torch.cat([proposal.tilt(part) for part in parts])
        if tuple(h.shape) != (e * n, length, c.shape[-1]):
            raise ShapeError(
                f"A tilt of {e * n} sequences has shape {(e * n, length, c.shape[-1])}, the proposal gave "
                f"{tuple(h.shape)}; it was made for another prior."
            )
        h = h.double().reshape(e, n, length, -1).gather(2, own)[:, :, 0]
        return torch.logaddexp((c + h).log_softmax(-1) + log1p(-self.defence), c + log(self.defence))
