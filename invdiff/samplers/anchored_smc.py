r"""APS inside sequential Monte Carlo: what the fit proposes is weighed, so that the sampler is consistent.

Anchored posterior sampling (`samplers.aps`, Rout et al. 2025, arXiv 2510.02291) fits independent tokens q to the
measurement and keeps what it drew. Here one token a step is kept, and its weight remembers that it came from q and not
from the posterior. With c the prior's conditionals given the known tokens x and psi a twist (`samplers.twists`),

    q^ = (1 - d) q + d c,     v ~ q^_i,     w <- w  c_i(v) / q^_i(v)  psi(x, x_i = v) / psi(x).

psi of the empty sequence begins the weight, and psi of a complete one is p(y | x), so that weights telescope to
p(x) p(y | x) / q^(x) and their means estimate the evidence without bias, whatever q and psi are. The share d of the
prior keeps the first ratio below 1 / d.

The position i is the masked one of which q^ is most confident, max_v q^_i(v): the same for every value that may be
drawn there. To keep the token whose *drawn* value is most probable, as APS does, would be a bias that no weight here
mends. One token a step makes the prior's own law; fewer steps would be exact for the law of parallel unmasking only.

A fit may serve ``every`` tokens: until the next, what it added to log c, log q - log c, is added to the conditionals of
the day. Any proposal is weighed rightly, and a stale one costs particles, not truth.

Exact as particles grow. `TwistedSMC` weighs every token of the vocabulary instead, with an evaluation each; where the
vocabulary is large, as that of a tokenizer, one fit a step is what can be paid. Measured on problems that can be
enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: one forward pass a token, none backward through the network. Decoder calls with L tokens: ``inner_steps`` for
each of the L / ``every`` fits, forward and backward, and forward L + 2. A twist by moments takes as many backward as
there are measured values, for each of L twists, where the decoder is not linear.
"""

from dataclasses import dataclass, field, replace
from math import log, log1p
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.particles import Resampling, Systematic, check_threshold
from invdiff.samplers.token_particles import TokenParticles, blank, random_position, weighed
from invdiff.samplers.twists import Twist, default_twist
from invdiff.samplers.variational import Estimator, Fit, check_inner, estimate


@dataclass(frozen=True, kw_only=True)
class AnchoredParticles(TokenParticles):
    """Weighted particles of tokens, with what the last fit said of them.

    Parameters
    ----------
    tilt
        Log q - log c of the last fit, (ensemble, particle, length, V).
    """

    tilt: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class AnchoredSMC(Sampler):
    """Sequential Monte Carlo on masked tokens, one token a step, proposed by a fit to the measurement.

    Parameters
    ----------
    inner_steps
        Steps of Adam in a fit.
    every
        Tokens that a fit serves.
    lr
        Step of the logits, positive.
    kl
        Weight of KL(q || c), not negative; 1 is Bayes' rule.
    estimator
        What is decoded in the fit: "soft", the mean; "hard", the code nearest to it; "entropy", between.
    defence
        d in (0, 1), the prior's share of the proposal.
    order
        "confident": the position of which the proposal is most certain is next; "random": a uniform one.
    twist
        MomentMatched() or PlugIn(); if None, MomentMatched() for Gaussian noise with a gradient where its covariance is
        cheap, else PlugIn().
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    inner_steps: int = 10
    every: int = 1
    lr: float = 0.5
    kl: float = 1.0
    estimator: Estimator = "soft"
    defence: float = 0.1
    order: Literal["confident", "random"] = "confident"
    twist: Twist | None = None
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5

    citation: ClassVar[str] = (
        "@article{rout2025aps, title={Test-Time Anchoring for Discrete Diffusion Posterior Sampling}, "
        "author={Rout, Litu and Lugmayr, Andreas and Jafarian, Yasamin and Varadharajan, Srivatsan and Caramanis, "
        "Constantine and Shakkottai, Sanjay and Kemelmacher-Shlizerman, Ira}, journal={arXiv:2510.02291}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_inner(self.inner_steps, self.lr, self.kl)
        if self.every < 1:
            raise InputError(f"A fit serves at least one token, got every={self.every}.")
        check_threshold(self.threshold)
        if self.estimator not in ("hard", "soft", "entropy"):
            raise InputError(f"estimator is 'hard', 'soft' or 'entropy', got {self.estimator!r}.")
        if self.order not in ("confident", "random"):
            raise InputError(f"order is 'confident' or 'random', got {self.order!r}.")
        if not 0.0 < self.defence < 1.0:
            raise InputError(f"defence is the prior's share of the proposal, in (0, 1); got {self.defence}.")

    @property
    def exact(self) -> bool:
        """As particles grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a masked prior, a gradient with respect to vectors, and what the twist asks for."""
        own = frozenset({"masked", "embedding_gradient"})
        return own | (frozenset() if self.twist is None else self.twist.requires())

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of AnchoredSMC follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """One pass a token."""
        return Cost(posterior.shape[0])

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AnchoredParticles:
        """Every token masked; the weight is psi."""
        z, log_probs, log_twist = blank(posterior, ensembles, n, self._twist(posterior))
        tilt = torch.zeros_like(log_probs, dtype=posterior.dtype)
        return AnchoredParticles.begin(
            z, log_twist, shard=noise.shard, log_probs=log_probs, log_twist=log_twist, tilt=tilt
        )

    def done(self, state: AnchoredParticles) -> bool:
        """All tokens known."""
        return state.step >= state.z.shape[-1]

    def progress(self, state: AnchoredParticles) -> float:
        """Share of the tokens known."""
        return state.step / state.z.shape[-1]

    def step(self, posterior: Posterior, state: AnchoredParticles, *, noise: Noise) -> tuple[AnchoredParticles, Info]:
        """Fit q, draw the token of one position from it, and weigh it."""
        e, n, _ = state.z.shape
        u = noise.uniform(noise.slots, (2,)).reshape(e, n, 2)
        masked = state.z == posterior.mask_token
        c = state.log_probs
        tilt = self._tilt(posterior, state.z, masked, c) if state.step % self.every == 0 else state.tilt
        proposal = self._proposal(c, tilt)
        position = self._position(masked, proposal, u[..., 0])[..., None]
        own = position[..., None].expand(e, n, 1, posterior.vocabulary_size)
        q, c = proposal.gather(2, own)[:, :, 0], c.gather(2, own)[:, :, 0]
        token = categorical(q, u[..., 1])[..., None]
        z = state.z.scatter(2, position, token)
        return weighed(
            posterior,
            replace(state, tilt=tilt),
            z,
            (c.gather(2, token) - q.gather(2, token))[..., 0],
            twist=self._twist(posterior),
            resampling=self.resampling,
            threshold=self.threshold,
            noise=noise,
        )

    def finish(self, posterior: Posterior, state: AnchoredParticles, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the complete sequences, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _twist(self, posterior: Posterior) -> Twist:
        return default_twist(posterior) if self.twist is None else self.twist

    def _tilt(self, posterior: Posterior, z: Tensor, masked: Tensor, log_c: Tensor) -> Tensor:
        """Log q - log c of a fit, zero where a token is impossible, (ensemble, particle, length, V)."""
        c = log_c.to(posterior.dtype)
        fit = Fit(steps=self.inner_steps, lr=self.lr, kl=self.kl)
        q = fit.run(posterior, c, c, z, masked, estimate(posterior.codebook, self.estimator))
        return torch.where(torch.isneginf(c), 0.0, q - c)

    def _proposal(self, log_c: Tensor, tilt: Tensor) -> Tensor:
        """Log q^, float64, (ensemble, particle, length, V)."""
        q = (log_c + tilt.double()).log_softmax(-1)
        return torch.logaddexp(q + log1p(-self.defence), log_c + log(self.defence))

    def _position(self, masked: Tensor, proposal: Tensor, u: Tensor) -> Tensor:
        """Next position of each particle, (ensemble, particle); it depends on no token that is still to be drawn."""
        if self.order == "confident":
            return torch.where(masked, proposal.amax(-1), -torch.inf).argmax(-1)
        return random_position(masked, u)
