"""Amortised proposals: the tilted prior, its training against plain sums, and the weights that make it exact."""

import itertools

import pytest
import torch
from test_aps import F64, L, V, chain, dense
from torch import Tensor

from invdiff.diagnostics.discrete import marginal_tv, measure_tokens, named
from invdiff.errors import CapabilityError, InputError, SamplingError, ShapeError
from invdiff.likelihoods import Gaussian, Objective, Tabulated
from invdiff.networks import MaskedTransformer
from invdiff.noise import Noise
from invdiff.posterior import Posterior
from invdiff.priors import GaussianPrior, MarkovChainPrior
from invdiff.priors.amortised import AmortisedPrior
from invdiff.problem import Problem
from invdiff.samplers import PlugIn
from invdiff.samplers.amortised_smc import AmortisedSMC
from invdiff.training.amortise import AmortiseSettings, Paths, amortise, draw_paths, loss


def network(length: int = L, vocabulary: int = V, scale: float = 1.0, seed: int = 0) -> MaskedTransformer:
    """A network with something to say, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = MaskedTransformer([length], vocabulary, width=8, depth=1, heads=2).double()
        torch.nn.init.normal_(made.head.weight, std=scale)
        for layer in made.layers:  # as they are made, no token sees another one
            torch.nn.init.normal_(layer.out.weight)
            torch.nn.init.normal_(layer.down.weight)
    return made


def frozen(made: MaskedTransformer) -> MaskedTransformer:
    return made.eval().requires_grad_(requires_grad=False)


def short(length: int = 2) -> Posterior:
    """A chain with an impossible step, and a table."""
    P = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3]], dtype=F64)
    values = torch.randn((3,) * length, generator=torch.Generator().manual_seed(5), dtype=F64)
    return Posterior(Problem(Tabulated(values)), MarkovChainPrior(P[1], P, length), dtype=F64)


# The network and the tilted prior.


def test_mixtures_that_are_tokens_are_tokens():
    made, tokens = network(), torch.tensor([[0, V, 1, V], [V, V, V, V]])
    vectors = torch.nn.functional.one_hot(tokens, V + 1).double()
    torch.testing.assert_close(made.mixed(vectors), made(tokens))
    between = torch.softmax(torch.randn(2, L, V + 1, generator=torch.Generator().manual_seed(1), dtype=F64), -1)
    assert torch.autograd.gradcheck(frozen(made).mixed, (between.requires_grad_(),))


def test_the_tilt_is_added_to_the_conditionals_of_masked_tokens():
    p, made = short(3), frozen(network(3, 3))
    tilted = AmortisedPrior(p.prior, made)
    tokens = torch.tensor([[3, 3, 3], [0, 3, 1], [3, 2, 3], [1, 2, 0]])
    c, found = p.prior.log_probs(tokens), tilted.log_probs(tokens)
    for n, i in itertools.product(range(4), range(3)):
        if tokens[n, i] == 3:
            weights = c[n, i].exp() * made(tokens)[n, i].exp()
            torch.testing.assert_close(found[n, i].exp(), weights / weights.sum())
        else:
            torch.testing.assert_close(found[n, i], c[n, i])
    assert bool(torch.isneginf(found[1, 1, 2]))  # 2 never follows 0
    untilted = AmortisedPrior(p.prior, frozen(network(3, 3, scale=0.0)))
    torch.nn.init.zeros_(untilted.network.head.bias)
    torch.testing.assert_close(untilted.log_probs(tokens), c)
    assert untilted.key != tilted.key
    assert tilted.key[:16] in repr(tilted)


def test_draws_of_a_tilted_prior_follow_its_conditionals_in_random_order():
    p, n = short(), 20_000
    tilted = AmortisedPrior(p.prior, frozen(network(2, 3)))
    law = torch.zeros(3, 3, dtype=F64)
    for first in (0, 1):
        for v in range(3):
            start = tilted.log_probs(torch.tensor([[3, 3]]))[0, first, v].exp()
            known = torch.tensor([[3, 3]])
            known[0, first] = v
            if start > 0:
                rest = tilted.log_probs(known)[0, 1 - first].exp()
                law += 0.5 * start * (torch.outer(torch.eye(3, dtype=F64)[v], rest) if first == 0 else
                                      torch.outer(rest, torch.eye(3, dtype=F64)[v]))  # fmt: skip
    z = tilted.sample(n, seed=1)
    counts = torch.bincount(z[:, 0] * 3 + z[:, 1], minlength=9).double().reshape(3, 3) / n
    assert float(law.sum()) == pytest.approx(1.0)
    assert bool(((counts - law).abs() <= 4.5 * (law * (1 - law) / n).sqrt()).all())


# The training.


def settings(**more) -> AmortiseSettings:
    return AmortiseSettings(**({"width": 8, "depth": 1, "heads": 2} | more))


def exact_objective(p: Posterior, made: MaskedTransformer, kl: float) -> Tensor:
    """F of two tokens, over all orders and sequences."""
    total = torch.zeros((), dtype=F64)
    for first in (0, 1):
        empty = torch.tensor([[3, 3]])
        c = p.prior.log_probs(empty)[0]
        q = torch.log_softmax(c + made(empty)[0], -1)
        for v, w in itertools.product(range(3), range(3)):
            known = empty.clone()
            known[0, first] = v
            if torch.isneginf(c[first, v]):
                continue
            d = p.prior.log_probs(known)[0, 1 - first]
            r = torch.log_softmax(d + made(known)[0, 1 - first], -1)
            if torch.isneginf(d[w]):
                continue
            x = torch.tensor([[v, w] if first == 0 else [w, v]])
            ratio = q[first, v] - c[first, v] + r[w] - d[w]
            total = total + 0.5 * (q[first, v] + r[w]).exp() * (kl * ratio - p.log_likelihood(x)[0])
    return total


BATCHES = 120


@pytest.mark.parametrize("kl", [1.0, 0.3])
def test_the_score_function_has_the_gradient_of_the_objective(kl):
    p, made, n = short(), network(2, 3, scale=2.0), 400  # conditionals far from the prior's
    parameters = [made.head.weight, made.head.bias]  # which every path goes through
    F = exact_objective(p, made, kl)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(F, parameters)])
    values, grads = [], []
    for k in range(BATCHES):
        noise = Noise([7], n, dtype=F64).at(k)
        paths = draw_paths(p, made, n, noise, temperature=1.0, through=2)
        value, surrogate = loss(p, paths, settings(gradient="score", kl=kl))
        values.append(value)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(surrogate, parameters)]))
    value, g, F = torch.cat(values), torch.stack(grads), F.detach()
    assert abs(float(value.mean() - F)) < 4.0 * float(value.std()) / len(value) ** 0.5
    # 27 values of 120 batches each: the largest of so many t-statistics stays below 5.
    se = g.std(0) / BATCHES**0.5 + 1e-12
    assert float(((g.mean(0) - expected).abs() / se).max()) < 5.0
    assert float((expected.abs() / se).max()) > 15.0  # the bound could have been broken
    if kl == 1.0:
        exact = p.prior.posterior(p._likelihood)
        assert float(F) > -exact.log_evidence


def test_a_token_is_credited_with_what_comes_after_it():
    p, n, kl = Posterior(dense(), chain(), dtype=F64), 3, 0.7
    z = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1], [0, 0, 0, 2]])
    divergence = torch.rand(n, L, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    log_q = torch.zeros(n, L, dtype=F64, requires_grad=True)
    paths = Paths(tokens=z, vectors=torch.zeros(n, L, V, dtype=F64), divergence=divergence, log_q=log_q)
    value, surrogate = loss(p, paths, settings(gradient="score", kl=kl))
    by_divergence, by_log_q = torch.autograd.grad(surrogate, (divergence, log_q))
    d, log_p = divergence.detach(), p.log_likelihood(z)
    for i, k in itertools.product(range(n), range(L)):
        after = [float(kl * d[j, k + 1 :].sum() - log_p[j]) for j in range(n)]
        others = sum(after[j] for j in range(n) if j != i) / (n - 1)
        assert float(by_log_q[i, k]) == pytest.approx((after[i] - others) / n)
    torch.testing.assert_close(by_divergence, torch.full((n, L), kl / n, dtype=F64))
    torch.testing.assert_close(value, kl * d.sum(1) - log_p)


def test_the_straight_through_gradient_is_that_of_the_perturbed_softmax():
    P = torch.tensor([[0.2, 0.5, 0.3]], dtype=F64)
    E = torch.tensor([[0.0, 1.0], [1.0, -1.0], [2.0, 0.5]], dtype=F64)
    prior = MarkovChainPrior(P[0], P.expand(3, 3), 1, codebook=E)
    p = Posterior(Problem(Objective(lambda x: x.square().sum((1, 2)) + x[:, 0, 0] ** 3, 1.0, (1, 2))), prior, dtype=F64)
    made, n, tau = network(1, 3), 5, 0.7
    paths = draw_paths(p, made, n, Noise([2], n, dtype=F64), temperature=tau, through=1)
    value, surrogate = loss(p, paths, settings())
    (found,) = torch.autograd.grad(surrogate, made.head.bias)
    noise = Noise([2], n, dtype=F64)
    g = -torch.log(-torch.log(noise.uniform(noise.slots, (1, 4))[:, 0, :3]))
    log_c = P[0].log()
    log_q = torch.log_softmax(log_c + made(torch.tensor([[3]]))[0, 0].detach(), -1)
    q = log_q.exp()
    expected = q * (log_q - log_c) - q * (q * (log_q - log_c)).sum()  # of the divergence
    for i in range(n):
        v = int((log_q + g[i]).argmax())
        assert int(paths.tokens[i, 0]) == v
        w = torch.softmax((log_q + g[i]) / tau, -1)
        slope = 2.0 * E[v] + torch.tensor([3.0 * float(E[v, 0]) ** 2, 0.0], dtype=F64)  # of J at the drawn token
        gain = E @ slope
        by_logits = w * (gain - (w * gain).sum()) / tau
        expected = expected + (by_logits - q * by_logits.sum()) / n
        J = float(E[v].square().sum() + E[v, 0] ** 3)
        assert float(value[i]) == pytest.approx(J + float((q * (log_q - log_c)).sum()))
    torch.testing.assert_close(found, expected)


def test_the_likelihoods_gradient_passes_through_the_last_tokens_alone():
    p, made = Posterior(dense(), chain(), dtype=F64), network()
    felt = {}
    for through in range(1, L + 1):
        paths = draw_paths(p, made, 1, Noise([4], 1, dtype=F64), temperature=1.0, through=through)
        slopes = [
            torch.autograd.grad(paths.vectors[0, i, 1], made.head.bias, retain_graph=True, allow_unused=True)[0]
            for i in range(L)
        ]
        assert sum(s is not None and float(s.abs().max()) > 0 for s in slopes) == through
        felt[through] = torch.autograd.grad(paths.divergence[:, -1].sum(), made.head.bias)[0]
    # The last divergence feels the tokens before it where the gradient passes through them.
    assert float((felt[L] - felt[1]).abs().max()) > 1e-3


def test_divergences_are_those_of_the_paths():
    """The law of paths against the prior's: E sum log q - log p(x), for any network."""
    p, made, n = short(3), frozen(network(3, 3)), 20_000
    paths = draw_paths(p, made, n, Noise([6], n, dtype=F64), temperature=1.0, through=3)
    difference = paths.log_q.sum(1) - p.prior.log_prob(paths.tokens) - paths.divergence.sum(1)
    assert abs(float(difference.mean())) < 4.0 * float(difference.std()) / n**0.5
    assert float(paths.divergence.sum(1).mean()) > 0.05
    hard = torch.nn.functional.one_hot(paths.tokens, 3).double()
    torch.testing.assert_close(paths.vectors, hard)


@pytest.mark.parametrize("gradient", ["straight-through", "score"])
def test_training_brings_the_tilted_prior_towards_the_posterior(gradient):
    p = Posterior(dense(), chain(), dtype=F64)
    exact = chain().posterior(p._likelihood)
    state = torch.random.get_rng_state()
    tilted, F = amortise(p, settings(steps=60, batch=32, learning_rate=3e-2, gradient=gradient))
    assert torch.equal(torch.random.get_rng_state(), state)
    again, F_again = amortise(p, settings(steps=60, batch=32, learning_rate=3e-2, gradient=gradient))
    assert torch.equal(F, F_again)
    assert tilted.key == again.key
    se = float(F[-20:].std()) / 20**0.5
    assert -exact.log_evidence - 4.0 * se < float(F[-20:].mean()) < float(F[:5].mean()) - 1.0
    n = 2000
    before, after = (marginal_tv(prior.sample(n, seed=3), exact) for prior in (chain(), tilted))
    assert after < 0.6 * before

    def ess(proposal: AmortisedPrior | None) -> float:
        solution = p.sample(AmortisedSMC(proposal=proposal, threshold=0.0), 500, chains=4, seed=8)
        W = torch.softmax(solution.log_weights.double(), 1)
        return float((1.0 / W.square().sum(1)).mean()) / 500

    assert ess(tilted) > ess(None) + 0.2


@pytest.mark.slow
def test_what_the_files_say_of_the_chain():
    case = named("chain-8")
    p = Posterior(case.problem, case.prior, dtype=F64)
    tilted, F = amortise(p, AmortiseSettings(seed=13))
    assert 7.0 < float(F[-50:].mean()) < 10.0
    assert (
        marginal_tv(tilted.sample(4000, seed=1), case.exact)
        < 0.2
        < marginal_tv(case.prior.sample(4000, seed=1), case.exact)
    )
    tvs, last = [], []
    for proposal in (None, tilted):
        tvs.append(
            float(measure_tokens(p.sample(AmortisedSMC(proposal=proposal), 512, chains=16), case).marginal_tv.mean())
        )
        solution = p.sample(AmortisedSMC(proposal=proposal, threshold=0.0), 512, chains=16)
        last.append(solution.trace[-1].ess)
    assert tvs[1] < tvs[0]
    assert last[1] > 2.0 * last[0]


# The sampler.


def test_a_step_is_that_of_plain_sums():
    prior, problem, n, d = chain(), dense(), 20, 0.2
    p, tilted = Posterior(problem, prior, dtype=F64), AmortisedPrior(prior, frozen(network()))
    sampler = AmortisedSMC(proposal=tilted, twist=PlugIn(), threshold=0.0, defence=d)
    state = sampler.init(p, 1, n, noise=Noise([3], n, dtype=F64))

    def twist(z: Tensor) -> float:
        mean = prior.log_probs(z[None]).exp() @ prior.codebook
        return float(problem.likelihood.log_prob(prior.decode_embedding(mean)))

    for step in range(L):
        new, _ = sampler.step(p, state, noise=Noise([3], n, dtype=F64).at(step + 1))
        for i in range(n):
            x, y = state.z[0, i], new.z[0, i]
            (where,) = (x != y).nonzero()[:, 0].tolist()
            assert x[where] == V
            v = int(y[where])
            c = prior.log_probs(x[None])[0, where]
            q = (1 - d) * tilted.log_probs(x[None])[0, where].exp() + d * c.exp()
            expected = float(c[v] - q[v].log()) + twist(y) - twist(x)
            assert float(new.log_weights[0, i] - state.log_weights[0, i]) == pytest.approx(expected, abs=1e-9)
        state = new
    assert not bool((state.z == V).any())


@pytest.mark.parametrize("proposal", [None, 0, 1], ids=["prior", "tilted", "tilted otherwise"])
def test_evidence_has_no_bias_whatever_was_learnt(proposal):
    p = Posterior(dense(), chain(), dtype=F64)
    exact = chain().posterior(p._likelihood)
    tilted = None if proposal is None else AmortisedPrior(chain(), frozen(network(scale=0.5, seed=proposal)))
    solution = p.sample(AmortisedSMC(proposal=tilted, threshold=0.8), 16, chains=800, seed=5)
    ratio = (solution.chain_log_evidence.double() - exact.log_evidence).exp()
    se = float(ratio.std()) / 800**0.5
    assert abs(float(ratio.mean()) - 1.0) < 4.0 * se
    assert se < 0.05


def test_draws_are_exact_as_particles_grow():
    p, chains = Posterior(dense(), chain(), dtype=F64), 40
    exact = chain().posterior(p._likelihood)
    sampler = AmortisedSMC(proposal=AmortisedPrior(chain(), frozen(network(scale=0.3))))
    z = p.sample(sampler, 1000, chains=chains, seed=6).tokens
    found = torch.nn.functional.one_hot(z, V).double().mean(1)  # of each chain
    t = (found.mean(0) - exact.marginals) / (found.std(0) / chains**0.5)
    assert float(t.abs().max()) < 4.5  # of 12 values
    assert float(found.std(0).max() / chains**0.5) < 0.01


def test_company_and_micro_batches_change_nothing():
    prior = chain()
    sampler = AmortisedSMC(proposal=AmortisedPrior(prior, frozen(network())))
    first = dense()
    problems = [first, Problem(Gaussian(first.likelihood.operator, torch.ones(2, dtype=F64), 0.8))]
    whole = Posterior(problems, prior, dtype=F64).sample(sampler, 30, seed=4)
    for i, problem in enumerate(problems):
        alone = Posterior(problem, prior, dtype=F64, micro_batch=7).sample(sampler, 30, seed=4)
        assert torch.equal(alone.particle_tokens, whole[i].particle_tokens)
        torch.testing.assert_close(alone.log_weights, whole[i].log_weights, rtol=0.0, atol=1e-10)


def test_cost_is_what_is_counted():
    for proposal, passes in ((None, L), (AmortisedPrior(chain(), frozen(network())), 2 * L)):
        p, sampler = Posterior(dense(), chain(), dtype=F64), AmortisedSMC(proposal=proposal)
        solution = p.sample(sampler, 6)
        assert solution.about["evaluations_per_draw"] == sampler.cost_on(p).forward == passes
        assert (p.evaluations.likelihood, p.evaluations.likelihood_grad) == (6 * (L + 2), 0)
        levels = [info.sigma for info in solution.trace]
        assert levels == sorted(levels, reverse=True)
        assert levels[-1] == 0.0
        with pytest.raises(CapabilityError, match="cost_on"):
            sampler.cost()


# What cannot be.


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0}, {"batch": 1}, {"learning_rate": 0.0}, {"temperature": 0.0}, {"kl": -1.0},
        {"gradient": "exact"}, {"through": 0},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(wrong, unchecked):
    with pytest.raises(InputError):
        AmortiseSettings(**wrong)


def test_what_cannot_be_learnt_or_proposed_is_refused():
    p = Posterior(dense(), chain(), dtype=F64)
    with pytest.raises(ShapeError, match="4 tokens of 3 kinds, the network's 5 of 3"):
        AmortisedPrior(chain(), network(L + 1))
    for wrong in ({"defence": 0.0}, {"defence": 1.0}, {"threshold": -0.1}):
        with pytest.raises(InputError):
            AmortisedSMC(**wrong)
    other = AmortisedPrior(short().prior, frozen(network(2, 3)))
    with pytest.raises(ShapeError, match="takes sequences of 2 tokens"):
        p.sample(AmortisedSMC(proposal=other), 4)

    class Foreign:
        def tilt(self, tokens: Tensor) -> Tensor:
            return torch.zeros(len(tokens), L, V + 1)

    with pytest.raises(ShapeError, match="made for another prior"):
        p.sample(AmortisedSMC(proposal=Foreign()), 4)
    one = dense()
    with pytest.raises(InputError, match="holds 2"):
        amortise(Posterior([one, Problem(one.likelihood)], chain(), dtype=F64), settings(steps=1))
    continuous = GaussianPrior(torch.zeros(4, 2, dtype=F64), torch.eye(8, dtype=F64))
    with pytest.raises(CapabilityError, match="not a masked prior"):
        amortise(Posterior(dense(), continuous, dtype=F64), settings(steps=1))
    dead = Problem(Objective(lambda x: x.flatten(1).sum(1) + torch.inf, 1.0, (3, 3)))
    for gradient in ("straight-through", "score"):
        with pytest.raises(InputError, match="zero for all 64 draws"):
            amortise(Posterior(dead, short(3).prior, dtype=F64), settings(steps=1, gradient=gradient))
    with pytest.raises(SamplingError, match="dead"):
        Posterior(dead, short(3).prior, dtype=F64).sample(AmortisedSMC(), 8)


@pytest.mark.parametrize("gradient", ["straight-through", "score"])
def test_sequences_of_likelihood_zero_are_learnt_around(gradient):
    table = torch.full((3, 3), -torch.inf, dtype=F64)
    table[1] = 0.0
    p = Posterior(Problem(Tabulated(table)), short().prior, dtype=F64)
    tilted, _ = amortise(p, settings(steps=40, batch=32, learning_rate=3e-2, gradient=gradient))
    shares = [float((prior.sample(2000, seed=2)[:, 0] == 1).double().mean()) for prior in (p.prior, tilted)]
    assert bool(torch.isfinite(tilted.tilt(torch.full((1, 2), 3))).all())
    if gradient == "score":  # the other one has no slope to learn it by
        assert shares[1] > shares[0] + 0.2
