r"""A problem that is not linear and whose posterior is known by quadrature: a point in the plane, its radius measured.

    x ~ a mixture of Gaussians in the plane,   y = |x| + noise_std * eps

The posterior is a ring of radius about y, along which the prior leaves arcs of different weight. All that is compared
is an integral over a fine grid: the evidence, the law of the angle, mean and standard deviation of the radius.
"""

from dataclasses import dataclass
from math import log, pi

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.diagnostics.mixture_measures import total_variation
from invdiff.errors import InputError
from invdiff.likelihoods import Gaussian
from invdiff.operators import Operator
from invdiff.priors.mixture import MixturePrior
from invdiff.problem import Problem

SECTORS = 36
"""Equal parts of the circle, by which laws of the angle are compared."""
_HALF_WIDTH, _POINTS = 4.0, 801


class Radius(Operator):
    """The distance of a point (n, 1, 2, 1) from the origin, (n, 1, 1, 1); its derivative has the norm 1."""

    def __init__(self) -> None:
        super().__init__((1, 2, 1), (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Radius."""
        radius: Tensor = torch.linalg.vector_norm(x, dim=2, keepdim=True)
        return radius


@dataclass(frozen=True, kw_only=True)
class RingProblem:
    """A measured radius, and its posterior on a grid.

    Parameters
    ----------
    prior, problem
        Prior and measurement.
    points
        Points of the grid, (cell, 2).
    weights
        Posterior probability of each cell, (cell,).
    log_evidence
        log p(y), nats.
    """

    prior: MixturePrior
    problem: Problem
    points: Float[Tensor, "cell 2"]
    weights: Float[Tensor, " cell"]
    log_evidence: float

    @property
    def angles(self) -> Float[Tensor, " sector"]:
        """Posterior probability of each sector."""
        return angles(self.points, self.weights)

    @property
    def radius(self) -> tuple[float, float]:
        """Posterior mean and standard deviation of the radius."""
        return radius(self.points, self.weights)

    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, "n 1 2 1"]:
        """Independent draws: a cell by its probability, and a point of it."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(n, 3, generator=generator, dtype=torch.float64)
        cell = torch.searchsorted(self.weights.cumsum(0), u[:, 0].contiguous()).clamp_(max=len(self.weights) - 1)
        return (self.points[cell] + (u[:, 1:] - 0.5) * _spacing()).reshape(n, 1, 2, 1)

    def angle_error(self, z: Float[Tensor, "n 1 2 1"], log_weights: Float[Tensor, " n"] | None = None) -> float:
        """Total variation between the draws' and the exact law of the angle, in sectors."""
        return total_variation(angles(z.flatten(1).double(), _normalised(z, log_weights)), self.angles)

    def radius_of(
        self, z: Float[Tensor, "n 1 2 1"], log_weights: Float[Tensor, " n"] | None = None
    ) -> tuple[float, float]:
        """Mean and standard deviation of the draws' radius."""
        return radius(z.flatten(1).double(), _normalised(z, log_weights))


def ring_prior() -> MixturePrior:
    """Three modes in the plane, of different shapes and weights, about the origin."""
    means = torch.tensor([[1.8, 1.2], [-2.2, 0.6], [0.3, -1.6]], dtype=torch.float64)
    covariances = torch.tensor(
        [[[0.5, 0.2], [0.2, 0.4]], [[0.3, 0.0], [0.0, 0.9]], [[1.2, 0.0], [0.0, 0.3]]], dtype=torch.float64
    )
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    return MixturePrior(weights, means.reshape(3, 1, 2, 1), covariances, sigma_min=0.01, sigma_max=50.0)


def ring_problem(y: float = 2.5, noise_std: float = 0.2) -> RingProblem:
    """Return a radius y measured with that noise: a ring that meets all three modes.

    Raises
    ------
    InputError
        If the grid does not hold the ring, or is too coarse for it.
    """
    if not 0.0 <= y <= _HALF_WIDTH - 5.0 * noise_std or noise_std < 5.0 * _spacing():
        raise InputError(
            f"The grid of spacing {_spacing():g} holds radii from 0 to {_HALF_WIDTH:g} less five deviations, and noise "
            f"of at least {5.0 * _spacing():g}; got y = {y} and noise_std = {noise_std}."
        )
    prior = ring_prior()
    measurement = torch.full((1, 1, 1, 1), y, dtype=torch.float64)
    problem = Problem(Gaussian(Radius(), measurement, noise_std), name="ring")
    axis = torch.linspace(-_HALF_WIDTH, _HALF_WIDTH, _POINTS, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    misfit = (points.norm(dim=1) - y) / noise_std
    log_density = prior.log_prob(points.reshape(-1, 1, 2, 1)) - 0.5 * misfit**2 - log(noise_std) - 0.5 * log(2.0 * pi)
    return RingProblem(
        prior=prior,
        problem=problem,
        points=points,
        weights=torch.softmax(log_density, 0),
        log_evidence=float(torch.logsumexp(log_density, 0)) + 2.0 * log(_spacing()),
    )


def angles(points: Float[Tensor, "n 2"], weights: Float[Tensor, " n"]) -> Float[Tensor, " sector"]:
    """Mass of weighted points by sector."""
    share = torch.atan2(points[:, 1], points[:, 0]) / (2.0 * pi) + 0.5
    sector = (share * SECTORS).long().clamp_(0, SECTORS - 1)
    return torch.zeros(SECTORS, dtype=torch.float64).scatter_add_(0, sector, weights)


def radius(points: Float[Tensor, "n 2"], weights: Float[Tensor, " n"]) -> tuple[float, float]:
    """Mean and standard deviation of the radius of weighted points."""
    r = points.norm(dim=1)
    mean = weights @ r
    return float(mean), float((weights @ (r - mean) ** 2).sqrt())


def _normalised(z: Tensor, log_weights: Tensor | None) -> Tensor:
    if log_weights is None:
        return torch.full((len(z),), 1.0 / len(z), dtype=torch.float64)
    return torch.softmax(log_weights.double(), 0)


def _spacing() -> float:
    return 2.0 * _HALF_WIDTH / (_POINTS - 1)
