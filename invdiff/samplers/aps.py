r"""Anchored posterior sampling (APS, Rout et al. 2025, arXiv 2510.02291): masked tokens fitted, then anchored.

All tokens are masked at first. Step k of T

    1. asks the prior once for the conditionals c_i of what is masked, and starts phi_i = log c_i there;
    2. moves phi by ``inner_steps`` steps of Adam on  -log p(y | decode(e)) + k KL(q || c),  q = softmax(phi), where e
       is the quantised expectation, the code nearest to sum_v q_i(v) E_v, with the gradient of the sum
       (`samplers.variational`);
    3. draws z_i ~ q_i everywhere, and keeps the n_k tokens of which q_i was most confident, log q_i(z_i), as anchors;
       the others are masked again. All are kept in the last step.

With ``sticky`` anchors stay. Without, all positions compete again: anchors keep the phi_i that they were drawn from,
which the fit goes on to move, and may be masked or drawn anew.

No code was published. The quantised expectation and the remasking follow the paper; where it leaves a choice the
default here is: k = 1, the weight of Bayes' rule, where its algorithm has no such term (k = 0, an optimiser of the fit
alone); the log-likelihood itself, in place of tuned absolute and perceptual errors; tokens drawn from q, not the most
probable ones.

Biased, in no limit exact: q has independent tokens, the quantised expectation stands for an expectation of
log p(y | .), tokens of one step are drawn independently, and which ones are kept depends on their values. `AnchoredSMC`
draws from q and weighs what it draws. Measured on problems that can be enumerated: the page on discrete problems, made
by `invdiff.bench.discrete`.

Cost: T forward passes; none backward through the network. Decoder calls: T ``inner_steps``, forward and backward, and
one at the end for the misfit.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps
from invdiff.samplers.variational import Estimator, Fit, check_inner, estimate, final_misfit, kept


@dataclass(frozen=True, kw_only=True)
class AnchoredTokens(State):
    """Sequences, int64 (ensemble, particle, length), masked where no anchor is.

    Parameters
    ----------
    logits
        Log q, (ensemble, particle, length, V).
    log_c
        Log-conditionals that each position's q was held to.
    """

    logits: Tensor
    log_c: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class APS(Sampler):
    """Fit independent tokens to the measurement, keep the most confident as anchors, and go on with the rest.

    Parameters
    ----------
    steps
        T.
    inner_steps
        Steps of Adam in each.
    lr
        Step of the logits, positive.
    kl
        k, the weight of KL(q || c), not negative: 1 is Bayes' rule, 0 the published algorithm.
    estimator
        "hard": the code nearest to the mean is decoded; "soft": the mean; "entropy": between, by a token's entropy.
    sticky
        Whether anchors stay.
    schedule
        "cosine", few anchors at first, or "linear".
    temperature
        Of the choice of anchors, not negative: so much Gumbel noise is added to their log q.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 15
    inner_steps: int = 20
    lr: float = 0.3
    kl: float = 1.0
    estimator: Estimator = "hard"
    sticky: bool = True
    schedule: Literal["cosine", "linear"] = "cosine"
    temperature: float = 0.0

    citation: ClassVar[str] = (
        "@article{rout2025aps, title={Test-Time Anchoring for Discrete Diffusion Posterior Sampling}, "
        "author={Rout, Litu and Lugmayr, Andreas and Jafarian, Yasamin and Varadharajan, Srivatsan and Caramanis, "
        "Constantine and Shakkottai, Sanjay and Kemelmacher-Shlizerman, Ira}, journal={arXiv:2510.02291}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_inner(self.inner_steps, self.lr, self.kl)
        if self.estimator not in ("hard", "soft", "entropy"):
            raise InputError(f"estimator is 'hard', 'soft' or 'entropy', got {self.estimator!r}.")
        if self.schedule not in ("cosine", "linear"):
            raise InputError(f"schedule is 'cosine' or 'linear', got {self.schedule!r}.")
        if not self.temperature >= 0.0:
            raise InputError(f"temperature is not negative, got {self.temperature}.")

    @property
    def exact(self) -> bool:
        """In no limit."""
        return False

    def requires(self) -> frozenset[str]:
        """Return a masked prior and a gradient with respect to vectors."""
        return frozenset({"masked", "embedding_gradient"})

    def cost(self) -> Cost:
        """One pass a step."""
        return Cost(self.steps)

    def init(self, posterior: Posterior, ensembles: int, n: int, *, noise: Noise) -> AnchoredTokens:  # noqa: ARG002 the contract's
        """Every token masked."""
        shape = (ensembles, n, *posterior.shape)
        z = torch.full(shape, posterior.mask_token, dtype=torch.int64, device=posterior.device)
        blank = torch.zeros(*shape, posterior.vocabulary_size, dtype=posterior.dtype, device=posterior.device)
        return AnchoredTokens(z=z, logits=blank, log_c=blank)

    def done(self, state: AnchoredTokens) -> bool:
        """All steps made."""
        return state.step >= self.steps

    def progress(self, state: AnchoredTokens) -> float:
        """Share of the steps made."""
        return state.step / self.steps

    def step(self, posterior: Posterior, state: AnchoredTokens, *, noise: Noise) -> tuple[AnchoredTokens, Info]:
        """Fit, draw, and keep the anchors."""
        e, n, length = state.z.shape
        masked = state.z == posterior.mask_token
        c = posterior.log_probs(state.z).to(posterior.dtype)
        log_c = torch.where(masked[..., None], c, state.log_c)
        start = torch.where(masked[..., None], c, state.logits)
        free = masked if self.sticky else torch.ones_like(masked)
        fit = Fit(steps=self.inner_steps, lr=self.lr, kl=self.kl)
        logits = fit.run(posterior, start, log_c, state.z, free, estimate(posterior.codebook, self.estimator))
        u = noise.uniform(noise.slots, (2, length)).reshape(e, n, 2, length)
        z = torch.where(free, categorical(logits.double(), u[:, :, 0]), state.z)
        confidence = logits.gather(3, z[..., None])[..., 0].double()
        if self.temperature > 0.0:
            confidence = confidence - self.temperature * torch.log(-torch.log(u[:, :, 1].clamp(1e-12, 1.0 - 1e-12)))
        confidence = torch.where(free, confidence, torch.inf)
        number = kept(self.schedule, state.step, self.steps, length)
        rank = (-confidence).argsort(-1).argsort(-1)
        z = torch.where(rank < number, z, posterior.mask_token)
        new = AnchoredTokens(z=z, logits=logits, log_c=log_c, step=state.step + 1)
        last = self.done(new)
        return new, Info(
            sigma=1.0 - new.step / self.steps, misfit=final_misfit(posterior, z, noise.shard) if last else None
        )

    def finish(self, posterior: Posterior, state: AnchoredTokens, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the anchors, now all tokens."""
        return Draws(z=state.z)
