r"""Problems with several modes whose posterior is known: Gaussian mixtures, linear measurements, Gaussian noise.

The prior is `MixturePrior`, so that denoiser and score are exact and all error of a run is the sampler's. The posterior
is a mixture again: with S_k = A C_k A^T + R, the weights w_k N(y; A m_k, S_k), and each component conditioned on y.
Events have the shape (1, d, 1) and operators an SVD, for samplers that need one.
"""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.likelihoods import Gaussian
from invdiff.noise import stream_key
from invdiff.operators import LinearOperator, Separable
from invdiff.priors.exact import MixturePosterior
from invdiff.priors.mixture import MixturePrior
from invdiff.problem import Problem

_RANDOM = {2: (4, 1, 3), 4: (4, 2, 5), 8: (5, 4, 7)}
"""Components, measured values and seed of `random_mixture`, by dimension."""
_WIDE, _WIDE_MEASURED, _WIDE_MODES = 64, 16, 4


@dataclass(frozen=True, kw_only=True)
class MixtureProblem:
    """A problem whose posterior is a known Gaussian mixture.

    Parameters
    ----------
    name
        Name in reports.
    prior, problem, exact
        Mixture prior, measurement, and the posterior: ``exact.law`` has its weights, means and covariances,
        ``exact.log_evidence`` is log p(y), and ``exact.sample`` draws.
    """

    name: str
    prior: MixturePrior
    problem: Problem
    exact: MixturePosterior


def mixture_problem(
    name: str,
    prior: MixturePrior,
    operator: LinearOperator,
    noise_std: float,
    *,
    y: Tensor | None = None,
    seed: int = 0,
) -> MixtureProblem:
    r"""Measure and work out the posterior.

    Parameters
    ----------
    name
        Name in reports.
    prior
        Prior.
    operator, noise_std
        A, and the standard deviation of the noise, in A's units.
    y
        Measurement (\*out_shape). If None, that of a draw of the prior.
    seed
        Of the draw and of its noise.
    """
    if y is None:
        truth = prior.sample(1, seed=stream_key(seed, "truth"))[0]
        problem = Problem.simulate(operator, truth, noise_std=noise_std, seed=seed, name=name)
    else:
        problem = Problem(Gaussian(operator, y[None], noise_std), name=name)
    measurement = problem.likelihood.measurement[0]  # type: ignore[index]
    return MixtureProblem(
        name=name, prior=prior, problem=problem, exact=prior.posterior(operator, measurement, noise_std)
    )


def random_mixture(dimensions: int, measurement: int = 0) -> MixtureProblem:
    """Four modes (five in 8 dimensions) 2.5 wide, of which d / 2 random combinations are measured with noise 0.3.

    Parameters
    ----------
    dimensions
        d: 2, 4 or 8.
    measurement
        0 is that of a draw of the second component: it leaves two modes that touch (d = 2) or all but one. Others are
        those of draws of the prior, and leave parted modes, too, whose shares then rule every distance.

    Raises
    ------
    InputError
        If there is no mixture of these dimensions.
    """
    if dimensions not in _RANDOM:
        raise InputError(f"There are mixtures in {', '.join(map(str, _RANDOM))} dimensions; got {dimensions}.")
    d, (modes, measured, seed) = dimensions, _RANDOM[dimensions]
    draw = _Normal(seed)
    weights = torch.softmax(0.5 * draw(modes), 0)
    means, roots = 2.5 * draw(modes, d), 0.35 * draw(modes, d, d)
    covariances = roots @ roots.mT + 0.15 * torch.eye(d, dtype=torch.float64)
    A = draw(measured, d) / sqrt(d)
    truth = means[1] + torch.linalg.cholesky(covariances)[1] @ draw(d)
    y = A @ truth + 0.3 * draw(measured)
    prior = MixturePrior(weights, means.reshape(-1, 1, d, 1), covariances, sigma_min=0.02, sigma_max=40.0)
    given = y.reshape(1, measured, 1) if measurement == 0 else None
    return mixture_problem(f"mixture-{d}", prior, matrix(A), 0.3, y=given, seed=measurement)


def wide_mixture(measurement: int = 0) -> MixtureProblem:
    """Four live modes in 64 dimensions, of which 16 random combinations are measured with noise 0.3.

    The means lie about 8 apart, but only about 1 in what is measured, so that the measurement weighs the modes and
    leaves several of them. Each has a covariance of its own, with standard deviations from 0.2 to 1.

    Parameters
    ----------
    measurement
        Which; all are those of draws of the prior.
    """
    d, draw = _WIDE, _Normal(11)
    A = draw(_WIDE_MEASURED, d) / sqrt(d)
    rows = torch.linalg.svd(A, full_matrices=False).Vh
    means = draw(_WIDE_MODES, d)
    seen = means @ rows.mT @ rows
    means = 0.85 * (means - seen) + 0.25 * seen
    axes = torch.linalg.qr(draw(_WIDE_MODES, d, d)).Q
    std = torch.logspace(0.0, -0.7, d, dtype=torch.float64)
    covariances = axes @ torch.diag(std**2) @ axes.mT
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    prior = MixturePrior(weights, means.reshape(-1, 1, d, 1), covariances, sigma_min=0.005, sigma_max=60.0)
    return mixture_problem(f"mixture-{d}", prior, matrix(A), 0.3, seed=measurement)


def plane_modes(y: float = -0.9) -> MixtureProblem:
    """Three modes in the plane, of which the measurement of one value leaves two, or one where y is 2.6; noise 0.7."""
    means = torch.tensor([[-3.0, 0.0], [3.0, 1.0], [0.0, -4.0]], dtype=torch.float64)
    variances = torch.tensor([[0.3, 0.5], [0.2, 0.2], [0.6, 0.1]], dtype=torch.float64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    prior = MixturePrior(
        weights, means.reshape(3, 1, 2, 1), torch.diag_embed(variances), sigma_min=0.02, sigma_max=40.0
    )
    A = matrix(torch.tensor([[0.6, 0.8]], dtype=torch.float64))
    return mixture_problem("plane-modes", prior, A, 0.7, y=torch.full((1, 1, 1), y, dtype=torch.float64))


def parted_modes(apart: float = 6.0) -> MixtureProblem:
    """Three unit modes at the corners of a triangle, ``apart`` deviations from each other; one value measured weakly.

    At 6 hardly a draw lies between two modes, at 2.5 they overlap.
    """
    means = apart * torch.tensor([[-0.5, 0.0], [0.5, 0.0], [0.0, sqrt(0.75)]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
    prior = MixturePrior(weights, means.reshape(3, 1, 2, 1), torch.eye(2, dtype=torch.float64).expand(3, 2, 2))
    A = matrix(torch.tensor([[0.3, 0.2]], dtype=torch.float64))
    y = torch.full((1, 1, 1), 0.3, dtype=torch.float64)
    return mixture_problem(f"modes-{apart:g}-apart", prior, A, 1.0, y=y)


def matrix(A: Tensor) -> Separable:
    """Operator of a matrix (m, d) on events (1, d, 1), with an SVD."""
    return Separable(A, torch.eye(1, dtype=torch.float64), (1, A.shape[1], 1))


class _Normal:
    """Standard normals, float64, from one generator in the order of asking."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)
