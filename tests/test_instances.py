"""Problems that hold one measurement and bring an exact prior: the named ones, by name alone, and clear errors."""

import pytest
import torch

import invdiff
from invdiff import CatalogueError, InputError, ShapeError, cards, load_prior, load_problem, operators
from invdiff.cli import main
from invdiff.diagnostics.discrete import PROBLEMS, named
from invdiff.operators.base import fingerprint
from invdiff.testing import check_operator

# What the figures on the page "Tokens" were measured on: fingerprint of the likelihood, key of the prior, log p(y).
MEASURED = {
    "chain-8": ("6e678d947937033b", "4c3021663c013314", -6.610922362491925),
    "ising-4x4": ("3d0d10f69bc6f9d7", "bc82ffcf1082e5c0", -2.5010545079077815),
    "product-mixture-tokens": ("3c7fecf9eeaa1450", "ad1e6e9ac4da2e8f", -9.469388899407706),
    "product-mixture-sums": ("2d705712306a31fa", "d1d596394baf29c6", -4.371475559922196),
    "parity-8": ("efe6f264bd51466c", "5d23b5e5a69f71bd", -5.545177444479561),
    "parity-12": ("6321c5adc8be5dd5", "5d23b5e5a69f71bd", -7.681460612534735),
}

CARD = """
name = "mine"
version = 1
title = "t"
description = "d"
measurement = [1.0, 0.0]
truth = [0.0, 1.0, 1.0]
[prior]
type = "ProductMixture"
weights = [1.0]
probabilities = [[[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]]]
codebook = [[0.0], [1.0]]
shape = [3]
[operator]
type = "Parity"
checks = [[0, 1], [1, 2]]
[noise]
type = "flips"
probability = 0.1
"""


@pytest.fixture
def written(tmp_path):
    def write(*change):
        assert not change or change[0] in CARD
        path = tmp_path / "mine.toml"
        path.write_text(CARD.replace(*change) if change else CARD)
        return path

    return write


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_named_problem_is_the_one_that_was_measured(name):
    case = named(name)
    likelihood, key, log_evidence = MEASURED[name]
    assert fingerprint(case.problem.likelihood)[:16] == likelihood
    assert case.prior.key[:16] == key
    assert case.exact.log_evidence == pytest.approx(log_evidence, abs=1e-9)
    assert case.problem.card["name"] == name
    # The truth is a sequence of the prior.
    codes = case.prior.decode(case.prior.sample(64, seed=3)).unique()
    assert bool(torch.isin(case.problem.reference, codes).all())


def test_two_names_are_enough():
    solution = invdiff.solve("parity-8", "parity-8", draws=500, seed=0)
    case = named("parity-8")
    # 500 draws leave a marginal TV of about `floor`; a prior's draws are far off.
    found = torch.stack([(solution.tokens[0] == v).double().mean(0) for v in range(2)], 1)
    assert float(0.5 * (found - case.exact.marginals).abs().sum(1).mean()) < 3 * case.floor(500)
    assert solution.log_evidence == pytest.approx(case.exact.log_evidence, abs=0.5)


def test_a_card_of_ones_own(written):
    path = written()
    problem, prior = load_problem(path), load_prior(path)
    assert problem.name == "mine"
    assert problem.likelihood.operator(torch.tensor([[0.0, 1.0, 1.0]])).tolist() == [[1.0, 0.0]]
    assert prior.log_prob(torch.tensor([[0, 1, 1]])).exp() == pytest.approx(0.2)
    assert load_problem(path, noise__probability=0.2).likelihood.flip == 0.2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("[1.0, 0.0]\ntruth", "[1.0]\ntruth"), ShapeError, "a measurement of 2 values and a truth of 3, got 1 and 3"),
        (("[0.0, 1.0, 1.0]", "[0.0]"), ShapeError, "got 2 and 1"),
        (("[1, 2]]\n[noise]", "[1, 3]]\n[noise]"), ShapeError, "bit 3, and there are 3, counted from 0"),
        (("0.1", "0.5"), InputError, "noise.probability: .* less than 0.5"),
        (('"flips"', '"loud"'), InputError, "noise: .*'loud'"),
        (('"ProductMixture"', '"Mixture"'), InputError, "prior: .*'Mixture'"),
        (("weights", "weight"), InputError, r"prior\.weights: field required; prior\.weight: is not a field"),
        (('"Parity"\nchecks = [[0, 1], [1, 2]]', '"Downsampling"\nfactor = 2'), ShapeError, "takes pictures"),
        (("shape = [3]", "shape = [4]"), ShapeError, "3"),
    ],
)
def test_cards_that_do_not_fit_say_what_is_wrong(written, change, error, message):
    with pytest.raises(error, match=message):
        load_problem(written(*change))


def test_one_measurement_has_no_other_index():
    with pytest.raises(InputError, match="chain-8 is one measurement, number 0; got 1"):
        load_problem("chain-8", 1)


def test_a_problem_without_a_prior_names_the_trained_ones():
    with pytest.raises(CatalogueError, match=r"gaussian-deblur is a problem without a prior of its own; .*photos-64"):
        load_prior("gaussian-deblur")


def test_names_of_trained_priors_come_first():
    assert not set(cards.names("priors")) & set(cards.names("problems")), "load_prior could mean either"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chain-8", "--prior", "photos-64"], "chain-8 is no problem of pictures"),
        (["gaussian-deblur", "--prior", "chain-8"], "The prior of chain-8 is one of tokens"),
    ],
)
def test_the_command_line_says_where_they_are_solved(arguments, message, tmp_path, capsys):
    assert main(["solve", *arguments, "--out", str(tmp_path / "out.nc")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_dense():
    A = operators.Dense(torch.arange(12.0).reshape(2, 6), (2, 3))
    x = torch.ones(1, 2, 3)
    assert A(x).tolist() == [[15.0, 51.0]]
    check_operator(A)
    with pytest.raises(ShapeError, match=r"shape \(2, 2\) need a matrix of 4 columns, got 6"):
        operators.Dense(torch.ones(2, 6), (2, 2))
