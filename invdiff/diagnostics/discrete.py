r"""How right samplers of tokens are: named problems whose posteriors are enumerated, and figures against them.

    marginal TV     mean over positions of half of sum_v |p^(x_i = v) - p(x_i = v | y)|
    likelihood      mean of log p(y | x) over the draws less its posterior mean, nats: sees what marginals do not
    log evidence    estimate less log p(y), nats, and the ratio of the two evidences, whose mean is 1 without bias

N exact draws leave a marginal TV of about sum_v sqrt(p_v (1 - p_v) / (2 pi N)), which is `floor`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.likelihoods import BinarySymmetric
from invdiff.noise import Noise, stream_key
from invdiff.operators import Downsampling, LinearOperator, Parity, Reshape, Scale
from invdiff.priors.chain import MarkovChainPrior
from invdiff.priors.enumerated import EnumeratedPosterior, token_marginals
from invdiff.priors.grid import IsingPrior
from invdiff.priors.masked import ExactMaskedPrior
from invdiff.priors.product_mixture import ProductMixturePrior
from invdiff.problem import Problem
from invdiff.solution import Solution


@dataclass(frozen=True, kw_only=True)
class DiscreteProblem:
    """A problem of tokens whose posterior is enumerated.

    Parameters
    ----------
    name
        Name in reports.
    prior, problem, exact
        Prior, measurement, and the posterior.
    """

    name: str
    prior: ExactMaskedPrior
    problem: Problem
    exact: EnumeratedPosterior

    def floor(self, draws: int) -> float:
        """Mean marginal TV of exact draws, by the normal limit of their counts."""
        p = self.exact.marginals
        return float((p * (1.0 - p) / (2.0 * pi * draws)).sqrt().sum(1).mean())


class Dense(LinearOperator):
    """A matrix on flattened inputs.

    Parameters
    ----------
    matrix
        Shape (measured, inputs).
    in_shape
        Shape of the inputs.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, in_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, (len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix."""
        return x.flatten(1) @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply its transpose."""
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self.in_shape)


def _normal(name: str, *shape: int) -> Tensor:
    noise = Noise([stream_key(0, name)], 1, dtype=torch.float64)
    return noise.normal(noise.slots, shape)[0]


def _uniform(name: str, *shape: int) -> Tensor:
    noise = Noise([stream_key(0, name)], 1)
    return noise.uniform(noise.slots, shape)[0]


def _case(name: str, prior: ExactMaskedPrior, operator: LinearOperator, noise_std: float) -> DiscreteProblem:
    truth = prior.decode(prior.sample(1, seed=1))
    problem = Problem.simulate(operator, truth, noise_std=noise_std, seed=0, name=name)
    return DiscreteProblem(name=name, prior=prior, problem=problem, exact=prior.posterior(problem.likelihood))


def chain_8() -> DiscreteProblem:
    """Markov chain of 8 tokens of 4, vectors in a plane; 5 dense linear combinations of them with noise 0.4."""
    transition = torch.softmax(1.2 * _normal("chain transition", 4, 4), 1)
    initial = torch.linalg.matrix_power(transition, 200)[0]
    corners = torch.tensor([[1.0, 0.6], [1.0, -0.6], [-1.0, 0.6], [-1.0, -0.6]], dtype=torch.float64)
    prior = MarkovChainPrior(initial, transition, 8, codebook=corners + 0.15 * _normal("chain codebook", 4, 2))
    return _case("chain-8", prior, Dense(_normal("chain matrix", 5, 16) / sqrt(8.0), (8, 2)), 0.4)


def ising_4x4() -> DiscreteProblem:
    """Ising spins on 4 x 4, coupling 0.4; means of 2 x 2 blocks with noise 0.3."""
    return _case("ising-4x4", IsingPrior((4, 4), 0.4), Downsampling((1, 4, 4), 2), 0.3)


def product_mixture(measured: str) -> DiscreteProblem:
    """Mixture of 3 product laws of 8 tokens of 3: levels, each measured with noise 0.8; or one-hot and 6 dense sums."""
    theta = torch.softmax(1.5 * _normal("mixture theta", 3, 8, 3), 2)
    levels = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64) if measured == "tokens" else None
    prior = ProductMixturePrior(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), theta, codebook=levels)
    if levels is not None:
        return _case("product-mixture-tokens", prior, Scale((8, 1)), 0.8)
    return _case("product-mixture-sums", prior, Dense(_normal("mixture matrix", 6, 24) / sqrt(8.0), (8, 3)), 0.4)


def parity(checks: int) -> DiscreteProblem:
    """12 fair bits; parities of 3, 2, 3 and 1 of them in turn, of which one in ten is flipped."""
    bits = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    prior = ProductMixturePrior.uniform(12, 2, codebook=bits, detokeniser=Reshape((12, 1), (12,)))
    name = f"parity-{checks}"
    rank = _uniform("parity members", 12, 12)[:checks].argsort(1).argsort(1)
    sizes = torch.tensor([3, 2, 3, 1]).repeat(3)[:checks]
    operator = Parity((rank < sizes[:, None]).double())
    truth = prior.decode(prior.sample(1, seed=1))
    flips = (_uniform("parity flips", 12)[:checks] < 0.1).double()
    y = (operator(truth)[0] - flips).abs()
    problem = Problem(BinarySymmetric(operator, y, 0.1), reference=truth[0], name=name)
    return DiscreteProblem(name=name, prior=prior, problem=problem, exact=prior.posterior(problem.likelihood))


PROBLEMS: dict[str, Callable[[], DiscreteProblem]] = {
    "chain-8": chain_8,
    "ising-4x4": ising_4x4,
    "product-mixture-tokens": lambda: product_mixture("tokens"),
    "product-mixture-sums": lambda: product_mixture("sums"),
    "parity-8": lambda: parity(8),
    "parity-12": lambda: parity(12),
}
"""The named problems."""


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Figures of a solution, one for each of its chains.

    Parameters
    ----------
    marginal_tv
        Marginal total variation, (chains,).
    likelihood_error
        Mean log-likelihood less its posterior mean, nats, (chains,).
    log_evidence_error
        Estimate less the exact log-evidence, nats, (chains,), or None.
    """

    marginal_tv: Tensor
    likelihood_error: Tensor
    log_evidence_error: Tensor | None

    @property
    def ratio(self) -> tuple[float, float] | None:
        """Mean over chains of the evidence over the exact one, and its standard error; None without an estimate."""
        if self.log_evidence_error is None:
            return None
        ratios = self.log_evidence_error.exp()
        return float(ratios.mean()), float(ratios.std() / len(ratios) ** 0.5)


def marginal_tv(tokens: Tensor, exact: EnumeratedPosterior, log_weights: Tensor | None = None) -> float:
    """Marginal total variation of sequences (n, length), weighted or not, from the posterior."""
    found = token_marginals(tokens, _weights(tokens, log_weights), exact.vocabulary_size)
    return float(0.5 * (found - exact.marginals).abs().sum(1).mean())


def _weights(tokens: Tensor, log_weights: Tensor | None) -> Tensor:
    n = len(tokens)
    equal = torch.full((n,), 1.0 / n, dtype=torch.float64)
    return equal if log_weights is None else torch.softmax(log_weights.double(), 0)


def measure_tokens(solution: Solution, case: DiscreteProblem) -> TokenFigures:
    """Compare every chain of a solution with the exact posterior, weighted where it has weights.

    Raises
    ------
    InputError
        If the solution is not one of tokens.
    """
    if solution.tokens is None:
        raise InputError("Only solutions under masked priors have tokens.")
    weighted = solution.log_weights is not None and solution.particle_tokens is not None
    tokens = solution.particle_tokens if weighted else solution.tokens
    assert tokens is not None
    weights = solution.log_weights if weighted else [None] * len(tokens)
    assert weights is not None

    def log_likelihood(x: Tensor) -> Tensor:
        return case.problem.likelihood.log_prob(case.prior.decode(x)).double()

    p = case.exact.log_probs.exp()
    alive = p > 0.0
    mean = float(p[alive] @ log_likelihood(case.exact.states[alive]))
    tvs = [marginal_tv(z, case.exact, w) for z, w in zip(tokens, weights, strict=True)]
    means = [float(_weights(z, w) @ log_likelihood(z)) - mean for z, w in zip(tokens, weights, strict=True)]
    z = solution.chain_log_evidence
    return TokenFigures(
        marginal_tv=torch.tensor(tvs, dtype=torch.float64),
        likelihood_error=torch.tensor(means, dtype=torch.float64),
        log_evidence_error=None if z is None else z.double() - case.exact.log_evidence,
    )
