r"""Fine-tune a masked prior on a likelihood or a reward, so that it proposes what the posterior would.

The conditionals of the prior are tilted by a network (`priors.amortised`) that minimises, over paths in which one token
after the other is unmasked in random order,

    F = E[ -log p(y | x) + k sum_steps KL(p_theta(. | x_t) || c(. | x_t)) ],

DRAKES (Wang et al. 2024, arXiv 2410.13643) with the reward log p(y | x). For k = 1 the sum is the divergence of the law
of paths from the prior's own, so that F >= -log p(y), with equality for the posterior's conditionals: F is a bound of
the evidence, and its distance from it is what an amortised law is wrong by. The expectation over the position that is
next is taken exactly, as the mean over the masked ones; in the paper's continuous time that is its rate term.

The gradient passes through the drawn tokens by the straight-through Gumbel-softmax (Jang et al. 2017, arXiv
1611.01144): forward the drawn token, backward the softmax of its perturbed logits. It is biased, as the paper's is: it
takes log p(y | .) to be linear between tokens, and c, which is not differentiated, not to change with them. ``score``
is the alternative without bias, the score function with the mean cost of the other paths as its baseline. Where the
likelihood of a draw is zero, straight-through sees no slope, and the score function a cost of ten nats above the worst
of the batch.

What the network makes by itself is biased, in no limit exact: weigh it by `samplers.AmortisedSMC`. Measured on
the problem `chain-8`, where -log p(y) is 6.61 nats: marginal TV of its own draws 0.11, 0.13 and 0.08 in three
trainings with the defaults (the prior's: 0.38), and F 8.8, 9.0 and 8.2. The defaults are the best of the settings of
600 steps that were tried on the same problem, judged by one other training. The score function, in 600 steps of 128
paths at half the learning rate, came to a lower F, 8.0, with draws that are worse, TV 0.30: a divergence in this
direction forgives modes that are missing. A low F alone is no proof of good draws.

Departures: the prior is tilted by a network of its own, whose start is the prior exactly, and not fine-tuned in place;
one token a step, in the law's own order, in place of parallel steps of a fixed schedule.
"""

from dataclasses import dataclass
from math import cos, isfinite, pi
from typing import Literal

import torch
from torch import Tensor, nn

from invdiff.errors import InputError
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.noise import Noise, stream_key
from invdiff.posterior import Posterior
from invdiff.priors.amortised import AmortisedPrior
from invdiff.priors.base import MaskedPrior

_STEEPEST = 1e18  # its square is still a float32, as the network's gradients are
_BEYOND = 10.0  # nats by which a sequence of likelihood zero is worse than the worst of its batch


@dataclass(frozen=True, kw_only=True)
class AmortiseSettings:
    """What a fine-tuning is made of.

    Parameters
    ----------
    steps, batch
        Steps of Adam, and paths in each, at least 2.
    learning_rate
        At the start; it falls to zero as half a cosine.
    kl
        k, not negative; 1 is Bayes' rule, and for a reward r / k is what p_theta is tilted by.
    gradient
        "straight-through" or "score".
    temperature
        Of the Gumbel-softmax, positive.
    through
        Last tokens of a path through which the likelihood's gradient passes, straight-through; all if None.
    width, depth, heads
        Of the network.
    seed
        Of weights and paths.

    Raises
    ------
    InputError
        If a setting lies out of its range.
    """

    steps: int = 600
    batch: int = 64
    learning_rate: float = 1e-2
    kl: float = 1.0
    gradient: Literal["straight-through", "score"] = "straight-through"
    temperature: float = 1.0
    through: int | None = None
    width: int = 32
    depth: int = 2
    heads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 2:
            raise InputError(f"A fine-tuning has steps, and two paths in each; got {self.steps} and {self.batch}.")
        if not self.learning_rate > 0.0 or not self.temperature > 0.0:
            raise InputError(
                f"Learning rate and temperature are positive, got {self.learning_rate} and {self.temperature}."
            )
        if not self.kl >= 0.0:
            raise InputError(f"kl is a weight, not negative; got {self.kl}.")
        if self.gradient not in ("straight-through", "score"):
            raise InputError(f"gradient is 'straight-through' or 'score', got {self.gradient!r}.")
        if self.through is not None and self.through < 1:
            raise InputError(f"The gradient passes through one token at least, got through={self.through}.")


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Paths from masks to complete sequences.

    Parameters
    ----------
    tokens
        Where they end, (n, length).
    vectors
        One-hot vectors of the tokens, with a gradient to the network's weights, (n, length, V).
    divergence
        KL of each step, with its gradient, (n, length).
    log_q
        Log-probability of each drawn token, with its gradient, (n, length).
    """

    tokens: Tensor
    vectors: Tensor
    divergence: Tensor
    log_q: Tensor


def draw_paths(
    posterior: Posterior, network: MaskedTransformer, n: int, noise: Noise, *, temperature: float, through: int
) -> Paths:
    """Draw paths under the tilted conditionals.

    Parameters
    ----------
    posterior, network
        Whose prior is tilted, and by what.
    n, noise
        How many, from a noise of one ensemble of n.
    temperature, through
        As in `AmortiseSettings`.
    """
    (length,), V, dtype = posterior.shape, posterior.vocabulary_size, network.head.weight.dtype
    u = noise.uniform(noise.slots, (length, V + 1))
    order, gumbels = u[..., V].argsort(-1), -torch.log(-torch.log(u[..., :V].clamp(1e-12, 1.0 - 1e-12)))
    tokens = torch.full((n, length), posterior.mask_token, device=posterior.device)
    x = nn.functional.one_hot(tokens, V + 1).to(dtype)
    divergence, log_qs = [], []
    for k in range(length):
        if k == length - through:
            x = x.detach()
        c = posterior.log_probs(tokens)
        log_q = torch.log_softmax(c + network.mixed(x).double(), dim=-1)
        possible = ~torch.isneginf(c)
        each = torch.where(possible, log_q.exp() * (torch.where(possible, log_q - c, 0.0)), 0.0).sum(-1)
        masked = tokens == posterior.mask_token
        divergence.append(torch.where(masked, each, 0.0).sum(1) / (length - k))
        here = order[:, k : k + 1]
        logits = log_q.gather(1, here[..., None].expand(n, 1, V))[:, 0]
        perturbed = logits + gumbels[:, k]
        drawn = perturbed.argmax(-1, keepdim=True)
        soft = torch.softmax(perturbed / temperature, dim=-1)
        hard = nn.functional.one_hot(drawn[:, 0], V).to(soft.dtype)
        straight = nn.functional.pad((hard + soft - soft.detach()).to(dtype), (0, 1))
        log_qs.append(logits.gather(1, drawn)[:, 0])
        tokens = tokens.scatter(1, here, drawn)
        now = torch.arange(length, device=x.device) == here
        x = torch.where(now[..., None], straight[:, None], x)
    return Paths(tokens=tokens, vectors=x[..., :V], divergence=torch.stack(divergence, 1), log_q=torch.stack(log_qs, 1))


def loss(posterior: Posterior, paths: Paths, settings: AmortiseSettings) -> tuple[Tensor, Tensor]:
    """F of each path (n,), without a gradient; and a scalar whose gradient estimates that of F's mean."""
    k = settings.kl
    divergence = k * paths.divergence.sum(1)
    if settings.gradient == "straight-through":
        e = paths.vectors.to(posterior.dtype) @ posterior.codebook
        value, g = posterior.embedding_log_likelihood_and_grad(e.detach())
        # No slope leads out of likelihood zero, nor where a token would gain more nats than numbers hold.
        held = (g.abs() < _STEEPEST).flatten(1).all(1)  # false of NaN
        g = torch.where((torch.isfinite(value) & held)[:, None, None], g, 0.0)
        surrogate = (divergence - (e * g).sum((1, 2))).mean()
        return divergence.detach() - value, surrogate
    value = posterior.log_likelihood(paths.tokens).double()
    least = torch.where(torch.isneginf(value), torch.inf, value).amin().nan_to_num(posinf=0.0) - _BEYOND
    step = k * paths.divergence.detach()
    # What a token brings is what comes after it: the likelihood, and the divergences of later steps.
    ahead = step.sum(1, keepdim=True) - step.cumsum(1) - torch.maximum(value, least)[:, None]
    n = len(ahead)
    baseline = (ahead.sum(0) - ahead) / (n - 1)
    surrogate = (divergence + ((ahead - baseline) * paths.log_q).sum(1)).mean()
    return divergence.detach() - value, surrogate


def amortise(posterior: Posterior, settings: AmortiseSettings | None = None) -> tuple[AmortisedPrior, Tensor]:
    """Fit the tilt of a posterior's masked prior to its measurement.

    Parameters
    ----------
    posterior
        Of one problem, under a masked prior, with a gradient with respect to vectors for straight-through.
    settings
        The defaults if None.

    Returns
    -------
        The tilted prior, its network frozen; and F of each step, nats, mean over its paths, float64 (steps,).

    Raises
    ------
    CapabilityError
        If the prior is not a masked one.
    InputError
        If the posterior holds several problems or has no gradient where one is asked for, or if the likelihood is zero
        for all paths of the first step, or the training diverges.
    """
    s = AmortiseSettings() if settings is None else settings
    V, (length,) = posterior.vocabulary_size, posterior.shape
    if posterior.problems != 1:
        raise InputError(f"A tilt is learnt for one problem, this posterior holds {posterior.problems}.")
    if s.gradient == "straight-through" and "embedding_gradient" not in posterior.capabilities:
        raise InputError("The likelihood has no gradient with respect to vectors; take gradient='score'.")
    with torch.random.fork_rng(devices=[]):  # layers initialise from the global generator; leave it as it was
        torch.manual_seed(s.seed)
        network = MaskedTransformer([length], V, width=s.width, depth=s.depth, heads=s.heads).to(posterior.device)
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)
    optimiser = torch.optim.Adam(network.parameters(), lr=s.learning_rate)
    noise = Noise([stream_key(s.seed, "amortise")], s.batch, device=posterior.device, dtype=torch.float64)
    found = []
    for step in range(s.steps):
        paths = draw_paths(
            posterior,
            network,
            s.batch,
            noise.at(step),
            temperature=s.temperature,
            through=length if s.through is None else min(s.through, length),
        )
        F, surrogate = loss(posterior, paths, s)
        if step == 0 and bool(torch.isposinf(F).all()):
            raise InputError(
                f"The likelihood is zero for all {s.batch} draws of the prior: there is nothing to learn from. Take a "
                "larger batch, or check that the measurement fits the prior."
            )
        for group in optimiser.param_groups:
            group["lr"] = 0.5 * s.learning_rate * (1.0 + cos(pi * step / s.steps))
        optimiser.zero_grad()
        torch.autograd.backward(surrogate)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        found.append(F.double().mean())
    history = torch.stack(found)
    if bool(torch.isnan(history).any()) or not isfinite(sum(float(p.detach().sum()) for p in network.parameters())):
        raise InputError("The fine-tuning has diverged: F or a weight is not finite. Lower the learning rate.")
    assert isinstance(posterior.prior, MaskedPrior)
    return AmortisedPrior(posterior.prior, network.eval().requires_grad_(requires_grad=False)), history
