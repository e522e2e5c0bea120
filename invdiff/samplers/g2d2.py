r"""G2D2 (Murata et al. 2025, arXiv 2410.14710): a star-shaped discrete diffusion guided by gradients.

In a star-shaped process the noisy sequence is drawn from the clean one afresh at every level, so that no token is kept
for having been kept before, and errors can be mended. All tokens are masked at first; step k of T

    1. asks the prior once for the conditionals c, and starts phi = f log c + (1 - f) phi_before, normalised;
    2. moves phi by ``inner_steps`` steps of RAdam on  -log p(y | decode(w E)) + kappa_k KL(q || c),  q = softmax(phi),
       where w is a Gumbel-softmax draw of phi, new in each (`samplers.variational`);
    3. draws z ~ q, and masks a random subset of it, fewer positions at every step and none after the last.

Step sizes and weights fall by decades over the steps, lr_k = lr 10^(r (1/2 - s)) and kappa_k = kl 10^(w (1/2 - s)) with
s from 0 to 1, r = ``lr_decades`` and w = ``kl_decades``.

The published code fits the norm of the residual, with weights of the divergence of 3e-4; here it is the log-likelihood
itself, for which kl = 1 is Bayes' rule. Its prior answers for known tokens too; a masked prior gives them back as they
are, so that at a position which is known the conditionals that it was drawn from stand for c.

Biased, in no limit exact: q has independent tokens, and tokens of one step are drawn independently. Measured on
problems that can be enumerated: the page on discrete problems, made by `invdiff.bench.discrete`.

Cost: T forward passes; none backward through the network. Decoder calls: T ``inner_steps``, forward and backward, and
one at the end for the misfit.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from invdiff.draws import Draws, categorical
from invdiff.driver import Cost, Info, Sampler
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.samplers.annealing import check_steps
from invdiff.samplers.aps import AnchoredTokens
from invdiff.samplers.variational import Fit, check_inner, final_misfit, gumbel, kept


@final
@dataclass(frozen=True, kw_only=True)
class G2D2(Sampler):
    """Fit independent tokens to the measurement by Gumbel-softmax gradients, and mask a random part of them anew.

    Parameters
    ----------
    steps
        T.
    inner_steps
        Steps of RAdam in each.
    lr, lr_decades
        Step of the logits half-way, and by how many powers of ten it falls over the steps.
    kl, kl_decades
        The same of the weight of KL(q || c); 1 is Bayes' rule.
    forget
        f in [0, 1], how much of the start comes from the prior and not from the fit before.
    temperature
        Of the Gumbel-softmax, positive.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 25
    inner_steps: int = 20
    lr: float = 1.0
    lr_decades: float = 1.0
    kl: float = 1.0
    kl_decades: float = 0.0
    forget: float = 0.3
    temperature: float = 1.0

    citation: ClassVar[str] = (
        "@article{murata2025g2d2, title={{G2D2}: Gradient-Guided Discrete Diffusion for Inverse Problem Solving}, "
        "author={Murata, Naoki and Lai, Chieh-Hsin and Takida, Yuhta and Uesaka, Toshimitsu and Nguyen, Bac and Ermon, "
        "Stefano and Mitsufuji, Yuki}, journal={arXiv:2410.14710}, year={2025}}"
    )

    def __post_init__(self) -> None:
        check_steps(self.steps)
        check_inner(self.inner_steps, self.lr, self.kl)
        if min(self.lr_decades, self.kl_decades) < 0.0:
            raise InputError(f"Decades are not negative, got {self.lr_decades} and {self.kl_decades}.")
        if not 0.0 <= self.forget <= 1.0:
            raise InputError(f"forget is a share, in [0, 1]; got {self.forget}.")
        if not self.temperature > 0.0:
            raise InputError(f"The temperature of a Gumbel-softmax is positive, got {self.temperature}.")

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
        """Fit, draw, and mask a random part."""
        e, n, length = state.z.shape
        masked = state.z == posterior.mask_token
        c = posterior.log_probs(state.z).to(posterior.dtype)
        log_c = torch.where(masked[..., None], c, state.log_c)
        f = self.forget if state.step else 1.0
        mixed = f * log_c + (1.0 - f) * state.logits.clamp_min(_LEAST)
        start = torch.where(torch.isneginf(log_c), log_c, mixed).log_softmax(-1)  # with f = 0, 0 times infinity
        s = 0.5 - (state.step / (self.steps - 1) if self.steps > 1 else 0.5)
        fit = Fit(
            steps=self.inner_steps,
            lr=self.lr * 10.0 ** (self.lr_decades * s),
            kl=self.kl * 10.0 ** (self.kl_decades * s),
            rectified=True,
            sharpness=1.0 / self.temperature,
        )
        everywhere = torch.ones_like(masked)
        draw = gumbel(posterior.codebook, self.temperature, noise)
        logits = fit.run(posterior, start, log_c, state.z, everywhere, draw)
        u = noise.uniform(noise.slots, (2, length)).reshape(e, n, 2, length)
        z = categorical(logits.double(), u[:, :, 0])
        rank = u[:, :, 1].argsort(-1).argsort(-1)
        z = torch.where(rank < kept("linear", state.step, self.steps, length), z, posterior.mask_token)
        new = AnchoredTokens(z=z, logits=logits, log_c=log_c, step=state.step + 1)
        return new, Info(
            sigma=1.0 - new.step / self.steps,
            misfit=final_misfit(posterior, z, noise.shard) if self.done(new) else None,
        )

    def finish(self, posterior: Posterior, state: AnchoredTokens, *, noise: Noise) -> Draws:  # noqa: ARG002 the contract's
        """Return the last draw."""
        return Draws(z=state.z)


_LEAST = -50.0
"""Log-probability that one fit may hand to the next: below it no step would bring a token back."""
