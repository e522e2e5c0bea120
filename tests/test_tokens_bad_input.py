"""What is asked of tokens and cannot be: every sampler of either kind, and every way into a masked prior."""

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import samplers
from invdiff.driver import Sampler
from invdiff.errors import CapabilityError, InputError, SamplingError, ShapeError
from invdiff.likelihoods import BinarySymmetric, Gaussian, Objective, Tabulated
from invdiff.networks import MaskedTransformer
from invdiff.noise import Noise
from invdiff.operators import Parity, Reshape, Scale
from invdiff.posterior import Posterior
from invdiff.priors import GaussianPrior, MarkovChainPrior, ProductMixturePrior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.problem import Problem
from invdiff.samplers import APS, G2D2, SGDD, SVDD, AmortisedSMC, AnchoredSMC, MaskedGibbs, TwistedSMC
from invdiff.solve import able_samplers, sampler_classes

F64 = torch.float64
V, L = 3, 4
TOKENS = (
    TwistedSMC(), TwistedSMC(lookahead=False), AnchoredSMC(inner_steps=2), AmortisedSMC(),
    MaskedGibbs(steps=5), SGDD(steps=5),
    SVDD(steps=2, candidates=3), APS(steps=2, inner_steps=3), APS(steps=2, inner_steps=3, estimator="soft", kl=0.0),
    G2D2(steps=2, inner_steps=3),
)  # fmt: skip
CONTINUOUS = sorted(name for name, cls in sampler_classes().items() if cls not in {type(s) for s in TOKENS})


def chain(impossible: int | None = None) -> MarkovChainPrior:
    P = torch.full((V, V), 1.0, dtype=F64)
    if impossible is not None:
        P[:, impossible] = 0.0
    P = P / P.sum(1, keepdim=True)
    return MarkovChainPrior(P[0], P, L)


def network() -> MaskedNetworkPrior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MaskedNetworkPrior(MaskedTransformer([L], V, width=8, depth=1, heads=2)).eval_only()


def flat() -> Problem:
    return Problem(Tabulated(torch.zeros((V,) * L, dtype=F64)))


# Samplers of one kind, priors of the other.


def test_the_list_above_holds_every_sampler_of_tokens():
    p = Posterior(flat(), chain(), dtype=F64)
    assert sorted({type(s).__name__ for s in TOKENS}) == sorted(able_samplers(p))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_samplers_of_noise_levels_are_refused_under_masked_priors(name):
    with pytest.raises(CapabilityError, match=r"needs .*denoiser.*Samplers that can: .*MaskedGibbs, .*TwistedSMC\."):
        invdiff.solve(flat(), chain(), name, draws=4, dtype=F64)


@pytest.mark.parametrize("sampler", TOKENS, ids=lambda s: type(s).__name__)
def test_samplers_of_tokens_are_refused_under_diffusion_priors(sampler: Sampler):
    prior = GaussianPrior(torch.zeros(L, V, dtype=F64), torch.eye(L * V, dtype=F64))
    problem = Problem(Gaussian(Scale((L, V)), torch.zeros(L, V, dtype=F64), 1.0))
    with pytest.raises(CapabilityError, match=r"needs .*masked.*Samplers that can: .*PiGDM"):
        invdiff.solve(problem, prior, sampler, draws=4, dtype=F64)


# Likelihoods that leave nothing.


def contradiction() -> tuple[Problem, ProductMixturePrior]:
    """Two checks of the same two bits that say the opposite, without noise."""
    bits = torch.tensor([[0.0], [1.0]])
    prior = ProductMixturePrior.uniform(3, 2, codebook=bits, detokeniser=Reshape((3, 1), (3,)))
    checks = Parity(torch.tensor([[1, 1, 0], [1, 1, 0]]))
    return Problem(BinarySymmetric(checks, torch.tensor([0.0, 1.0]), 0.0)), prior


def elsewhere() -> tuple[Problem, MarkovChainPrior]:
    """A table that is zero wherever the prior is not."""
    table = torch.full((V,) * L, -torch.inf, dtype=F64)
    table[2, 2, 2, 2] = 0.0
    return Problem(Tabulated(table)), chain(impossible=2)


def infinite() -> tuple[Problem, MarkovChainPrior]:
    """A cost without bound."""
    return Problem(Objective(lambda x: x.flatten(1).sum(1) + torch.inf, 1.0, (L, V))), chain()


@pytest.mark.parametrize("make", [contradiction, elsewhere, infinite], ids=lambda f: f.__name__)
@pytest.mark.parametrize("sampler", TOKENS, ids=lambda s: type(s).__name__)
def test_a_likelihood_that_is_zero_for_every_sequence_is_an_error(sampler: Sampler, make):
    problem, prior = make()
    with pytest.raises(SamplingError, match=r"check that the measurement fits the prior"):
        invdiff.solve(problem, prior, sampler, draws=8, dtype=F64)
    with pytest.raises(InputError, match="zero for every sequence"):
        prior.posterior(problem.likelihood)


def test_one_of_several_chains_with_nothing_is_an_error():
    table = torch.full((V,) * L, -torch.inf, dtype=F64)
    table[0, 0, 0, 0] = 0.0  # one sequence in 81: among 8 chains of 2 draws from the prior one has none, nearly surely
    blind = APS(steps=1, inner_steps=1, lr=1e-9)
    with pytest.raises(SamplingError, match=r"None of the 2 draws of ensemble \d has a likelihood above zero"):
        invdiff.solve(Problem(Tabulated(table)), chain(), blind, draws=2, chains=8, dtype=F64)


@pytest.mark.parametrize("sampler", TOKENS, ids=lambda s: type(s).__name__)
def test_a_likelihood_that_is_zero_for_most_sequences_is_none(sampler: Sampler):
    table = torch.full((V,) * L, -torch.inf, dtype=F64)
    table[0] = 0.0
    problem = Problem(Tabulated(table))
    try:
        solution = invdiff.solve(problem, chain(), sampler, draws=64, dtype=F64)
    except SamplingError as error:  # walkers and candidates may run out, and say so
        assert isinstance(sampler, (MaskedGibbs, SGDD, SVDD))
        assert "have met no sequence" in str(error)
        return
    found = solution.tokens[0]
    assert bool((found >= 0).all())
    if sampler.exact:
        assert bool((found[:, 0] == 0).all())


@pytest.mark.parametrize("sampler", [APS(steps=2, inner_steps=4), APS(steps=2, inner_steps=4, kl=0.0)], ids=repr)
def test_where_the_likelihood_is_zero_a_fit_keeps_to_the_prior(sampler):
    """Log 0 has an infinite slope: a fit that followed it would draw from NaN, which is token 0."""
    problem, _ = elsewhere()
    p = Posterior(problem, chain(), dtype=F64)  # the mean of uniform tokens is nearest to token 0, where there is none
    noise = Noise([1], 32)
    state, _ = sampler.step(p, sampler.init(p, 1, 32, noise=noise), noise=noise)
    torch.testing.assert_close(state.logits.exp(), torch.full((1, 32, L, V), 1.0 / V, dtype=F64))


# Tokens that are none.


def ways(length: int) -> dict[str, tuple]:
    """Ways into a masked prior: what takes complete sequences, and what takes masked ones too."""
    table = torch.zeros((V,) * length, dtype=F64)
    found = {}
    for name, prior in (("chain", chain()), ("network", network())):
        p = Posterior(Problem(Tabulated(table)), prior, dtype=F64)
        found |= {
            f"{name} log_probs": (prior.log_probs, True), f"{name} decode": (prior.decode, False),
            f"{name} posterior.log_probs": (p.log_probs, True), f"{name} posterior.decode": (p.decode, False),
            f"{name} posterior.log_likelihood": (p.log_likelihood, False),
            f"{name} posterior.misfit": (p.misfit, False), f"{name} posterior.deviance": (p.deviance, False),
        }  # fmt: skip
    found["chain log_prob"] = (chain().log_prob, False)
    found["network log_prob_bound"] = (network().log_prob_bound, False)
    return found


WAYS = ways(L)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_do_not_fit_are_refused_everywhere(way, unchecked):
    ask, masks = WAYS[way]
    good = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    ask(good)
    largest = V if masks else V - 1
    for bad in (V + 1, -1, *(() if masks else (V,))):
        wrong = good.clone()
        wrong[1, 2] = bad
        with pytest.raises(InputError, match=rf"lie in \[0, {largest}\] here; got {min(bad, 0)} to {max(bad, 2)}"):
            ask(wrong)
    for length in (L - 1, L + 1):
        with pytest.raises(ShapeError, match=rf"{L}\).*got \(2, {length}\)"):
            ask(torch.zeros(2, length, dtype=torch.int64))
    with pytest.raises(InputError, match=r"torch\.int64; got torch\.float32"):
        ask(good.float())


def test_a_problem_of_other_sequences_is_refused():
    for shape in ((V,) * (L - 1), (V + 1,) * L):
        with pytest.raises(ShapeError, match="different unknowns"):
            Posterior(Problem(Tabulated(torch.zeros(shape))), chain())


def test_vectors_that_do_not_fit_are_refused():
    p = Posterior(flat(), chain(), dtype=F64)

    def ask(*shape: int) -> tuple[Tensor, Tensor]:
        return p.embedding_log_likelihood_and_grad(torch.zeros(shape, dtype=F64))

    for shape in ((2, L, V + 1), (2, L + 1, V), (L, V)):
        with pytest.raises(ShapeError, match=rf"\(\.\.\., {L}, {V}\)"):
            ask(*shape)
    assert samplers.TwistedSMC().requires() <= p.capabilities
