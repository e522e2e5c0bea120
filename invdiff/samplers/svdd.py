r"""Soft value-based decoding (SVDD-PM, Li et al. 2024, arXiv 2408.08252) with a masked prior.

All tokens are masked at first. In each step every particle unmasks a share of its tokens in K ways, its candidates, and
goes on as one of them. A candidate x'^(k) is worth the log-likelihood at its decoded expectation,

    x'^(k) ~ p(x' | x),   v_k = log p(y | decode(sum_v c_i(v | x'^(k)) E_v)),   P(k) ~ exp(v_k / alpha),

with c the prior's conditionals and E the codebook; for a complete sequence v is its log-likelihood. alpha = 1 draws
as Bayes' rule has it, larger values trust the prior more, and alpha = 0 takes the best candidate.

Departures: the published code takes the best, alpha -> 0; here alpha = 1 unless told otherwise. There every masked
token is unmasked with one probability a step, so that some steps unmask none and their candidates are all alike; here
every step unmasks as many as the others, at positions drawn anew for each candidate, and as many steps as tokens make
it the prior's own law without the choice. Values are those of the decoded expectation in place of a reward of the most
probable tokens.

Biased, for every number of candidates. K candidates know little of a law; and as K grows, a step's law tends to
p(x' | x) exp v(x') / Z(x), whose product over steps is not the posterior: Z(x) is not exp v(x) unless v is the log of
E[p(y | x_0) | x], which a plugged-in mean is not. Weights that keep the ratio, and resampling of all particles
together, make it `TwistedSMC`. With fewer steps than tokens those of one step are drawn independently of each other.
Measured on problems that can be enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: with T steps 1 + (T - 1) K forward passes, in batches of K; none backward. Decoder calls: T K, and one at the end
for the misfit; none backward.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import ClassVar, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps
from invdiff.samplers.twists import PlugIn


@dataclass(frozen=True, kw_only=True)
class DecodedTokens(State):
    """Sequences with masked tokens, int64 (ensemble, particle, length), with what the prior said of them.

    Parameters
    ----------
    log_probs
        Conditionals, float64, (ensemble, particle, length, V).
    value
        v of the sequence, float64, (ensemble, particle).
    """

    log_probs: Tensor
    value: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class SVDD(Sampler):
    """Unmask in several ways at a time, and go on as the one whose decoded expectation fits.

    Parameters
    ----------
    steps
        Steps of unmasking; at most one a token is taken.
    candidates
        K, ways to unmask of which one is chosen; 1 draws from the prior.
    alpha
        Temperature of the choice, not negative: 1 is Bayes' rule, 0 the best candidate.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 64
    candidates: int = 20
    alpha: float = 1.0

    citation: ClassVar[str] = (
        "@article{li2024svdd, title={Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft "
        "Value-Based Decoding}, author={Li, Xiner and Zhao, Yulai and Wang, Chenyu and Scalia, Gabriele and Eraslan, "
        "Gokcen and Nair, Surag and Biancalani, Tommaso and Ji, Shuiwang and Regev, Aviv and Levine, Sergey and "
        "Uehara, Masatoshi}, journal={arXiv:2408.08252}, year={2024}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.candidates < 1:
            raise InputError(f"A step needs at least one candidate, got {self.candidates}.")
        if not (self.alpha >= 0.0 and isfinite(self.alpha)):
            raise InputError(f"alpha is a temperature, finite and not negative; got {self.alpha}.")

    @property
    def exact(self) -> bool:
        """In no limit."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a masked prior."""
        return frozenset({"masked"})

    def cost(self) -> Cost:
        """Raise: it follows from the number of tokens, as `cost_on` has it."""
        raise CapabilityError("The cost of SVDD follows from the number of tokens; ask cost_on(posterior).")

    def cost_on(self, posterior: Posterior) -> Cost:
        """1 + (T - 1) K passes, T no more than the tokens."""
        return Cost(1 + (self._steps(posterior.shape[0]) - 1) * self.candidates)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> DecodedTokens:  # noqa: ARG002 the contract's
        """Every token masked."""
        shape = (ensembles, n, *posterior.shape)
        z = torch.full(shape, posterior.mask_token, dtype=torch.int64, device=posterior.device)
        value = torch.zeros(ensembles, n, dtype=torch.float64, device=posterior.device)  # nothing is compared with it
        return DecodedTokens(z=z, log_probs=posterior.log_probs(z), value=value)

    def done(self, state: DecodedTokens) -> bool:
        """All tokens known."""
        return state.step >= self._steps(state.z.shape[-1])

    def progress(self, state: DecodedTokens) -> float:
        """Share of the steps made."""
        return state.step / self._steps(state.z.shape[-1])

    def step(self, posterior: Posterior, state: DecodedTokens, *, noise: Noise) -> tuple[DecodedTokens, Info]:
        """Unmask in K ways and choose one."""
        e, n, length = state.z.shape
        K, T = self.candidates, self._steps(length)
        number = length * (state.step + 1) // T - length * state.step // T
        u = noise.uniform(noise.slots, (2, K, length)).reshape(e, n, 2, K, length)
        masked = (state.z == posterior.mask_token)[:, :, None]
        first = torch.where(masked, u[:, :, 0], inf).argsort(-1)[..., :number]  # candidates' own positions
        V = posterior.vocabulary_size
        c = state.log_probs[:, :, None].expand(e, n, K, length, V)
        c = c.gather(3, first[..., None].expand(e, n, K, number, V))
        drawn = categorical(c, u[:, :, 1].gather(3, first))
        x = state.z[:, :, None].expand(e, n, K, length).scatter(3, first, drawn)
        last = state.step == T - 1
        if last:
            log_probs, value = None, posterior.log_likelihood(x).double()
        else:
            log_probs = posterior.log_probs(x)
            value = PlugIn().log_twist(posterior, log_probs)
        k = self._chosen(value, noise)[..., None]
        z = x.gather(2, k[..., None].expand(e, n, 1, length))[:, :, 0]
        if log_probs is not None:
            log_probs = log_probs.gather(2, k[..., None, None].expand(e, n, 1, length, V))[:, :, 0]
        new = DecodedTokens(
            z=z,
            log_probs=state.log_probs if log_probs is None else log_probs,
            value=value.gather(2, k)[..., 0],
            step=state.step + 1,
        )
        return new, Info(sigma=1.0 - new.step / T, misfit=posterior.misfit(z) if last else None)

    def finish(self, posterior: Posterior, state: DecodedTokens, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the complete sequences.

        Raises
        ------
        SamplingError
            If a particle's candidates had no likelihood at the end.
        """
        lost = ~torch.isfinite(state.value)
        if bool(lost.any()):
            raise SamplingError(
                f"{int(lost.sum())} of {lost.numel()} particles have met no sequence whose likelihood is above zero. "
                "Take more candidates or TwistedSMC, or check that the measurement fits the prior."
            )
        return Draws(z=state.z)

    # Within.

    def _steps(self, length: int) -> int:
        return min(self.steps, length)

    def _chosen(self, value: Tensor, noise: Noise) -> Tensor:
        """Index of the candidate that each particle goes on as, (ensemble, particle)."""
        if self.alpha == 0.0:
            return value.argmax(-1)
        u = noise.uniform(noise.slots).reshape(value.shape[:2])
        return categorical(value / self.alpha, u)
