"""Scores of an ensemble of draws against a truth: draws lead, (n, *event); the truth is (*event)."""

from math import sqrt

import torch
from torch import Tensor

from invdiff.errors import InputError


def quantile(draws: Tensor, q: float) -> Tensor:
    """Quantile by Weibull plotting positions k / (n + 1) (Hyndman & Fan 1996, type 6).

    For n exact draws the interval between the quantiles p and 1 - p holds a new one with probability 1 - 2 p exactly,
    which the more usual positions do not achieve.

    Parameters
    ----------
    draws
        Draws (n, *event).
    q
        In [1 / (n + 1), n / (n + 1)].

    Raises
    ------
    InputError
        If q lies beyond the outermost draws' positions.
    """
    n = len(draws)
    position = q * (n + 1)
    if not 1.0 - 1e-9 <= position <= n + 1e-9:
        tail = min(q, 1.0 - q)
        need = f"at least {round(1.0 / tail) - 1} draws" if 0.0 < tail else "0 < q < 1"
        raise InputError(f"The quantile {q:g} is beyond what {n} draws tell; it needs {need}.")
    ordered = draws.sort(dim=0).values
    k = min(max(int(position), 1), n)
    upper = ordered[min(k, n - 1)]
    return ordered[k - 1] + min(max(position - k, 0.0), 1.0) * (upper - ordered[k - 1])


def interval(draws: Tensor, level: float = 0.9) -> tuple[Tensor, Tensor]:
    """Central interval of each value; a level of 0.9 needs at least 19 draws."""
    tail = 0.5 * (1.0 - level)
    return quantile(draws, tail), quantile(draws, 1.0 - tail)


def coverage(draws: Tensor, truth: Tensor, level: float = 0.9) -> float:
    """Share of the truth's values inside the draws' central interval; ``level`` where draws and truth have one law."""
    low, high = interval(draws, level)
    return float(((truth >= low) & (truth <= high)).double().mean())


def crps(draws: Tensor, truth: Tensor, *, fair: bool = True) -> float:
    """Continuous ranked probability score, mean over values, in their units; smaller is better.

    ``mean_i |x_i - t| - mean_ij |x_i - x_j| / 2``, the double mean over pairs i != j if fair (unbiased in the number of draws,
    Ferro 2014), over all pairs otherwise; by sorting, in O(n log n).
    """
    n = len(draws)
    skill = (draws - truth).abs().mean(0)
    if n == 1:
        return float(skill.mean())
    rank = torch.arange(1, n + 1, dtype=draws.dtype, device=draws.device).reshape(-1, *[1] * truth.ndim)
    pairs = ((2.0 * rank - n - 1.0) * draws.sort(dim=0).values).sum(0) * 2.0  # sum over i, j of |x_i - x_j|
    return float((skill - 0.5 * pairs / (n * (n - 1 if fair else n))).mean())


def spread_skill(draws: Tensor, truth: Tensor) -> float:
    """Ratio of the ensemble's spread to the error of its mean, root mean square, 1 where calibrated (Fortin et al. 2014).

    With the factor sqrt((n + 1) / n) for the error of a mean of n draws; NaN for one draw.
    """
    n = len(draws)
    if n < 2:
        return float("nan")
    error = (draws.mean(0) - truth).square().mean().sqrt()
    return float(sqrt((n + 1) / n) * draws.var(0).mean().sqrt() / error)


def energy_score(draws: Tensor, truth: Tensor) -> float:
    """Energy score (Gneiting & Raftery 2007), the CRPS of whole events, in the values' units; unbiased in the number of draws."""
    x, n = draws.flatten(1), len(draws)
    skill = (x - truth.flatten()).norm(dim=1).mean()
    spread = torch.cdist(x, x).sum() / (n * (n - 1)) if n > 1 else 0.0
    return float(skill - 0.5 * spread)


def rank_histogram(draws: Tensor, truth: Tensor, *, seed: int = 0) -> Tensor:
    """Counts (n + 1,) of the truth's rank among the draws, value by value; ties at random. Flat where calibrated."""
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    u = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(draws.device)
    ranks = below + (u * (equal + 1)).long()
    return torch.bincount(ranks.flatten(), minlength=len(draws) + 1)
