r"""Statistics of ranks: how far from uniform, with honest bands for few truths.

A truth has L draws; its rank r among them is uniform on 0 to L if draws and truth have one law, independently from
truth to truth. With N truths the number of ranks below k is then Binomial(N, k / (L + 1)), and a sequence of ranks is
judged by its most surprising count (Säilynoja et al. 2022, arXiv 2101.10492),

    gamma = min over k of 2 min(P(B_k <= c_k), P(B_k >= c_k)),   B_k ~ Binomial(N, k / (L + 1)),

which sees a bias, too wide and too narrow draws, and errors in the tails alike. The simultaneous band of level 1 - a
holds all counts at once with probability 1 - a: the chance that a whole sequence stays inside is summed exactly over
the Markov chain of the counts, c_{k+1} - c_k ~ Binomial(N - c_k, 1 / (L + 1 - k)).

Several quantities of the same truths are dependent. If draws and truth have one law, which of the L + 1 is called the
truth does not matter: calling one of them so at random, truth by truth, gives the law of any statistic of all ranks
together, with their dependence (the resampling of Westfall & Young 1993). P-values are the observed statistic's place
among those of relabelled ranks, valid for any number of truths.
"""

from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor


def ranks_of_all(values: Float[Tensor, "members q"], generator: torch.Generator) -> Int[Tensor, "members q"]:
    """Rank of every member among the others, 0 to members - 1, for each column; ties are broken at random."""
    order = torch.rand(values.shape, generator=generator, dtype=torch.float64).argsort(0)
    shuffled = values.gather(0, order).argsort(dim=0, stable=True)
    return order.gather(0, shuffled).argsort(0)  # inverse of the sorting permutation


def central_share(ranks: Int[Tensor, "*n"], draws: int, level: float) -> Float[Tensor, "*n"]:
    """How much of a rank lies in the central interval: 1 inside, 0 outside, a share where an edge cuts it.

    Rank r stands for [r, r + 1] / (draws + 1), so that uniform ranks have the mean ``level`` exactly for every number
    of draws.
    """
    tail = 0.5 * (1.0 - level) * (draws + 1)
    r = ranks.double()
    return ((r + 1.0).clamp(max=draws + 1 - tail) - r.clamp(min=tail)).clamp(0.0, 1.0)


def _binomial(n: Tensor, k: Tensor, p: Tensor) -> Tensor:
    """Probability of k in n trials, broadcasting; 0 outside 0 <= k <= n; p in (0, 1]."""
    inside = (k >= 0) & (k <= n)
    j = torch.where(inside, k, torch.zeros_like(k))
    log_choices = torch.lgamma(n + 1.0) - torch.lgamma(j + 1.0) - torch.lgamma((n - j).clamp_min(0.0) + 1.0)
    log_p = log_choices + torch.xlogy(j, p) + torch.special.xlog1py((n - j).clamp_min(0.0), -p)
    return torch.where(inside, log_p.exp(), torch.zeros_like(log_p))


@lru_cache(maxsize=8)
def two_sided_tails(truths: int, draws: int) -> Float[Tensor, "draws counts"]:
    """2 min(P(B_k <= c), P(B_k >= c)) for k = 1 to draws and c = 0 to truths; at most 1."""
    c = torch.arange(truths + 1, dtype=torch.float64)
    p = torch.arange(1, draws + 1, dtype=torch.float64)[:, None] / (draws + 1)
    mass = _binomial(torch.full_like(c, truths), c[None], p)
    below = mass.cumsum(1)
    above = mass.flip(1).cumsum(1).flip(1)
    return (2.0 * torch.minimum(below, above)).clamp(max=1.0)


def surprise(ranks: Int[Tensor, "*b truths q"], draws: int) -> Float[Tensor, "*b q"]:
    """Gamma of each column of ranks; small where they are far from uniform."""
    truths = ranks.shape[-2]
    r = ranks.movedim(-2, -1)
    counts = torch.zeros(*r.shape[:-1], draws + 1, dtype=torch.int64)
    counts.scatter_add_(-1, r, torch.ones_like(r))
    below = counts.cumsum(-1)[..., :draws]  # number of ranks below k = 1 to draws
    tails = two_sided_tails(truths, draws)
    return tails[torch.arange(draws), below].amin(-1)


@lru_cache(maxsize=8)
def simultaneous_band(truths: int, draws: int, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """Smallest and largest admitted number of ranks below k = 1 to draws, all at once with at least that probability.

    Returns
    -------
        Two integer tensors (draws,).
    """
    alpha = 1.0 - level
    tails = two_sided_tails(truths, draws)
    # The bound of Bonferroni admits too much, the pointwise band too little: what is sought lies between.
    gammas = torch.logspace(0.0, 1.0, 129, base=draws, dtype=torch.float64) * alpha / draws
    inside = tails[None] > gammas[:, None, None]
    c = torch.arange(truths + 1, dtype=torch.float64)
    state = torch.zeros(len(gammas), truths + 1, dtype=torch.float64)
    state[:, 0] = 1.0
    for k in range(draws):
        p = torch.tensor(1.0 / (draws + 1 - k), dtype=torch.float64)
        state = (state @ _binomial((truths - c)[:, None], c[None] - c[:, None], p)) * inside[:, k]
    kept = state.sum(1) >= level
    chosen = inside[int(kept.nonzero()[-1])] if bool(kept.any()) else inside[0]
    low = chosen.int().argmax(1)
    high = truths - chosen.flip(1).int().argmax(1)
    return low, high


def proportion_interval(per_truth: Float[Tensor, " truths"], level: float = 0.95) -> tuple[float, float]:
    """Interval of Clopper and Pearson for a mean of shares in [0, 1], one a truth.

    Where a truth's share is itself a mean over dependent values, the number of trials is the effective one,
    p (1 - p) / se^2 with the standard error over truths, at least the number of truths, shrunk for the few degrees of
    freedom (Korn & Graubard 1998, Survey Methodology 24, 193-201).
    """
    from scipy.special import betaincinv, stdtrit

    n, p = len(per_truth), float(per_truth.mean())
    variance, alpha = float(per_truth.var()) / n, 0.5 * (1.0 - level)
    trials = float(n)
    if bool(((per_truth > 0.0) & (per_truth < 1.0)).any()) and variance > 0.0 and 0.0 < p < 1.0:
        shrink = (stdtrit(1e9, 1.0 - alpha) / stdtrit(n - 1, 1.0 - alpha)) ** 2
        trials = max(trials, shrink * p * (1.0 - p) / variance)
    hits = p * trials
    low = float(betaincinv(hits, trials - hits + 1.0, alpha)) if hits > 0.0 else 0.0
    high = float(betaincinv(hits + 1.0, trials - hits, 1.0 - alpha)) if hits < trials else 1.0
    return low, high


def relabelled(
    members: Int[Tensor, "truths members q"], repeats: int, generator: torch.Generator
) -> Int[Tensor, "repeats truths q"]:
    """Ranks of members called the truth at random, truth by truth."""
    truths, count, _ = members.shape
    chosen = torch.randint(count, (repeats, truths), generator=generator)
    return members[torch.arange(truths), chosen]


def p_values(statistics: Float[Tensor, "rows g"]) -> Float[Tensor, "rows g"]:
    """Share of rows with a statistic as small as each row's or smaller, itself among them."""
    ordered = statistics.T.contiguous().sort(dim=1).values
    places = torch.searchsorted(ordered, statistics.T.contiguous(), right=True)
    return (places.double() / len(statistics)).T
