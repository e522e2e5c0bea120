"""Exact masked priors against plain enumeration, parallel unmasking and its count, and their exact posteriors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from invdiff.draws import categorical
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.likelihoods import BinarySymmetric, Gaussian
from invdiff.noise import Noise
from invdiff.operators import Parity, Reshape, Scale
from invdiff.priors import IsingPrior, MarkovChainPrior, MaskedPrior, PottsPrior, ProductMixturePrior
from invdiff.priors.unmasking import expected_evaluations, unmask
from invdiff.testing import check_operator

F64 = torch.float64


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def normalised(*shape: int, seed: int = 0) -> Tensor:
    p = uniform(*shape, seed=seed) + 0.05
    return p / p.sum(-1, keepdim=True)


INITIAL, P = normalised(3, seed=1), normalised(3, 3, seed=2)
WEIGHTS, THETA = normalised(2, seed=3), normalised(2, 4, 3, seed=4)
FIELD = uniform(2, 3, seed=5)
COLOURS = uniform(3, seed=6)


def chain() -> MarkovChainPrior:
    return MarkovChainPrior(INITIAL, P, 4)


def mixture() -> ProductMixturePrior:
    return ProductMixturePrior(WEIGHTS, THETA)


def ising() -> IsingPrior:
    return IsingPrior((2, 3), 0.7, FIELD)


def potts() -> PottsPrior:
    return PottsPrior((3, 2), 3, 0.8, COLOURS)


def neighbours(h: int, w: int) -> list[tuple[int, int]]:
    down = [(r * w + c, (r + 1) * w + c) for r in range(h - 1) for c in range(w)]
    return down + [(r * w + c, r * w + c + 1) for r in range(h) for c in range(w - 1)]


def chain_weight(x) -> float:
    return float(INITIAL[x[0]]) * math.prod(float(P[a, b]) for a, b in itertools.pairwise(x))


def mixture_weight(x) -> float:
    return sum(float(WEIGHTS[k]) * math.prod(float(THETA[k, i, v]) for i, v in enumerate(x)) for k in range(2))


def ising_weight(x) -> float:
    s = [2 * v - 1 for v in x]
    energy = 0.7 * sum(s[i] * s[j] for i, j in neighbours(2, 3))
    return math.exp(energy + sum(float(h) * v for h, v in zip(FIELD.flatten(), s, strict=True)))


def potts_weight(x) -> float:
    return math.exp(0.8 * sum(x[i] == x[j] for i, j in neighbours(3, 2)) + sum(float(COLOURS[v]) for v in x))


CASES = {
    "chain": (chain, chain_weight),
    "mixture": (mixture, mixture_weight),
    "ising": (ising, ising_weight),
    "potts": (potts, potts_weight),
}
every = pytest.mark.parametrize("name", CASES)


def law(name: str) -> tuple[object, Tensor, Tensor]:
    """Prior, all sequences, and their probabilities by the formula written out."""
    make, weight = CASES[name]
    prior = make()
    states = torch.tensor(list(itertools.product(range(prior.vocabulary_size), repeat=prior.length)))
    p = torch.tensor([weight(x) for x in states.tolist()], dtype=F64)
    return prior, states, p / p.sum()


@every
def test_probabilities_are_those_of_the_formula(name):
    prior, states, p = law(name)
    assert isinstance(prior, MaskedPrior)
    torch.testing.assert_close(prior.log_prob(states).exp(), p, rtol=1e-12, atol=1e-15)


@every
def test_conditionals_are_those_of_enumeration_at_any_masking(name):
    prior, states, p = law(name)
    V, L = prior.vocabulary_size, prior.length
    generator = torch.Generator().manual_seed(7)
    tokens = states[torch.randint(len(states), (60,), generator=generator)]
    hidden = torch.rand(60, L, generator=generator) < torch.linspace(0, 1, 60)[:, None]
    tokens = torch.where(hidden, prior.mask_token, tokens)
    found = prior.log_probs(tokens).exp()
    for row, mine in zip(tokens, found, strict=True):
        fits = ((states == row) | (row == prior.mask_token)).all(1)
        q = p[fits] / p[fits].sum()
        expected = torch.stack([(q[:, None] * (states[fits] == v)).sum(0) for v in range(V)], dim=1)
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-13)
    known = tokens != prior.mask_token
    assert torch.equal(found[known], torch.nn.functional.one_hot(tokens[known], V).double())


@every
def test_complete_sequences_and_none_at_all_have_conditionals(name):
    prior, states, _ = law(name)
    V = prior.vocabulary_size
    certain = torch.nn.functional.one_hot(states[:5], V).double().log()
    assert torch.equal(prior.log_probs(states[:5]), certain)
    assert prior.log_probs(states[:0]).shape == (0, prior.length, V)


@every
@pytest.mark.parametrize("steps", [None, 400])
def test_draws_have_the_law(name, steps):
    """Chi-square of all sequences; with many steps few tokens share one, each pair with probability 1 / 400."""
    prior, states, p = law(name)
    n = 4000 if steps is None else 1500
    draws = prior.sample(n, seed=3, steps=steps)
    index = (draws * prior.vocabulary_size ** torch.arange(prior.length - 1, -1, -1)).sum(1)
    counts = torch.bincount(index, minlength=len(states)).double()
    chi, freedom = float(((counts - n * p) ** 2 / (n * p)).sum()), len(states) - 1
    # The statistic's variance is 2 (states - 1) + sum 1 / (n p), large where sequences are rare.
    assert abs(chi - freedom) < 4.5 * math.sqrt(2 * freedom + float((1.0 / (n * p)).sum()))
    assert torch.equal(prior.sample(10, seed=3, steps=steps), draws[:10])
    assert not torch.equal(prior.sample(40, seed=4, steps=steps), draws[:40])


def test_a_long_chain_is_a_bridge_between_what_is_known():
    prior = MarkovChainPrior(INITIAL, P, 800)
    tokens = torch.full((1, 800), prior.mask_token)
    tokens[0, 0], tokens[0, 799] = 2, 1
    power = torch.linalg.matrix_power
    found = prior.log_probs(tokens)[0].exp()
    for i in (1, 400, 797):
        bridge = power(P, i)[2] * power(P, 799 - i)[:, 1]
        torch.testing.assert_close(found[i], bridge / bridge.sum(), rtol=1e-10, atol=1e-12)


def test_bits_are_fair_and_independent():
    prior = ProductMixturePrior.uniform(12, 2)
    tokens = torch.where(torch.arange(12) % 3 > 0, 2, 1)[None]
    found = prior.log_probs(tokens)[0].exp()
    assert torch.allclose(found[tokens[0] == 2], torch.tensor(0.5, dtype=F64))
    assert float(prior.log_prob(torch.zeros(1, 12, dtype=torch.int64))) == pytest.approx(-12 * math.log(2))


# Parallel unmasking.


class Counting:
    """Another prior, counting the sequences that it is asked about."""

    def __init__(self, prior) -> None:
        self.prior, self.asked = prior, []
        self.shape, self.mask_token = prior.shape, prior.mask_token

    def log_probs(self, tokens: Tensor) -> Tensor:
        self.asked.append(tokens.clone())
        return self.prior.log_probs(tokens)


@pytest.mark.parametrize("steps", [1, 3, 8, 30])
def test_only_sequences_that_changed_are_evaluated_and_their_number_follows_the_formula(steps, unchecked):
    n, length = 3000, 8
    prior = Counting(MarkovChainPrior(INITIAL, P, length))
    found = unmask(prior, Noise([5], n, dtype=F64), steps)
    assert sum(len(t) for t in prior.asked) == int(found.evaluations.sum())
    assert len(prior.asked) <= steps
    expected = steps * (1.0 - (1.0 - 1.0 / steps) ** length)
    assert expected_evaluations(steps, length) == pytest.approx(expected)
    spread = float(found.evaluations.double().std())
    assert abs(float(found.evaluations.double().mean()) - expected) <= 4.5 * spread / math.sqrt(n) + 1e-12
    assert int(found.evaluations.max()) <= min(steps, length)
    assert int(found.evaluations.min()) >= 1
    # A sequence that is asked about again has another known token since.
    assert all(bool((t == prior.mask_token).any()) for t in prior.asked)


def test_tokens_of_one_step_are_independent_of_each_other():
    prior, states, p = law("chain")
    n = 4000
    draws = prior.sample(n, seed=1, steps=1)
    marginals = torch.stack([torch.stack([p[states[:, i] == v].sum() for v in range(3)]) for i in range(2)])
    pair = torch.stack([((draws[:, 0] == a) & (draws[:, 1] == b)).double().mean() for a in range(3) for b in range(3)])
    product = torch.outer(marginals[0], marginals[1]).flatten()
    assert float(((pair - product).abs() / (product * (1 - product) / n).sqrt()).max()) < 4.5
    true = torch.stack([p[(states[:, 0] == a) & (states[:, 1] == b)].sum() for a in range(3) for b in range(3)])
    assert float((true - product).abs().max()) > 0.03


def test_a_categorical_draw_takes_what_has_weight():
    log_p = torch.tensor([-torch.inf, math.log(0.25), -torch.inf, math.log(0.75), -torch.inf], dtype=F64)
    u = torch.tensor([0.0, 0.2499, 0.2501, 1.0 - 2.0**-53], dtype=F64)
    assert categorical(log_p, u).tolist() == [1, 1, 3, 3]
    thirds = torch.full((7,), -5.0, dtype=F64)
    assert categorical(thirds, torch.tensor(1.0 - 2.0**-53, dtype=F64)).item() == 6


# Posteriors.


def test_a_mixture_with_noise_on_each_token_stays_one():
    """w'_k ~ w_k prod_i sum_v theta_ki(v) l_i(v), in closed form."""
    levels = torch.tensor([[-1.0], [0.2], [1.0]], dtype=F64)
    prior = ProductMixturePrior(WEIGHTS, THETA, codebook=levels)
    y = torch.tensor([[0.3], [-0.8], [1.1], [0.0]], dtype=F64)
    exact = prior.posterior(Gaussian(Scale((4, 1)), y, 0.6))
    noise = torch.distributions.Normal(levels[:, 0], 0.6).log_prob(y).exp()  # (position, token)
    tilted = THETA * noise
    w = WEIGHTS * tilted.sum(2).prod(1)
    assert exact.log_evidence == pytest.approx(float(w.sum().log()), rel=1e-12)
    marginals = torch.einsum("k,kiv->iv", w / w.sum(), tilted / tilted.sum(2, keepdim=True))
    torch.testing.assert_close(exact.marginals, marginals, rtol=1e-11, atol=1e-13)
    n = 4000
    draws = exact.sample(n, seed=2)
    found = torch.stack([(draws == v).double().mean(0) for v in range(3)], dim=1)
    assert float(((found - marginals).abs() / (marginals * (1 - marginals) / n).sqrt()).max()) < 4.5
    assert torch.equal(exact.states[exact.index(draws)], draws)


def test_noiseless_checks_leave_a_coset():
    """Two independent checks of four bits: a quarter of the sequences, all as probable."""
    prior = ProductMixturePrior.uniform(4, 2, codebook=torch.tensor([[0.0], [1.0]]), detokeniser=Reshape((4, 1), (4,)))
    A = Parity(torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]))
    exact = prior.posterior(BinarySymmetric(A, torch.tensor([1.0, 0.0]), 0.0))
    alive = exact.log_probs > -torch.inf
    assert int(alive.sum()) == 4
    assert torch.allclose(exact.log_probs[alive].exp(), torch.tensor(0.25, dtype=F64))
    s = exact.states[alive]
    assert bool(((s[:, 0] ^ s[:, 1]) == 1).all())
    assert bool(((s[:, 1] ^ s[:, 2] ^ s[:, 3]) == 0).all())
    assert exact.log_evidence == pytest.approx(math.log(0.25))


def test_parity_of_means_is_the_probability_of_odd():
    A = Parity(torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 1]]))
    m = uniform(2, 4, seed=9)
    for row, found in zip(m, A(m), strict=True):
        expected = torch.zeros(3, dtype=F64)
        for bits in itertools.product((0, 1), repeat=4):
            p = math.prod(float(q) if b else 1.0 - float(q) for b, q in zip(bits, row, strict=True))
            expected += p * (A.checks.double() @ torch.tensor(bits, dtype=F64)).remainder(2.0)
        torch.testing.assert_close(found, expected)
    check_operator(A)
    check_operator(Reshape((4, 1), (2, 2)))


def test_flipped_bits_have_probabilities_that_sum_to_one():
    A = Parity(torch.tensor([[1, 1, 0], [0, 1, 1]]))
    x = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.6, 0.9]], dtype=F64)
    ys = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)), dtype=F64)
    parts = [BinarySymmetric(A, y, 0.2) for y in ys]
    total = torch.stack([p.log_prob(x).exp() for p in parts]).sum(0)
    torch.testing.assert_close(total, torch.ones(2, dtype=F64))
    assert float(parts[2].log_prob(x[:1])) == pytest.approx(2 * math.log(0.8))
    assert float(parts[2].deviance(x[:1])) == pytest.approx(0.0, abs=1e-12)
    assert float(parts[3].deviance(x[:1])) == pytest.approx(2 * math.log(4.0))
    both = BinarySymmetric.stack(parts[:2])
    rows = both.rows(torch.tensor([1, 0]))
    torch.testing.assert_close(rows.log_prob(x), torch.stack([parts[1].log_prob(x)[0], parts[0].log_prob(x)[1]]))


# The way out, keys and errors.


def test_tokens_decode_through_codebook_and_detokeniser():
    tokens = torch.tensor([[0, 1, 1, 0, 1, 0]])
    expected = torch.tensor([[-1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]], dtype=F64)
    assert torch.equal(ising().decode(tokens)[0, 0], expected)
    assert [v.shape for v in ising().event] == [(1, 2, 3)]
    assert torch.equal(chain().decode(torch.tensor([[2, 0, 1, 2]]))[0], torch.eye(3, dtype=F64)[[2, 0, 1, 2]])


def test_a_key_knows_every_table():
    keys = {
        p.key
        for p in (
            chain(),
            MarkovChainPrior(INITIAL, P, 5),
            MarkovChainPrior(INITIAL, P.flip(0), 4),
            MarkovChainPrior(INITIAL, P, 4, codebook=uniform(3, 2)),
            mixture(),
            ising(),
            IsingPrior((2, 3), 0.6, FIELD),
            potts(),
        )
    }
    assert len(keys) == 8
    assert chain().key == chain().key


def test_bad_tokens_are_refused():
    prior = chain()
    for ask in (prior.log_probs, prior.decode, prior.log_prob):
        with pytest.raises(ShapeError, match="4 tokens"):
            ask(torch.zeros(2, 5, dtype=torch.int64))
        for wrong in (4, -1):
            with pytest.raises(InputError, match=r"lie in \[0, "):
                ask(torch.tensor([[0, 1, wrong, 0]]))
    with pytest.raises(InputError, match=r"lie in \[0, 2\]"):
        prior.decode(torch.tensor([[0, 1, prior.mask_token, 0]]))
    stuck = MarkovChainPrior(torch.tensor([1.0, 0.0]), torch.eye(2), 3)
    with pytest.raises(InputError, match="probability zero"):
        stuck.log_probs(torch.tensor([[0, 2, 1]]))
    torch.testing.assert_close(stuck.log_probs(torch.tensor([[2, 0, 2]])).exp()[0, :, 0], torch.ones(3, dtype=F64))


def test_tokens_that_are_no_integers_are_refused(unchecked):
    with pytest.raises(InputError, match="int64"):
        chain().log_probs(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: MarkovChainPrior(INITIAL, P[:2], 4), ShapeError, "transition"),
        (lambda: MarkovChainPrior(2 * INITIAL, P, 4), InputError, "sums of 1"),
        (lambda: MarkovChainPrior(INITIAL, P, 0), InputError, "token at least"),
        (lambda: MarkovChainPrior(INITIAL, P, 4, codebook=uniform(2, 2)), ShapeError, "codebook"),
        (lambda: MarkovChainPrior(INITIAL, P, 4, detokeniser=Scale((4, 2))), ShapeError, "detokeniser"),
        (lambda: ProductMixturePrior(WEIGHTS, THETA[:1]), ShapeError, "components"),
        (lambda: ProductMixturePrior(WEIGHTS, -THETA), InputError, "not negative"),
        (lambda: IsingPrior((4, 11), 0.4), CapabilityError, "2048 states"),
        (lambda: IsingPrior((2, 2), float("inf")), InputError, "finite"),
        (lambda: IsingPrior((2, 2), 0.1, uniform(3, 2)), ShapeError, "field"),
        (lambda: PottsPrior((2, 2), 3, 0.1, uniform(2)), ShapeError, "field"),
        (lambda: Reshape((3,), (2, 2)), ShapeError, "equally many"),
        (lambda: Parity(torch.tensor([[1, 2]])), InputError, "0 and 1"),
        (lambda: Parity(torch.tensor([[0, 0]])), InputError, "at least"),
        (lambda: Parity(torch.tensor([[0, 1]]), (3,)), ShapeError, "2 bits"),
        (lambda: BinarySymmetric(Parity(torch.ones(1, 2)), torch.tensor([0.5]), 0.1), InputError, "0 or 1"),
        (lambda: BinarySymmetric(Parity(torch.ones(1, 2)), torch.tensor([1.0]), 0.5), InputError, "flip"),
        (lambda: chain().sample(2, steps=0), InputError, "one step"),
    ],
)
def test_what_makes_no_prior_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_posteriors_that_cannot_be_are_refused():
    long = MarkovChainPrior(INITIAL, P, 13)
    with pytest.raises(CapabilityError, match=r"3\^13"):
        long.posterior(Gaussian(Scale((13, 3)), torch.zeros(13, 3), 1.0))
    several = Gaussian(Scale((4, 3)), torch.zeros(2, 4, 3), 1.0)
    with pytest.raises(InputError, match="holds 2"):
        chain().posterior(several)
    bits = ProductMixturePrior.uniform(2, 2, codebook=torch.tensor([[0.0], [1.0]]), detokeniser=Reshape((2, 1), (2,)))
    never = Parity(torch.tensor([[1, 1], [1, 1]]))
    with pytest.raises(InputError, match="zero for every sequence"):
        bits.posterior(BinarySymmetric(never, torch.tensor([0.0, 1.0]), 0.0))
