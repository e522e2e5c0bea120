r"""How far draws are from a law with several modes: sliced distance, shares of modes, agreement of chains.

The sliced 2-Wasserstein distance takes fixed unit directions theta_p and the quantile functions Q_p of the exact law
along them. A mixture's are known, each projection being a mixture on the line, so that the reference has no noise of
its own; with q_p the draws' weighted quantile function,

    W2^2 = mean over p of  integral_0^1 (q_p(u) - Q_p(u))^2 du,     by the midpoint rule at 1000 levels u

N exact draws are not at 0 but at a floor. On one mode, or modes that touch, it falls as N^{-1/2}. Where modes are
parted by Delta, a share that is wrong by delta has to carry a mass delta over Delta, so that W2 is about sqrt(delta)
Delta; delta falls as N^{-1/2}, and the floor as N^{-1/4}. Distances are to be read beside the floor of exact draws of
the same number.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.priors.mixture import MixturePrior

DIRECTIONS, LEVELS = 64, 1000
_BISECTIONS = 32


@dataclass(frozen=True)
class Sliced:
    """Quantiles of an exact law along fixed directions, float64.

    Parameters
    ----------
    directions
        Unit vectors in columns, (d, p).
    quantiles
        At the levels (i + 1/2) / levels, (levels, p), in the values' units.
    """

    directions: Float[Tensor, "d p"]
    quantiles: Float[Tensor, "levels p"]

    @classmethod
    def of_mixture(cls, law: MixturePrior) -> Self:
        """Return those of a mixture, by bisection of its distribution function along each direction."""
        directions = _directions(law.size)
        means = law.means.flatten(1) @ directions
        stds = torch.einsum("dp,kde,ep->kp", directions, law.covariances, directions).sqrt()
        levels = _levels()[:, None]
        low = (means - 9.0 * stds).amin(0).expand(LEVELS, -1)
        high = (means + 9.0 * stds).amax(0).expand(LEVELS, -1)
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            mass = torch.special.ndtr((middle[:, None] - means) / stds)
            below = torch.einsum("k,lkp->lp", law.weights, mass) < levels
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return cls(directions, 0.5 * (low + high))

    @classmethod
    def of_draws(cls, draws: Float[Tensor, " n *event"]) -> Self:
        """Return those of a large set of exact draws."""
        x = draws.flatten(1).double()
        directions = _directions(x.shape[1])
        return cls(directions, _quantiles(x @ directions, None))

    def distance(self, z: Float[Tensor, " n *event"], log_weights: Float[Tensor, " n"] | None = None) -> float:
        """Sliced distance of draws from the law; of weighted ones by their weighted quantiles.

        Raises
        ------
        ShapeError
            If the draws have another dimension than the law.
        """
        x = z.flatten(1).double()
        if x.shape[1] != len(self.directions):
            raise ShapeError(f"The law has {len(self.directions)} dimensions, these draws {x.shape[1]}.")
        found = _quantiles(x @ self.directions, log_weights)
        return float((found - self.quantiles).square().mean().sqrt())


def _directions(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(d, DIRECTIONS, generator=generator, dtype=torch.float64)
    unit: Tensor = directions / directions.norm(dim=0)
    return unit


def _levels() -> Tensor:
    return (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS


def _quantiles(projected: Tensor, log_weights: Tensor | None) -> Tensor:
    """Of each column: the first value whose cumulative weight reaches the level."""
    n, p = projected.shape
    values, order = projected.sort(dim=0)
    if log_weights is None:
        index = (_levels() * n).long()[:, None].expand(-1, p)
    else:
        cumulative = torch.softmax(log_weights.double(), 0)[order].cumsum(0)
        levels = _levels().expand(p, -1).contiguous()
        index = torch.searchsorted(cumulative.T.contiguous(), levels).clamp_(max=n - 1).T
    return values.gather(0, index)


def mode_shares(
    z: Float[Tensor, " n *event"], law: MixturePrior, log_weights: Float[Tensor, " n"] | None = None
) -> Float[Tensor, " k"]:
    """Mean responsibility of each component of the law for the draws: its weights for exact draws."""
    responsibilities = law.responsibilities(z.double())
    if log_weights is None:
        return responsibilities.mean(0)
    return torch.softmax(log_weights.double(), 0) @ responsibilities


def total_variation(shares: Float[Tensor, " k"], exact: Float[Tensor, " k"]) -> float:
    """Half the sum of absolute differences of two sets of shares, in [0, 1]."""
    return float((shares.double() - exact.double()).abs().sum()) / 2.0


def split_r_hat(chains: Float[Tensor, "chain n *event"]) -> float:
    """Split R-hat of the value where it is largest (Gelman et al. 2013, section 11.4): 1 for chains that agree.

    Raises
    ------
    ShapeError
        If the halves of the chains have fewer than two draws.
    """
    half = chains.shape[1] // 2
    if half < 2:
        raise ShapeError(f"Split R-hat needs chains of at least 4 draws, got {chains.shape[1]}.")
    x = chains.flatten(2).double()
    halves = torch.cat((x[:, :half], x[:, -half:]))
    within, between = halves.var(1).mean(0), half * halves.mean(1).var(0)
    return sqrt(float((((half - 1) * within + between) / (half * within)).max()))
