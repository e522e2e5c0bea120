"""Crank-Nicolson moves in the prior's noise: their law against quadrature and closed forms, without any gradient."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, samplers
from invdiff.diagnostics.exactness import measure_solution, plane_problem
from invdiff.errors import InputError, SamplingError
from invdiff.integrators import Ancestral, Euler
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers import PCN
from invdiff.samplers.particles import conditional_ess

F64 = torch.float64
NOISE_STD = 0.1


class Radius(Operator):
    """Distance from the origin, worked out where autograd does not see it."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.hypot(*np.asarray(x.detach().double()).T)[:, None]).to(x)


def plane() -> GaussianPrior:
    return GaussianPrior(
        torch.tensor([0.3, 0.0], dtype=F64),
        torch.tensor([[1.0, 0.4], [0.4, 0.6]], dtype=F64),
        sigma_min=1e-3,
        sigma_max=50.0,
    )


def ring(radius: float = 1.5) -> Problem:
    return Problem(likelihoods.Gaussian(Radius(), torch.tensor([[radius]], dtype=F64), NOISE_STD))


def quadrature(problem: Problem) -> tuple[Tensor, Tensor, float]:
    """Points of a fine grid, their posterior masses and the log evidence."""
    line = torch.linspace(-4.0, 4.0, 801, dtype=F64)
    x = torch.cartesian_prod(line, line)
    prior = plane()
    law = torch.distributions.MultivariateNormal(prior.mean.flatten(), prior.covariance)
    log_joint = law.log_prob(x) + problem.likelihood.log_prob(x)
    evidence = torch.logsumexp(log_joint, 0)
    return x, torch.exp(log_joint - evidence), float(evidence) + 2.0 * math.log(8.0 / 800)


def test_a_ring_without_gradients_against_quadrature():
    """Second moments and evidence within four standard errors of 8 ensembles of 1024."""
    problem = ring()
    solution = invdiff.solve(problem, plane(), PCN(steps=8, moves=10, prior_steps=20), draws=1024, chains=8, dtype=F64)
    x, mass, evidence = quadrature(problem)
    z, w = solution.draws.reshape(8, 1024, 2), torch.softmax(solution.log_weights.reshape(8, 1024), -1)
    for i, j in ((0, 0), (1, 1), (0, 1)):

        def function(x: Tensor, i: int = i, j: int = j) -> Tensor:
            return x[..., i] * x[..., j] + x[..., i]

        exact = (mass * function(x)).sum()
        means = (w * function(z)).sum(-1)
        assert abs(float(means.mean() - exact)) < 4.0 * float(means.std()) / math.sqrt(8) + 0.01
        # The walk goes round: means of ensembles differ as those of independent draws would, within a factor.
        spread = math.sqrt(float((mass * (function(x) - exact) ** 2).sum()) / 1024)
        assert float(means.std()) < 3.0 * spread
    assert abs(solution.log_evidence - evidence) < max(0.05, 4.0 * solution.log_evidence_se)


def test_a_gaussian_posterior_with_its_evidence():
    case = plane_problem()
    solution = invdiff.solve(case.problem, case.prior, PCN(prior_steps=40), draws=2000, chains=2, dtype=F64)
    found = measure_solution(solution, case)
    assert found.mean_error < 3.0
    assert 0.9 < found.variance_ratio < 1.1
    assert abs(found.log_evidence_error) < 0.1


def test_the_flow_alone_gives_the_prior_and_its_moves_keep_it():
    """With a likelihood of nothing, all is accepted and the width grows to one."""
    flat = likelihoods.Objective(lambda x: 0.0 * x[:, 0], 1.0, (2,))
    sampler, prior = PCN(steps=4, moves=3, prior_steps=60), plane()
    posterior = Posterior(Problem(flat), prior, dtype=F64)
    noise = Noise([1], 4000, dtype=F64)
    state = sampler.init(posterior, 1, 4000, noise=noise.at(0))
    for k in range(4):
        state, info = sampler.step(posterior, state, noise=noise.at(k + 1))
        covariance = torch.cov(state.z[0].mT)
        torch.testing.assert_close(covariance, prior.covariance, rtol=0.0, atol=5.0 * 1.4 / math.sqrt(4000))
        assert info.ess == pytest.approx(1.0)
    assert float(state.width) == 1.0
    assert float(state.share) == 1.0
    assert float(state.evidence) == pytest.approx(0.0, abs=1e-12)


def test_shares_keep_the_conditional_sample_size_and_reach_one():
    sampler = PCN(steps=12, moves=1, prior_steps=5)
    posterior = Posterior([ring(), ring(2.5)], plane(), dtype=F64)
    noise = Noise([1, 2], 300, dtype=F64)
    state = sampler.init(posterior, 2, 300, noise=noise.at(0))
    shares = [state.share]
    for k in range(12):
        left = 12 - k
        due = shares[-1] ** ((left - 1) / left) if k else torch.zeros(2, dtype=F64)
        weights, value = state.log_weights, state.log_likelihood
        state, _ = sampler.step(posterior, state, noise=noise.at(k + 1))
        stands = conditional_ess(weights, (state.share - shares[-1])[:, None] * value)
        for e in range(2):
            chosen = float(state.share[e])
            if chosen < 1.0 and chosen > float(due[e]) * (1 + 1e-9):
                assert float(stands[e]) == pytest.approx(0.5, abs=1e-3)
            assert chosen > float(shares[-1][e]) or chosen == 1.0
        shares.append(state.share)
    assert torch.equal(state.share, torch.ones(2, dtype=F64))
    assert not torch.equal(shares[1][0], shares[1][1]), "each ensemble goes its own way"


def test_states_that_a_model_cannot_run_on_are_dead_and_others_decide():
    """A posterior on a half-plane: the normal, cut."""
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), sigma_min=1e-3, sigma_max=50.0)
    cut = likelihoods.Objective(lambda x: torch.where(x[:, 0] > 0.5, 0.0, torch.inf), 1.0, (2,))
    cut.differentiable = False
    solution = invdiff.solve(Problem(cut), prior, PCN(steps=3, prior_steps=30), draws=2000, dtype=F64)
    assert bool((solution.draws[:, 0] > 0.5).all())
    inside = 0.5 * math.erfc(0.5 / math.sqrt(2.0))
    mean = math.exp(-0.125) / math.sqrt(2.0 * math.pi) / inside
    assert float(solution.draws[:, 0].mean()) == pytest.approx(mean, abs=0.06)
    assert solution.log_evidence == pytest.approx(math.log(inside), abs=0.15)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda x: torch.full_like(x[:, 0], torch.inf), "are dead"),
        (lambda x: torch.where(x[:, 0] > 0.0, torch.nan, 1.0), "NaN or plus infinity"),
        (lambda x: torch.full_like(x[:, 0], -torch.inf), "NaN or plus infinity"),
    ],
)
def test_what_cannot_be_sampled_is_an_error(objective, message):
    problem = Problem(likelihoods.Objective(objective, 1.0, (2,)))
    with pytest.raises(SamplingError, match=message):
        invdiff.solve(problem, plane(), PCN(steps=2, moves=1, prior_steps=2), draws=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"moves": 0}, "at least one move"),
        ({"prior_steps": 0}, "at least one step"),
        ({"conditional_ess": 1.0}, "in \\(0, 1\\)"),
        ({"threshold": 1.5}, "share of the particles"),
        ({"integrator": Ancestral()}, "not Ancestral"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(InputError, match=message):
        PCN(**settings)


def test_it_is_what_solve_takes_without_a_gradient():
    solution = invdiff.solve(ring(), plane(), draws=16)
    assert solution.about["sampler"] == "PCN"
    assert "no gradient" in solution.about["sampler_reason"]


def test_the_cost_is_what_is_counted():
    for integrator in (Euler(), samplers.PCN().integrator):
        sampler = dataclasses.replace(PCN(steps=2, moves=2, prior_steps=3), integrator=integrator)
        assert invdiff.solve(ring(), plane(), sampler, draws=4).about["evaluations_per_draw"] == sampler.cost().forward
