"""AnchoredSMC: one step against plain sums, weights without bias, and the enumerated posteriors."""

import math

import pytest
import torch
from test_aps import F64, Bent, C, L, V, chain, dense
from torch import Tensor

from invdiff.diagnostics.discrete import measure_tokens, named
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.likelihoods import BinarySymmetric
from invdiff.noise import Noise
from invdiff.operators import Parity, Reshape
from invdiff.posterior import Posterior
from invdiff.priors import MarkovChainPrior
from invdiff.problem import Problem
from invdiff.samplers import AnchoredSMC, PlugIn


@pytest.mark.parametrize(("order", "every"), [("confident", 1), ("random", 1), ("confident", 3)])
def test_a_step_is_that_of_plain_sums(order, every):
    prior, problem, n = chain(), dense(), 25
    p = Posterior(problem, prior, dtype=F64)
    sampler = AnchoredSMC(inner_steps=3, order=order, twist=PlugIn(), threshold=0.0, defence=0.2, every=every)
    state = sampler.init(p, 1, n, noise=Noise([3], n, dtype=F64))

    def twist(z: Tensor) -> float:
        mean = prior.log_probs(z[None]).exp() @ prior.codebook
        return float(problem.likelihood.log_prob(prior.decode_embedding(mean)))

    for step in range(L):
        noise = Noise([3], n, dtype=F64).at(step + 1)
        new, _ = sampler.step(p, state, noise=noise)
        q = sampler._proposal(state.log_probs, new.tilt)[0]
        fresh = sampler._tilt(p, state.z, state.z == V, state.log_probs)
        assert torch.equal(new.tilt, fresh if step % every == 0 else state.tilt)
        for i in range(n):
            x, y = state.z[0, i], new.z[0, i]
            (where,) = (x != y).nonzero()[:, 0].tolist()
            assert x[where] == V
            if order == "confident":
                masked = [j for j in range(L) if x[j] == V]
                assert where == max(masked, key=lambda j, i=i: float(q[i, j].max()))
            c = prior.log_probs(x[None])[0, where, y[where]]
            expected = c - q[i, where, y[where]] + twist(y) - twist(x)
            got = new.log_weights[0, i] - state.log_weights[0, i]
            assert float(got) == pytest.approx(float(expected), abs=1e-9)
        torch.testing.assert_close(q.exp().sum(-1), torch.ones(n, L, dtype=F64))
        assert bool((q >= state.log_probs[0] + math.log(0.2) - 1e-9).all())  # the prior's share bounds the ratio
        state = new
    assert not bool((state.z == V).any())


@pytest.mark.parametrize("sampler", [AnchoredSMC(), AnchoredSMC(estimator="hard", inner_steps=4, every=3)])
@pytest.mark.parametrize("name", ["chain-8", "parity-12"])
def test_draws_and_evidence_are_exact_as_particles_grow(name, sampler):
    case, seeds, n = named(name), 12, 1000
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(sampler, n, chains=seeds, seed=4)
    figures = measure_tokens(solution, case)
    mean, se = figures.ratio
    assert abs(mean - 1.0) < 4.0 * se
    assert se < 0.1
    # Twice the floor of as many draws as the least effective sample size leaves.
    ess = min(info.ess for info in solution.trace if info.ess is not None)
    assert float(figures.marginal_tv.mean()) < 2.0 * case.floor(int(ess * n))


def test_evidence_has_no_bias_with_few_particles():
    case, chains = named("chain-8"), 600
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(
        AnchoredSMC(inner_steps=3, threshold=1.0), 8, chains=chains, seed=5
    )
    mean, se = measure_tokens(solution, case).ratio
    assert abs(mean - 1.0) < 4.0 * se
    assert se < 0.1


def test_cost_is_what_is_counted():
    p = Posterior(dense(), chain(), dtype=F64)
    sampler = AnchoredSMC(inner_steps=5, every=3)
    solution = p.sample(sampler, 6)
    assert solution.about["evaluations_per_draw"] == sampler.cost_on(p).forward == L
    assert p.evaluations.likelihood_grad == 6 * 2 * 5  # before the first and the fourth of four tokens
    # Fits, a twist at the start and after all tokens but the last, the complete sequences' likelihood, and the misfit.
    assert p.evaluations.likelihood == 6 * (2 * 5 + L + 2)
    with pytest.raises(CapabilityError, match="cost_on"):
        sampler.cost()


def test_backward_passes_of_a_twist_through_a_decoder_are_counted():
    detokeniser, n, M = Bent((L, C), (L, C)), 6, 5
    p = Posterior(dense(), chain(detokeniser), dtype=F64, micro_batch=4)
    rows, decode = [], p._from_vectors

    def hooked(e: Tensor) -> Tensor:
        x = decode(e)
        if x.requires_grad:
            x.register_hook(lambda g: rows.append(len(g)))
        return x

    p._from_vectors = hooked
    p.sample(AnchoredSMC(inner_steps=M), n)
    # Fits, and two measured values for each of L twists by moments.
    assert sum(rows) == p.evaluations.likelihood_grad == n * (L * M + L * 2)
    plain = Posterior(dense(), chain(detokeniser), dtype=F64)
    plain.sample(AnchoredSMC(inner_steps=M, twist=PlugIn()), n)
    assert plain.evaluations.likelihood_grad == n * L * M


def test_settings_out_of_range_and_likelihoods_that_nothing_meets():
    for wrong in (
        {"inner_steps": 0}, {"every": 0}, {"defence": 0.0}, {"defence": 1.0},
        {"threshold": 2.0}, {"lr": -1.0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            AnchoredSMC(**wrong)
    # Ones alone, of which the prior has none, by a channel that never errs but by 1e-300.
    prior = MarkovChainPrior(torch.tensor([1.0, 0.0]), torch.eye(2), 3, codebook=torch.tensor([[0.0], [1.0]]))
    checks = Parity(torch.eye(3)) @ Reshape((3, 1), (3,))
    problem = Problem(BinarySymmetric(checks, torch.ones(1, 3, dtype=F64), 0.1))
    solution = Posterior(problem, prior, dtype=F64).sample(AnchoredSMC(inner_steps=2), 10)
    assert int(solution.tokens.sum()) == 0
    assert solution.log_evidence == pytest.approx(3 * math.log(0.1), abs=1e-6)

    class Never(BinarySymmetric):
        def log_prob(self, x: Tensor) -> Tensor:
            return torch.full((len(x),), -torch.inf, dtype=x.dtype)

    with pytest.raises(SamplingError):
        Posterior(Problem(Never(checks, torch.ones(1, 3, dtype=F64), 0.1)), prior, dtype=F64).sample(AnchoredSMC(), 4)
