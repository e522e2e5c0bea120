"""Split Gibbs of tokens: one level against plain sums, its joint law, and its limit."""

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
from invdiff.priors.enumerated import every_sequence
from invdiff.problem import Problem
from invdiff.samplers import SGDD
from invdiff.samplers.sgdd import SplitTokens

F64 = torch.float64
V, LENGTH = 3, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def chain(length: int = LENGTH) -> MarkovChainPrior:
    P = torch.softmax(normal(V, V, seed=1), 1)
    return MarkovChainPrior(P[0], P, length, codebook=normal(V, 2, seed=2))


def dense(length: int = LENGTH) -> Problem:
    return Problem(Gaussian(Dense(normal(2, 2 * length, seed=3), (length, 2)), normal(2, seed=4), 0.8))


def log_kernel(z: Tensor, x: Tensor, b: float) -> Tensor:
    """Log of prod_i k_b(z_i | x_i) for all pairs of sequences, (z, x)."""
    same = (z[:, None] == x[None]).double()
    return torch.log((1.0 - b) * same + b / V).sum(-1)


# One level.


def plain_level(prior, problem, x: Tensor, z: Tensor, b: float, flags: Tensor, fill: Tensor, moves: Tensor):
    """One walker's level by sums over all sequences, with the given uniforms."""
    states = every_sequence(LENGTH, V, torch.device("cpu"))
    p = prior.log_prob(states).exp()
    raised = (1.0 - b) / (1.0 - b + b / V)
    kept = [bool(x[i] == z[i]) and float(flags[i]) < raised for i in range(LENGTH)]
    known = {i: int(z[i]) for i in range(LENGTH) if kept[i]}
    for i in sorted((i for i in range(LENGTH) if not kept[i]), key=lambda i: float(fill[0, i])):
        agree = torch.stack([states[:, j] == v for j, v in known.items()]).all(0) if known else torch.ones(len(p)) > 0
        law = torch.stack([p[agree & (states[:, i] == v)].sum() for v in range(V)])
        known[i] = int((torch.cumsum(law / law.sum(), 0) <= fill[1, i]).sum())
    x, z = torch.tensor([known[i] for i in range(LENGTH)]), z.clone()
    for u in moves:
        i = int(u[0] * LENGTH)
        new = z.clone()
        new[i] = (z[i] + 1 + int(u[1] * (V - 1))) % V
        values = [float(problem.likelihood.log_prob(prior.decode(s[None]))) for s in (new, z)]
        kernels = [float(log_kernel(s[None], x[None], b)) for s in (new, z)]
        if math.log(float(u[2])) < values[0] - values[1] + kernels[0] - kernels[1]:
            z = new
    return x, z


@pytest.mark.parametrize("b", [1.0, 0.6, 0.05])
def test_a_level_is_that_of_plain_sums(b):
    prior, problem, n = chain(), dense(), 40
    p = Posterior(problem, prior, dtype=F64)
    sampler = SGDD(steps=3, mh_steps=6, loosest=b, tightest=b)
    x, z = prior.sample(n, seed=1)[None], prior.sample(n, seed=2)[None]
    state = SplitTokens(z=z, x=x, log_likelihood=p.log_likelihood(z))
    new, info = sampler.step(p, state, noise=Noise([7], n, dtype=F64).at(1))
    same = Noise([7], n, dtype=F64).at(1)
    shapes = ((LENGTH,), (2, LENGTH), (6, 3))
    flags, fill, moves = (same.uniform(same.slots, s) for s in shapes)
    for k in range(n):
        mine = plain_level(prior, problem, x[0, k], z[0, k], b, flags[k], fill[k], moves[k])
        assert torch.equal(new.x[0, k], mine[0])
        assert torch.equal(new.z[0, k], mine[1])
    torch.testing.assert_close(new.log_likelihood, p.log_likelihood(new.z))
    assert info.sigma == pytest.approx(b)


@pytest.mark.parametrize("b", [0.6, 0.15])
def test_a_level_leaves_the_joint_law_as_it_is(b):
    prior, problem, n = chain(), dense(), 30_000
    states = every_sequence(LENGTH, V, torch.device("cpu"))
    joint = log_kernel(states, states, b) + prior.log_prob(states)
    joint = torch.softmax((joint + problem.likelihood.log_prob(prior.decode(states))[:, None]).flatten(), 0)
    noise = Noise([5], n, dtype=F64)
    start = torch.searchsorted(joint.cumsum(0), noise.uniform(noise.slots).contiguous()).clamp_max(len(joint) - 1)
    p = Posterior(problem, prior, dtype=F64)
    z, x = states[start // len(states)][None], states[start % len(states)][None]
    state = SplitTokens(z=z, x=x, log_likelihood=p.log_likelihood(z))
    sampler = SGDD(steps=9, mh_steps=5, loosest=b, tightest=b)
    for k in range(2):
        state, _ = sampler.step(p, state, noise=noise.at(k + 1))
    for now, before in ((state.z, z), (state.x, x)):
        assert float((now != before).any(2).double().mean()) > 0.1
    place = V ** torch.arange(LENGTH - 1, -1, -1)
    index = (state.z[0] * place).sum(1) * len(states) + (state.x[0] * place).sum(1)
    counts = torch.bincount(index, minlength=len(joint)).double()
    often = n * joint > 5.0
    chi = float((((counts - n * joint) ** 2 / (n * joint))[often]).sum())
    assert abs(chi - int(often.sum())) < 4.5 * math.sqrt(2 * int(often.sum()))


class Recorder:
    """A prior that keeps the sequences that it was asked about."""

    def __init__(self, prior) -> None:
        self.shape, self.vocabulary_size, self.mask_token = prior.shape, prior.vocabulary_size, prior.mask_token
        self.codebook, self.decode_embedding, self.prior = prior.codebook, prior.decode_embedding, prior
        self.masked = []

    def log_probs(self, tokens: Tensor) -> Tensor:
        self.masked.append((tokens == self.mask_token).sum(1))
        return self.prior.log_probs(tokens)


def test_tokens_share_a_pass_only_where_they_are_more_than_the_passes():
    prior = Recorder(chain(8))
    p, n = Posterior(dense(8), prior, dtype=F64), 200
    sampler = SGDD(steps=2, mh_steps=1, prior_steps=5, loosest=0.6, tightest=0.6)
    state = sampler.init(p, 1, n, noise=Noise([0], n, dtype=F64))
    first = torch.stack(prior.masked)
    assert torch.equal(first[0], torch.full((n,), 8))
    assert int((first[:-1] - first[1:]).max()) == 2  # 8 tokens in 5 passes: one or two each
    prior.masked.clear()
    state, _ = sampler.step(p, state, noise=Noise([0], n, dtype=F64).at(1))
    left = torch.stack([*prior.masked, torch.zeros(n, dtype=torch.int64)])
    few = left[0] <= 5
    assert 0.2 < float(few.double().mean()) < 1.0
    assert int((left[:-1] - left[1:])[:, few].max()) == 1
    assert not bool((state.x == p.mask_token).any())


def test_levels_fall_from_the_loosest_to_the_tightest():
    for schedule, middle in (("linear", 0.41), ("geometric", math.sqrt(0.8 * 0.02))):
        sampler = SGDD(steps=5, loosest=0.8, tightest=0.02, schedule=schedule)
        levels = [sampler.level(k) for k in range(5)]
        assert levels == sorted(levels, reverse=True)
        assert (levels[0], levels[2], levels[4]) == pytest.approx((0.8, middle, 0.02))
    assert SGDD(steps=1).level(0) == 1.0


# The limit.


def test_the_limit_is_the_enumerated_posterior():
    case = named("parity-8")
    few, many = (
        invdiff.solve(case.problem, case.prior, SGDD(steps=steps, mh_steps=15), draws=1000, dtype=F64)
        for steps in (3, 60)
    )
    errors = [float(measure_tokens(s, case).marginal_tv[0]) for s in (few, many)]
    assert errors[1] < 2.0 * case.floor(1000) < errors[0]


def test_cost_in_passes_and_decoder_calls():
    for prior_steps, passes in ((2, 2), (50, LENGTH)):
        p = Posterior(dense(), chain(), dtype=F64)
        sampler = SGDD(steps=4, mh_steps=7, prior_steps=prior_steps)
        about = p.sample(sampler, 6).about
        assert about["evaluations_per_draw"] == sampler.cost_on(p).forward == 5 * passes
        assert p.evaluations.likelihood == 6 * (1 + 4 * 7 + 1)
        assert p.evaluations.likelihood_grad == 0
    with pytest.raises(CapabilityError, match="cost_on"):
        SGDD().cost()


# Bad input.


def bits(length: int) -> ProductMixturePrior:
    levels = torch.tensor([[0.0], [1.0]])
    return ProductMixturePrior.uniform(length, 2, codebook=levels, detokeniser=Reshape((length, 1), (length,)))


def test_walkers_find_their_way_out_of_likelihood_zero_or_say_so():
    # One sequence of 16 is possible, and no neighbour of most is.
    only = Problem(BinarySymmetric(Parity(torch.eye(4)), torch.tensor([0.0, 1.0, 1.0, 0.0]), 0.0))
    found = invdiff.solve(only, bits(4), SGDD(steps=60, mh_steps=15), draws=8)
    assert torch.equal(found.tokens[0], torch.tensor([0, 1, 1, 0]).expand(8, 4))
    never = Problem(BinarySymmetric(Parity(torch.tensor([[1, 1, 0], [1, 1, 0]])), torch.tensor([0.0, 1.0]), 0.0))
    with pytest.raises(SamplingError, match=r"8 of 8 walkers have met no sequence"):
        invdiff.solve(never, bits(3), SGDD(steps=5, mh_steps=3), draws=8)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "at least one step"),
        ({"mh_steps": 0}, "at least one move"),
        ({"prior_steps": 0}, "one pass"),
        ({"tightest": 0.0}, "tightest > 0"),
        ({"loosest": 1.5}, "1 >= loosest"),
        ({"loosest": 0.1, "tightest": 0.2}, "loosest >= tightest"),
        ({"schedule": "cosine"}, "schedule is"),
    ],
)
def test_impossible_settings_are_refused(settings, match, unchecked):
    with pytest.raises(InputError, match=match):
        SGDD(**settings)
