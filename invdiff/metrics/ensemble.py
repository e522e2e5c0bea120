"""Scores of an ensemble of draws against a truth: draws lead, (n, *event); the truth is (*event)."""

from math import ceil, sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import InputError, ShapeError

Draws = Float[Tensor, " n *event"]
Truth = Float[Tensor, "*event"]


def check(draws: Tensor, truth: Tensor) -> None:
    """Raise ShapeError unless there are draws, each of the truth's shape."""
    if len(draws) == 0 or draws.shape[1:] != truth.shape:
        raise ShapeError(
            "The scores need draws (n, *event) and a truth (*event), "
            f"got {tuple(draws.shape)} and {tuple(truth.shape)}."
        )


def quantile(draws: Draws, q: float) -> Truth:
    """Quantile by Weibull plotting positions k / (n + 1) (Hyndman & Fan 1996, type 6).

    For n exact draws the interval between the quantiles p and 1 - p holds a new one with probability 1 - 2 p exactly
    where p (n + 1) is an integer, which the more usual positions do not achieve.

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
        # The positions' tolerance again, so that 1 - 0.95 asks for no draw more than 0.05.
        need = f"at least {ceil(1.0 / tail - 1e-9) - 1} draws" if tail > 0.0 else "0 < q < 1"
        raise InputError(f"The quantile {q:g} is beyond what {n} draws tell; it needs {need}.")
    ordered = draws.sort(dim=0).values
    k = min(max(int(position), 1), n)
    upper = ordered[min(k, n - 1)]
    return ordered[k - 1] + min(max(position - k, 0.0), 1.0) * (upper - ordered[k - 1])


def interval(draws: Draws, level: float = 0.9) -> tuple[Truth, Truth]:
    """Central interval of each value; a level of 0.9 needs at least 19 draws.

    Raises
    ------
    InputError
        If the level is not in (0, 1), or there are too few draws for it.
    """
    if not 0.0 < level < 1.0:
        raise InputError(f"An interval's level lies between 0 and 1, e.g. 0.9 for 90 %; got {level}.")
    tail = 0.5 * (1.0 - level)
    return quantile(draws, tail), quantile(draws, 1.0 - tail)


def coverage(draws: Draws, truth: Truth, level: float = 0.9) -> float:
    """Share of the truth's values inside the draws' central interval; ``level`` where draws and truth have one law."""
    check(draws, truth)
    low, high = interval(draws, level)
    return float(((truth >= low) & (truth <= high)).double().mean())


def crps(draws: Draws, truth: Truth, *, fair: bool = True) -> float:
    """Continuous ranked probability score, mean over values, in their units; smaller is better.

    ``mean_i |x_i - t| - mean_ij |x_i - x_j| / 2``, the double mean over pairs i != j if fair (unbiased in the number of
    draws, Ferro 2014), over all pairs otherwise; by sorting, in O(n log n). Of a single draw the absolute error.
    """
    check(draws, truth)
    x, n = draws.double(), len(draws)
    skill = (x - truth).abs().mean(0)
    if n == 1:
        return float(skill.mean())
    rank = torch.arange(1, n + 1, dtype=x.dtype, device=x.device).reshape(-1, *[1] * truth.ndim)
    pairs = ((2.0 * rank - n - 1.0) * x.sort(dim=0).values).sum(0) * 2.0  # sum over i, j of |x_i - x_j|
    return float((skill - 0.5 * pairs / (n * (n - 1 if fair else n))).mean())


def spread_skill(draws: Draws, truth: Truth) -> float:
    """Ratio of the ensemble's spread to the error of its mean, 1 where calibrated (Fortin et al. 2014).

    Both root mean square over values, with the factor sqrt((n + 1) / n) for the error of a mean of n draws; NaN for
    one draw.
    """
    check(draws, truth)
    x, n = draws.double(), len(draws)
    if n < 2:
        return float("nan")
    error = (x.mean(0) - truth).square().mean().sqrt()
    return float(sqrt((n + 1) / n) * x.var(0).mean().sqrt() / error)


def energy_score(draws: Draws, truth: Truth) -> float:
    """Energy score (Gneiting & Raftery 2007), the CRPS of whole events, in the values' units.

    Unbiased in the number of draws (the fair form); of a single draw the distance.
    """
    check(draws, truth)
    x, n = draws.double().flatten(1), len(draws)
    skill = (x - truth.flatten()).norm(dim=1).mean()
    # Not by matrix products: their cancellation leaves draws near each other, and each from itself, far apart.
    pairs = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum()
    return float(skill - 0.5 * pairs / max(1, n * (n - 1)))


def rank_histogram(draws: Draws, truth: Truth, *, seed: int = 0) -> Int[Tensor, " ranks"]:
    """Count the truth's ranks 0 to n among the draws, value by value, shape (n + 1,); flat where calibrated.

    Ties are broken at random by the seed (Hamill 2001).
    """
    check(draws, truth)
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    u = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(draws.device)
    ranks = below + (u * (equal + 1)).long()
    return torch.bincount(ranks.flatten(), minlength=len(draws) + 1)
