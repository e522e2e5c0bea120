"""Infilling: known tokens and a noisy channel, against sums over all sequences."""

import itertools

import pytest
import torch

import invdiff
from invdiff import likelihoods, priors, samplers
from invdiff.errors import CatalogueError, InputError, ShapeError
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.posterior import Posterior
from invdiff.priors.base import MaskedPrior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.problem import Problem

F64 = torch.float64
V, L, MASK = 3, 5, 3
GIVEN = torch.tensor([MASK, 1, MASK, MASK, 0])
READ = torch.tensor([2, V, V, 1, V])
RATE = 0.2


def chain() -> priors.MarkovChainPrior:
    P = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.1, 0.4]], dtype=F64)
    return priors.MarkovChainPrior(torch.tensor([0.5, 0.3, 0.2], dtype=F64), P, L)


def everything() -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(V), repeat=L)))


def truth() -> tuple[torch.Tensor, torch.Tensor]:
    """Marginals (L, V) of the posterior, and the log evidence log p(y | given)."""
    z = everything()
    fits = ((GIVEN == MASK) | (z == GIVEN)).all(1)
    log_p = torch.where(fits, chain().log_prob(z), -torch.inf)
    channel = torch.zeros(len(z), dtype=F64)
    for i, y in enumerate(READ.tolist()):
        if y != V:
            channel += torch.where(z[:, i] == y, 1.0 - RATE, RATE / (V - 1)).to(F64).log()
    joint = (log_p + channel).exp()
    weights = joint / joint.sum()
    marginals = torch.stack([(weights[:, None] * (z == v)).sum(0) for v in range(V)], 1)
    return marginals, (joint.sum() / log_p.exp().sum()).log()


def problem() -> Problem:
    return Problem(likelihoods.SymmetricChannel(READ, V, RATE), given={"tokens": GIVEN})


# The prior.


def test_the_conditionals_are_those_of_the_sequences_that_fit():
    prior = priors.GivenTokens(chain(), GIVEN)
    assert isinstance(prior, MaskedPrior)
    state = torch.tensor([[MASK, 2, MASK, 1, MASK]])  # the 2 stands where a 1 is given, and does not count
    z = everything()
    fits = (z[:, 1] == 1) & (z[:, 4] == 0) & (z[:, 3] == 1)
    p = torch.where(fits, chain().log_prob(z).exp(), 0.0)
    expected = torch.stack([(p[:, None] * (z == v)).sum(0) for v in range(V)], 1) / p.sum()
    assert torch.allclose(prior.log_probs(state)[0].exp(), expected, atol=1e-12)


def test_draws_keep_what_is_given_and_follow_the_conditional_law():
    prior, n = priors.GivenTokens(chain(), GIVEN), 20_000
    z = prior.sample(n, seed=1)
    assert bool((z[:, [1, 4]] == GIVEN[[1, 4]]).all())
    expected = prior.log_probs(torch.full((1, L), MASK))[0].exp()
    found = torch.stack([(z == v).double().mean(0) for v in range(V)], 1)
    assert bool(((found - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-12).all())
    assert torch.equal(prior.sample(7, seed=1), z[:7])


def test_vectors_and_tokens_decode_to_the_given_ones():
    prior = priors.GivenTokens(chain(), GIVEN)
    wrong = torch.tensor([[0, 2, 0, 0, 2]])
    right = torch.tensor([[0, 1, 0, 0, 0]])
    assert torch.equal(prior.decode(wrong), chain().decode(right))
    embedding = prior.codebook[wrong].requires_grad_()
    (grad,) = torch.autograd.grad(prior.decode_embedding(embedding).sum(), embedding)
    assert grad.abs().sum(2).tolist() == [[3.0, 0.0, 3.0, 3.0, 0.0]]  # none where a token is given
    assert torch.equal(prior.decode(torch.tensor([[0, MASK, 0, 0, MASK]])), chain().decode(right))
    with pytest.raises(InputError, match="lie in"):
        prior.decode(torch.tensor([[MASK, 1, 0, 0, 0]]))


def test_a_network_is_conditioned_alike():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MaskedTransformer([L], V, width=16, depth=1, heads=2)
        torch.nn.init.normal_(network.head.weight)
    prior = MaskedNetworkPrior(network, alphabet="abc")
    found = priors.GivenTokens(prior, GIVEN)
    blank = torch.full((1, L), MASK)
    assert torch.allclose(found.log_probs(blank), prior.log_probs(GIVEN[None]))
    assert (found.alphabet, found.vocabulary_size, found.event) == ("abc", V, prior.event)
    assert found.key != prior.key != priors.GivenTokens(prior, blank[0]).key


def test_what_cannot_be_given_is_refused():
    with pytest.raises(CatalogueError, match="'tokens'"):
        Posterior(Problem(problem().likelihood, given={"token": GIVEN}), chain())
    with pytest.raises(ShapeError, match="5 tokens"):
        priors.GivenTokens(chain(), GIVEN[:4])
    with pytest.raises(InputError, match="lie in"):
        priors.GivenTokens(chain(), GIVEN + 1)
    stuck = priors.MarkovChainPrior(torch.tensor([1.0, 0.0]), torch.eye(2), 3)
    impossible = priors.GivenTokens(stuck, torch.tensor([2, 1, 2]))
    with pytest.raises(InputError, match="probability zero"):
        impossible.sample(1)


# The channel.


def test_the_channel_is_what_it_says():
    likelihood = likelihoods.SymmetricChannel(READ, V, RATE)
    z = torch.tensor([[2, 0, 0, 1, 0], [0, 0, 0, 1, 0], [0, 1, 2, 2, 2]])
    x = torch.nn.functional.one_hot(z, V).to(F64)
    expected = torch.tensor([2 * [0.8], [0.1, 0.8], 2 * [0.1]], dtype=F64).log().sum(1)
    assert torch.allclose(likelihood.log_prob(x), expected)
    assert torch.allclose(likelihood.deviance(x), 2.0 * (expected[0] - expected))
    law = torch.softmax(torch.randn(4, L, V, dtype=F64, generator=torch.Generator().manual_seed(0)), -1)
    mean = (0.8 * law[:, 0, 2] + 0.1 * (1 - law[:, 0, 2])) * (0.8 * law[:, 3, 1] + 0.1 * (1 - law[:, 3, 1]))
    assert torch.allclose(likelihood.log_prob(law).exp(), mean)
    assert torch.autograd.gradcheck(likelihood.log_prob, law.requires_grad_())


def test_without_errors_it_is_certain_and_has_a_gradient_where_nothing_was_read():
    likelihood = likelihoods.SymmetricChannel(READ, V, 0.0)
    x = torch.nn.functional.one_hot(torch.tensor([[2, 0, 0, 1, 0], [2, 0, 0, 0, 0]]), V).to(F64)
    value, grad = likelihood.log_prob_and_grad(x)
    assert value.tolist() == [0.0, -torch.inf]
    assert bool(torch.isfinite(grad[0]).all())
    assert float(grad[:, [1, 2, 4]].abs().max()) == 0.0


def test_several_sequences_run_together():
    parts = [likelihoods.SymmetricChannel(READ, V, RATE), likelihoods.SymmetricChannel(READ.flip(0), V, RATE)]
    both = likelihoods.SymmetricChannel.stack(parts)
    x = torch.softmax(torch.randn(4, L, V, dtype=F64, generator=torch.Generator().manual_seed(0)), -1)
    rows = both.rows(torch.tensor([0, 1, 1, 0]))
    expected = [parts[i].log_prob(x[k : k + 1]) for k, i in enumerate((0, 1, 1, 0))]
    assert torch.equal(rows.log_prob(x), torch.cat(expected))
    with pytest.raises(InputError, match="share"):
        likelihoods.SymmetricChannel.stack([parts[0], likelihoods.SymmetricChannel(READ, V, 0.1)])


@pytest.mark.parametrize(
    ("measurement", "vocabulary_size", "rate", "error", "match"),
    [
        (READ, 3, 0.7, InputError, "least likely"),
        (READ, 3, -0.1, InputError, "least likely"),
        (READ, 1, 0.0, InputError, "two symbols"),
        (READ + 1, 3, 0.1, InputError, r"\[0, 3\]"),
        (READ.double(), 3, 0.1, InputError, "int64"),
        (READ[None, None], 3, 0.1, ShapeError, "length"),
    ],
)
def test_bad_channels_are_refused(measurement, vocabulary_size, rate, error, match):
    with pytest.raises(error, match=match):
        likelihoods.SymmetricChannel(measurement, vocabulary_size, rate)


# The posterior.

CONSISTENT = {
    "TwistedSMC": samplers.TwistedSMC(),
    "TwistedSMC, no lookahead": samplers.TwistedSMC(lookahead=False),
    "AnchoredSMC": samplers.AnchoredSMC(inner_steps=4),
    "AmortisedSMC": samplers.AmortisedSMC(),
    "MaskedGibbs": samplers.MaskedGibbs(steps=60),
    "SGDD": samplers.SGDD(steps=150, mh_steps=10, tightest=1e-3),
}


@pytest.mark.parametrize("name", CONSISTENT)
def test_samplers_draw_from_the_posterior_of_the_given_tokens(name):
    n = 3000
    solution = invdiff.solve(problem(), chain(), CONSISTENT[name], draws=n, seed=3, dtype=F64)
    z = solution.tokens.flatten(0, 1)
    assert bool((z[:, [1, 4]] == GIVEN[[1, 4]]).all())
    assert torch.equal(solution.draws, chain().decode(z))
    expected, evidence = truth()
    found = torch.stack([(z == v).double().mean(0) for v in range(V)], 1)
    # Resampling and short chains leave at most twice what chance does; SGDD has a small bias beside.
    assert float((found - expected).abs().max()) < 2.0 * 4.5 * float((expected * (1 - expected) / n).sqrt().max())
    if solution.log_evidence is not None:
        assert abs(solution.log_evidence - float(evidence)) < 0.05


@pytest.mark.parametrize("sampler", [samplers.APS(steps=3), samplers.G2D2(steps=3), samplers.SVDD(candidates=4)])
def test_biased_samplers_keep_what_is_given(sampler):
    z = invdiff.solve(problem(), chain(), sampler, draws=50, seed=3, dtype=F64).tokens.flatten(0, 1)
    assert bool((z[:, [1, 4]] == GIVEN[[1, 4]]).all())
    assert int(z.max()) < V


def test_nothing_read_is_the_conditional_prior():
    blank = Problem(likelihoods.SymmetricChannel(torch.full((L,), V), V, RATE), given={"tokens": GIVEN})
    solution = invdiff.solve(blank, chain(), draws=500, seed=0, dtype=F64)
    assert abs(solution.log_evidence) < 1e-12
    expected = priors.GivenTokens(chain(), GIVEN).log_probs(torch.full((1, L), MASK))[0].exp()
    z = solution.tokens.flatten(0, 1)
    found = torch.stack([(z == v).double().mean(0) for v in range(V)], 1)
    assert bool(((found - expected).abs() < 4.5 * (expected * (1 - expected) / 500).sqrt() + 1e-12).all())


def test_what_is_given_makes_another_problem():
    other = Problem(likelihoods.SymmetricChannel(READ, V, RATE), given={"tokens": GIVEN.flip(0)})
    assert problem().key == problem().key != other.key
    assert Posterior(problem(), chain()).prior.key != Posterior(other, chain()).prior.key


def test_a_saved_solution_has_the_symbols_and_the_tokens(tmp_path):
    solution = invdiff.solve(problem(), chain(), draws=20, seed=3)
    solution.save(tmp_path / "s.nc")
    again = invdiff.Solution.load(tmp_path / "s.nc")
    assert torch.equal(again.tokens, solution.tokens)
    assert again.measurement.tolist() == READ.tolist()
