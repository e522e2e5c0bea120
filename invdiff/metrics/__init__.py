"""Scores of draws against a truth: a leaf that knows tensors only."""

from jaxtyping import Float
from torch import Tensor

from invdiff.metrics.distribution import sliced_wasserstein
from invdiff.metrics.ensemble import (
    check,
    coverage,
    crps,
    energy_score,
    interval,
    quantile,
    rank_histogram,
    spread_skill,
)
from invdiff.metrics.point import psnr, ssim

__all__ = [
    "coverage",
    "crps",
    "energy_score",
    "interval",
    "psnr",
    "quantile",
    "rank_histogram",
    "score",
    "sliced_wasserstein",
    "spread_skill",
    "ssim",
]


def score(draws: Float[Tensor, " n *event"], truth: Float[Tensor, "*event"]) -> dict[str, float]:
    """Collect the scores of draws (n, *event) against a truth (*event).

    Returns
    -------
        ``psnr_mean`` (of the mean), ``psnr_draw`` (mean over single draws), ``ssim_mean`` (of the mean; only for three
        axes, as pictures (c, h, w) have, with sides of at least 11), ``crps``, ``coverage_90`` (NaN with fewer than 19
        draws) and ``spread_skill`` (NaN for one draw). The values' span is taken as 1.

    Raises
    ------
    ShapeError
        If there are no draws, or they are not of the truth's shape.
    """
    check(draws, truth)
    mean = draws.mean(0)
    scores = {"psnr_mean": psnr(mean, truth), "psnr_draw": sum(psnr(d, truth) for d in draws) / len(draws)}
    if truth.ndim == 3 and min(truth.shape[1:]) >= 11:
        scores["ssim_mean"] = ssim(mean, truth)
    return scores | {
        "crps": crps(draws, truth),
        "coverage_90": coverage(draws, truth) if len(draws) >= 19 else float("nan"),
        "spread_skill": spread_skill(draws, truth),
    }
