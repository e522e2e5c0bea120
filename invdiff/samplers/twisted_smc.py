r"""Twisted sequential Monte Carlo on masked tokens, in any order, fully adapted.

All particles start with every token masked. A step chooses a masked position i of each particle by a rule that looks at
the known tokens alone, and draws its token with the twist psi (`samplers.twists`) in mind. With the conditionals
``c_i(v) = p(x_i = v | known tokens)``,

    q(v) ~ c_i(v) psi(x, x_i = v),      w <- w  sum_v c_i(v) psi(x, x_i = v) / psi(x).

The first weight is psi of the empty sequence, and psi of a complete one is p(y | x). The weights telescope to
p(x) p(y | x) / q(x) for any psi that is positive where the posterior is, and their means estimate the evidence without
bias. The weight does not depend on the token drawn, so that nothing is gained by drawing it after resampling.

Reference: twisting is Whiteley & Lee 2014 and, for diffusions, Wu et al. 2023 (arXiv 2306.17775); one token a step is
the masked diffusion with as many steps as tokens, whose law is the prior's own (Ou et al. 2024, arXiv 2406.03736).
Published discrete samplers resample candidates within each particle and leave out psi(x), the normalisation of the step
before (SVDD, Li et al. 2024), which is biased for any number of candidates; here it is kept.

Exact as particles grow. The order is part of the proposal and must not depend on the value that it leads to: to choose
the position whose drawn token is most probable, as confidence orders do, would be a bias that no weight here mends.
Measured on problems that can be enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: with L tokens of V kinds 1 + (L - 1) V forward passes with ``lookahead``, in batches of V, which asks the network
for the conditionals after every candidate; L without it, where psi of a candidate is guessed from the conditionals
before it; none backward.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.particles import Resampling, Systematic, alive, check_threshold
from invdiff.samplers.token_particles import TokenParticles, blank, random_position
from invdiff.samplers.twists import Twist, default_twist


@final
@dataclass(frozen=True, kw_only=True)
class TwistedSMC(Sampler):
    """Sequential Monte Carlo on masked tokens, one token a step, with candidates weighed by a twist.

    Parameters
    ----------
    twist
        MomentMatched() or PlugIn(); if None, MomentMatched() for Gaussian noise with a gradient, else PlugIn().
    order
        "random": each particle's next position is uniform among its masked ones; "entropy": the one whose conditional
        has the least entropy; "left": the first.
    lookahead
        Whether candidates are judged by the conditionals after them, V evaluations a step, or before, one.
    resampling
        Systematic(), Stratified(), Residual() or BirthDeath().
    threshold
        Share of the particles below which the effective sample size of an ensemble makes it resample; in [0, 1].

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    twist: Twist | None = None
    order: Literal["random", "entropy", "left"] = "random"
    lookahead: bool = True
    resampling: Resampling = field(default_factory=Systematic)
    threshold: float = 0.5

    citation: ClassVar[str] = (
        "@article{whiteley2014, title={Twisted Particle Filters}, author={Whiteley, Nick and Lee, Anthony}, "
        "journal={The Annals of Statistics}, volume={42}, number={1}, pages={115--141}, year={2014}}\n"
        "@inproceedings{wu2023tds, "
        "title={Practical and Asymptotically Exact Conditional Sampling in Diffusion Models}, "
        "author={Wu, Luhuan and Trippe, Brian L. and Naesseth, Christian A. and Blei, David M. and "
        "Cunningham, John P.}, booktitle={NeurIPS}, year={2023}}"
    )

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.order not in ("random", "entropy", "left"):
            raise InputError(f"order is 'random', 'entropy' or 'left', got {self.order!r}.")

    @property
    def exact(self) -> bool:
        """As particles grow."""
        return True

    def requires(self) -> frozenset[str]:
        """Return a masked prior, and what the twist asks for."""
        return frozenset({"masked"}) | (frozenset() if self.twist is None else self.twist.requires())

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of TwistedSMC follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """1 + (L - 1) V passes with lookahead, L without."""
        return Cost(1 + (posterior.shape[0] - 1) * (posterior.vocabulary_size if self.lookahead else 1))

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
        """Choose a position, weigh every token for it, and draw one."""
        e, n, length = state.z.shape
        u = noise.uniform(noise.slots, (2,)).reshape(e, n, 2)
        position = self._position(posterior, state, u[..., 0])
        V, last = posterior.vocabulary_size, state.step == length - 1
        own = position[..., None, None].expand(e, n, 1, V)
        c = state.log_probs.gather(2, own)[:, :, 0]
        # A token of probability zero is no candidate: another one stands in, which the prior can answer for.
        v = torch.arange(V, device=c.device)
        token = torch.where(torch.isneginf(c), c.argmax(-1, keepdim=True), v)
        candidates = state.z[:, :, None].expand(e, n, V, length).scatter(
            3, position[..., None, None].expand(e, n, V, 1), token[..., None]
        )  # fmt: skip
        if last:
            log_probs, log_twist = None, posterior.log_likelihood(candidates).double()
        else:
            log_probs = self._conditionals(posterior, state, candidates, position, token)
            log_twist = self._twist(posterior).log_twist(posterior, log_probs)
        joint = c + log_twist
        chosen = categorical(joint, u[..., 1])[..., None]
        z = _taken(candidates, chosen)
        increment = torch.logsumexp(joint, dim=-1) - state.log_twist
        new = replace(
            state,
            z=z,
            step=state.step + 1,
            log_probs=state.log_probs if log_probs is None else self._after(posterior, z, _taken(log_probs, chosen)),
            log_twist=log_twist.gather(2, chosen)[..., 0],
        ).reweighted(
            alive(state, increment), f" at token {state.step + 1} of {length}: no candidate has a likelihood above zero"
        )
        info = Info(sigma=1.0 - new.step / length, ess=new.ess)
        if last:  # the last weights stay with the draws
            return new, replace(info, misfit=posterior.misfit(z))
        return new.resampled(self.resampling, noise, self.threshold), info

    def finish(self, posterior: Posterior, state: TokenParticles, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the complete sequences, their weights and the evidence."""
        return Draws(z=state.z, log_weights=state.log_weights, log_evidence=state.evidence)

    # Within.

    def _twist(self, posterior: Posterior) -> Twist:
        return default_twist(posterior) if self.twist is None else self.twist

    def _position(self, posterior: Posterior, state: TokenParticles, u: Tensor) -> Tensor:
        """Next position of each particle, (ensemble, particle); it depends on no token that is still to be drawn."""
        masked = state.z == posterior.mask_token
        if self.order == "left":
            return masked.to(torch.int8).argmax(-1)
        if self.order == "entropy":
            entropy = -torch.xlogy(state.log_probs.exp(), state.log_probs.exp()).sum(-1)
            return torch.where(masked, entropy, torch.inf).argmin(-1)
        return random_position(masked, u)

    def _conditionals(
        self, posterior: Posterior, state: TokenParticles, candidates: Tensor, position: Tensor, token: Tensor
    ) -> Tensor:
        """Conditionals (ensemble, particle, V, length, V) by which candidates are judged."""
        if self.lookahead:
            return posterior.log_probs(candidates)
        e, n, V, length = candidates.shape
        here = position[..., None, None, None].expand(e, n, V, 1, V)
        other = torch.arange(V, device=token.device) != token[..., None]
        known = torch.zeros(other.shape, dtype=torch.float64, device=token.device).masked_fill_(other, -torch.inf)
        return state.log_probs[:, :, None].expand(e, n, V, length, V).scatter(3, here, known[..., None, :])

    def _after(self, posterior: Posterior, z: Tensor, log_probs: Tensor) -> Tensor:
        """Conditionals given the token that was drawn."""
        return log_probs if self.lookahead else posterior.log_probs(z)


def _taken(values: Tensor, chosen: Tensor) -> Tensor:
    """Values (ensemble, particle, V, ...) of the chosen candidate (ensemble, particle, 1)."""
    index = chosen.reshape(*chosen.shape, *[1] * (values.ndim - 3)).expand(*chosen.shape, *values.shape[3:])
    return values.gather(2, index)[:, :, 0]
