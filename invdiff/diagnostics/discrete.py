r"""How right samplers of tokens are: named problems whose posteriors are enumerated, and figures against them.

    marginal TV     mean over positions of half of sum_v |p^(x_i = v) - p(x_i = v | y)|
    likelihood      mean of log p(y | x) over the draws less its posterior mean, nats: sees what marginals do not
    log evidence    estimate less log p(y), nats, and the ratio of the two evidences, whose mean is 1 without bias

N exact draws leave a marginal TV of about sum_v sqrt(p_v (1 - p_v) / (2 pi N)), which is `floor`.
"""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.priors.enumerated import EnumeratedPosterior, token_marginals
from invdiff.priors.loading import load_prior
from invdiff.priors.masked import ExactMaskedPrior
from invdiff.problem import Problem, load_problem
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


def named(name: str) -> DiscreteProblem:
    """Problem of a card that brings an exact prior, with its posterior.

    Raises
    ------
    CatalogueError
        If there is no such card, or it has no prior of its own.
    """
    problem, prior = load_problem(name), load_prior(name)
    assert isinstance(prior, ExactMaskedPrior)
    return DiscreteProblem(name=name, prior=prior, problem=problem, exact=prior.posterior(problem.likelihood))


PROBLEMS = ("chain-8", "ising-4x4", "product-mixture-tokens", "product-mixture-sums", "parity-8", "parity-12")
"""Cards of the named problems."""


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
