"""Soft value-based decoding: one step against plain sums, what it draws where it can be told, and its bias."""

import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff.diagnostics.discrete import measure_tokens, named
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.likelihoods import BinarySymmetric, Gaussian
from invdiff.noise import Noise
from invdiff.operators import Dense, Parity, Reshape
from invdiff.posterior import Posterior
from invdiff.priors import MarkovChainPrior, ProductMixturePrior
from invdiff.problem import Problem
from invdiff.samplers import SVDD

F64 = torch.float64
V = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def chain(length: int) -> MarkovChainPrior:
    P = torch.softmax(normal(V, V, seed=1), 1)
    return MarkovChainPrior(P[0], P, length, codebook=normal(V, 2, seed=2))


def dense(length: int) -> Problem:
    return Problem(Gaussian(Dense(normal(2, 2 * length, seed=3), (length, 2)), normal(2, seed=4), 0.8))


@pytest.mark.parametrize("alpha", [1.0, 2.5, 0.0])
def test_a_step_is_that_of_plain_sums(alpha):
    prior, problem, n, K, length = chain(5), dense(5), 30, 4, 5
    p = Posterior(problem, prior, dtype=F64)
    sampler = SVDD(steps=3, candidates=K, alpha=alpha)
    state = sampler.init(p, 1, n, noise=Noise([3], n, dtype=F64))
    unmasked = [0]
    for step in range(3):
        new, info = sampler.step(p, state, noise=Noise([3], n, dtype=F64).at(step + 1))
        same = Noise([3], n, dtype=F64).at(step + 1)
        u, pick = same.uniform(same.slots, (2, K, length)), same.uniform(same.slots) if alpha else torch.zeros(n)
        unmasked.append([1, 3, 5][step])  # thirds of five tokens
        for i in range(n):
            x = state.z[0, i]
            c = prior.log_probs(x[None])[0].exp()
            ways, values = [], []
            for k in range(K):
                way = x.clone()
                free = [j for j in range(length) if x[j] == V]
                free.sort(key=lambda j, i=i, k=k: float(u[i, 0, k, j]))
                for j in free[: unmasked[-1] - unmasked[-2]]:
                    way[j] = int((c[j].cumsum(0) <= u[i, 1, k, j]).sum())
                mean = prior.log_probs(way[None]).exp() @ prior.codebook
                values.append(float(problem.likelihood.log_prob(prior.decode_embedding(mean))))
                ways.append(way)
            weights = torch.softmax(torch.tensor(values, dtype=F64) / alpha, 0) if alpha else None
            chosen = int(torch.tensor(values).argmax()) if alpha == 0 else int((weights.cumsum(0) <= pick[i]).sum())
            assert torch.equal(new.z[0, i], ways[chosen])
            assert float(new.value[0, i]) == pytest.approx(values[chosen], rel=1e-9)
        assert info.sigma == pytest.approx(1.0 - (step + 1) / 3)
        state = new
    torch.testing.assert_close(state.value, p.log_likelihood(state.z))


@pytest.mark.parametrize(("alpha", "power"), [(1.0, 1.0), (2.0, 0.5)])
def test_one_token_of_many_candidates_is_drawn_from_the_tempered_posterior(alpha, power):
    prior, problem, n = chain(1), dense(1), 3000
    solution = invdiff.solve(problem, prior, SVDD(candidates=150, alpha=alpha), draws=n, dtype=F64)
    exact = prior.posterior(problem.likelihood)
    prior_law = prior.log_prob(exact.states)
    law = torch.softmax(prior_law + power * problem.likelihood.log_prob(prior.decode(exact.states)), 0)
    counts = torch.bincount(exact.index(solution.tokens[0]), minlength=V).double()
    # Self-normalised candidates are off by some 1 / K; four standard errors of the draws beside it.
    assert float((counts / n - law).abs().max()) < 4.0 * math.sqrt(0.25 / n) + 1.0 / 150
    assert float((torch.softmax(prior_law, 0) - law).abs().max()) > 0.1


def test_one_candidate_is_a_draw_of_the_prior():
    prior, n = chain(3), 4000
    solution = invdiff.solve(dense(3), prior, SVDD(candidates=1), draws=n, dtype=F64)
    exact = prior.posterior(dense(3).likelihood)
    law = prior.log_prob(exact.states).exp()
    counts = torch.bincount(exact.index(solution.tokens[0]), minlength=27).double()
    chi = float(((counts - n * law) ** 2 / (n * law)).sum())
    assert abs(chi - 26) < 4.5 * math.sqrt(52 + float((1.0 / (n * law)).sum()))


def test_the_bias_is_there_and_the_best_candidate_is_worse():
    case = named("chain-8")
    figures = {
        settings: measure_tokens(
            invdiff.solve(case.problem, case.prior, SVDD(candidates=k, alpha=a), draws=1000, dtype=F64), case
        )
        for settings in ((k, a) for k, a in ((4, 1.0), (20, 1.0), (20, 0.0)))
        for k, a in (settings,)
    }
    tv = {s: float(f.marginal_tv[0]) for s, f in figures.items()}
    assert 3.0 * case.floor(1000) < tv[20, 1.0] < 0.14
    assert tv[20, 0.0] > 1.5 * tv[20, 1.0]
    # Few candidates fit badly, and the best of them too well.
    likelihood = {s: float(f.likelihood_error[0]) for s, f in figures.items()}
    assert likelihood[4, 1.0] < likelihood[20, 1.0] - 1.0
    assert likelihood[20, 0.0] > 0.3


def test_cost_in_passes_and_decoder_calls():
    for steps, taken in ((2, 2), (50, 4)):
        p = Posterior(dense(4), chain(4), dtype=F64)
        sampler = SVDD(steps=steps, candidates=3)
        about = p.sample(sampler, 6).about
        assert about["evaluations_per_draw"] == sampler.cost_on(p).forward == 1 + (taken - 1) * 3
        assert p.evaluations.likelihood == 6 * (taken * 3 + 1)
        assert p.evaluations.likelihood_grad == 0
    with pytest.raises(CapabilityError, match="cost_on"):
        SVDD().cost()


def test_a_likelihood_that_is_zero_everywhere_ends_the_run():
    levels = torch.tensor([[0.0], [1.0]])
    prior = ProductMixturePrior.uniform(3, 2, codebook=levels, detokeniser=Reshape((3, 1), (3,)))
    never = Problem(BinarySymmetric(Parity(torch.tensor([[1, 1, 0], [1, 1, 0]])), torch.tensor([0.0, 1.0]), 0.0))
    for alpha in (0.0, 1.0):
        with pytest.raises(SamplingError, match=r"8 of 8 particles have met no sequence"):
            invdiff.solve(never, prior, SVDD(candidates=3, alpha=alpha), draws=8)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "at least one step"),
        ({"candidates": 0}, "at least one candidate"),
        ({"alpha": -1.0}, "not negative"),
        ({"alpha": math.inf}, "finite"),
    ],
)
def test_impossible_settings_are_refused(settings, match, unchecked):
    with pytest.raises(InputError, match=match):
        SVDD(**settings)
