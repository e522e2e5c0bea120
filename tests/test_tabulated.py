"""A likelihood that is a table, and the benchmark on protein variants that is made of it."""

import hashlib
import itertools
import json
import lzma
import math
import os
from pathlib import Path

import pytest
import torch

from invdiff.bench import gb1
from invdiff.errors import CapabilityError, CatalogueError, InputError, ShapeError
from invdiff.images.data_sets import load_data_card
from invdiff.likelihoods import Tabulated
from invdiff.posterior import Posterior
from invdiff.priors import ProductMixturePrior
from invdiff.problem import Problem
from invdiff.samplers import AnchoredSMC, MaskedGibbs, TwistedSMC

F64 = torch.float64
V, L = 4, 3


def table() -> torch.Tensor:
    values = torch.randn(V, V, V, generator=torch.Generator().manual_seed(0), dtype=F64)
    values[0, 1] = -torch.inf
    return values


def test_one_hot_vectors_look_the_table_up():
    t = table()
    tokens = torch.cartesian_prod(*[torch.arange(V)] * L)
    x = torch.nn.functional.one_hot(tokens, V).double()
    torch.testing.assert_close(Tabulated(t).log_prob(x), t.flatten())
    assert float(Tabulated(t).deviance(x).min()) == 0.0
    assert torch.equal(torch.isinf(Tabulated(t).deviance(x)), torch.isinf(t.flatten()))


def test_laws_give_the_expectation_under_independent_tokens_and_its_gradient():
    t = table()
    x = torch.softmax(torch.randn(5, L, V, generator=torch.Generator().manual_seed(1), dtype=F64), -1)
    expected = torch.einsum("na,nb,nc,abc->n", x[:, 0], x[:, 1], x[:, 2], t.exp()).log()
    likelihood = Tabulated(t)
    torch.testing.assert_close(likelihood.log_prob(x), expected)
    assert torch.autograd.gradcheck(likelihood.log_prob, (x.requires_grad_(),))
    one_hot = torch.nn.functional.one_hot(torch.zeros(2, L, dtype=torch.int64), V).double()
    value, grad = likelihood.log_prob_and_grad(one_hot)
    torch.testing.assert_close(value, t[0, 0, 0].expand(2))
    torch.testing.assert_close(grad[0, 0], (t[:, 0, 0] - t[0, 0, 0]).exp())


def test_rows_in_parts_are_rows_together(monkeypatch):
    x = torch.softmax(torch.randn(7, L, V, generator=torch.Generator().manual_seed(1), dtype=F64), -1)
    whole = Tabulated(table()).log_prob(x)
    monkeypatch.setattr("invdiff.likelihoods.tabulated._CHUNK", 2 * V**2)
    torch.testing.assert_close(Tabulated(table()).log_prob(x), whole)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_what_is_improbable_is_not_impossible(dtype):
    t = torch.tensor([[0.0, -120.0], [-2000.0, -torch.inf]], dtype=F64)  # exp of the second is no float32, the third no
    tokens = torch.cartesian_prod(torch.arange(2), torch.arange(2))  # float64
    x = torch.nn.functional.one_hot(tokens, 2).to(dtype)
    assert Tabulated(t).log_prob(x).tolist() == t.flatten().tolist()
    laws = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]]], dtype=dtype)
    value, grad = Tabulated(t).log_prob_and_grad(laws)
    assert value.dtype == grad.dtype == dtype
    assert value.tolist() == pytest.approx([-120.0, math.log(0.5)], rel=1e-6)
    assert bool(torch.isfinite(grad[1]).all())


def test_vectors_of_other_sequences_are_refused():
    for wrong in (torch.zeros(2, L + 1, V), torch.zeros(2, L, V - 1), torch.zeros(L, V)):
        with pytest.raises(ShapeError, match=r"\(n, 3, 4\)"):
            Tabulated(table()).log_prob(wrong)


def test_tables_that_are_none():
    for wrong in (
        torch.zeros(3, 4), torch.zeros(()), torch.full((2, 2), -torch.inf), torch.tensor([0.0, torch.nan]),
        torch.tensor([0.0, torch.inf]),
    ):  # fmt: skip
        with pytest.raises(InputError):
            Tabulated(wrong)
    with pytest.raises(CapabilityError, match="one by one"):
        Tabulated.stack([Tabulated(table()), Tabulated(table())])


@pytest.mark.parametrize("sampler", [TwistedSMC(lookahead=False), AnchoredSMC(inner_steps=5), MaskedGibbs(steps=60)])
def test_draws_are_those_of_the_tilted_law(sampler):
    theta = torch.softmax(torch.randn(1, L, V, generator=torch.Generator().manual_seed(2), dtype=F64), -1)
    prior = ProductMixturePrior(torch.ones(1, dtype=F64), theta)
    problem = Problem(Tabulated(table()))
    exact = prior.posterior(problem.likelihood)
    n = 4000
    solution = Posterior(problem, prior, dtype=F64).sample(sampler, n, seed=3)
    counts = torch.bincount(exact.index(solution.tokens[0]), minlength=V**L).double()
    assert float(counts[exact.log_probs.isneginf()].sum()) == 0.0
    p = exact.log_probs.exp()
    least = min((i.ess for i in solution.trace if i.ess is not None), default=1.0)
    tv = 0.5 * float((counts / n - p).abs().sum())
    assert tv < 1.5 * float((p * (1 - p) / (2 * math.pi * n * least)).sqrt().sum())
    if isinstance(sampler, TwistedSMC):  # the plugged-in mean is exact for independent tokens: no weight moves
        assert least == pytest.approx(1.0)
        assert solution.log_evidence == pytest.approx(exact.log_evidence, abs=1e-9)


# The benchmark.


def write_variants(folder, variants):
    text = "".join(f"{v},{f}\n" for v, f in variants)
    (folder / gb1.FILE).write_bytes(lzma.compress(text.encode()))


def test_frequencies_of_amino_acids_are_those_of_the_codons():
    bases, code = "TCAG", "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"  # NCBI's table 1
    codons = {a + b + c: code[16 * i + 4 * j + k] for i, a in enumerate(bases) for j, b in enumerate(bases)
              for k, c in enumerate(bases)}  # fmt: skip
    library = [amino for codon, amino in codons.items() if codon[2] in "GT" and amino != "*"]
    assert len(library) == 31
    expected = [library.count(a) / 31 for a in gb1.ALPHABET]
    torch.testing.assert_close(gb1.nnk(), torch.tensor(expected, dtype=F64))


def test_the_divergence_of_the_best_variants():
    generator = torch.Generator().manual_seed(4)
    fitness = torch.rand(20, 20, 20, 20, generator=generator, dtype=F64)
    fitness[1, 2, 3, 4] = torch.nan
    problem = gb1.case(fitness, 0.05)
    assert float(problem.exact.log_probs[problem.exact.index(torch.tensor([[1, 2, 3, 4]]))]) == -math.inf
    n = 20_000
    draws = problem.exact.sample(n, seed=5)
    assert gb1.top_kl(draws, problem.exact) < 2.0 * gb1.TOP / (2.0 * n)
    best = problem.exact.states[problem.exact.log_probs.argmax()].expand(50, 4)
    assert gb1.top_kl(best, problem.exact) == pytest.approx(-float(problem.exact.log_probs.max()))


def test_a_short_run_writes_its_file_and_table(tmp_path, monkeypatch):
    write_variants(tmp_path, [("AAAA", 1.0), ("ACDE", 2.5), ("WWWW", 0.1), ("YYYY", 0.0)])
    fitness = gb1.read_fitness(tmp_path)
    assert int((~fitness.isnan()).sum()) == 4
    assert float(fitness[0, 1, 2, 3]) == 2.5
    monkeypatch.setattr(gb1, "TEMPERATURES", (1.0,))
    monkeypatch.setattr(gb1, "TOP", 3)
    out, page = tmp_path / "out.json", tmp_path / "table.md"
    gb1.main(["--data", str(tmp_path), "--out", str(out), "--table", str(page), "--quick"])
    report = json.loads(out.read_text())
    assert [r["sampler"] for r in report["rows"]][:3] == ["prior", "exact draws", "TwistedSMC, no lookahead"]
    assert report["rows"][2]["evidence_deviation"] < 1e-6
    assert "Failed: APS. None of the 20 draws" in page.read_text()  # of 160 000 variants four are possible
    write_variants(tmp_path, [("".join(v), 0.1 * i) for i, v in enumerate(itertools.product("ACDEGLRSTV", repeat=4))])
    gb1.main(["--data", str(tmp_path), "--out", str(out), "--table", str(page), "--quick"])
    rows = json.loads(out.read_text())["rows"]
    assert [r["impossible"] > 0.0 for r in rows] == [True, False, False, True, False]  # the prior and APS
    assert "| APS | 2 |" in page.read_text()


def test_draws_that_were_never_measured_are_counted():
    fitness = torch.full((20,) * 4, 2.0, dtype=F64)
    fitness[0, 0, 0, 0] = torch.nan
    problem = gb1.case(fitness, 1.0)
    z = torch.tensor([[[0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0], [3, 0, 0, 0]]])
    found = gb1.row("four", problem, z, fitness)
    assert (found["impossible"], found["fitness"]) == (0.25, 1.5)


DATA = os.environ.get("INVDIFF_DATA", "")


@pytest.mark.skipif(
    not DATA or not (Path(DATA) / gb1.FILE).is_file(), reason=f"INVDIFF_DATA names no folder with {gb1.FILE}"
)
def test_the_landscape_is_that_of_the_card():
    card = load_data_card("gb1")
    (file,) = card.files
    assert hashlib.sha256((Path(DATA) / file.name).read_bytes()).hexdigest() == file.sha256
    fitness = gb1.read_fitness(Path(DATA))
    assert int((~fitness.isnan()).sum()) == file.count == 149_361
    wild = [gb1.ALPHABET.index(a) for a in "VDGV"]  # V39, D40, G41, V54
    assert float(fitness[tuple(wild)]) == 1.0
    assert float(fitness.nan_to_num().min()) == 0.0
    case = gb1.case(fitness, 0.5)
    p = case.exact.log_probs.exp()
    assert float(p.sum()) == pytest.approx(1.0)
    assert float(p[fitness.flatten().isnan()].sum()) == 0.0
    prior = gb1.nnk().log()[case.exact.states].sum(1)
    tilted = torch.where(fitness.flatten().isnan(), -torch.inf, prior + fitness.flatten() / 0.5)
    torch.testing.assert_close(case.exact.log_probs, tilted.log_softmax(0))


def test_files_that_are_not_what_they_should_be(tmp_path):
    with pytest.raises(CatalogueError, match="--data"):
        gb1.read_fitness(tmp_path)
    for text in ("AAAA,1.0,3\n", "AAAB,1.0\n", "AAAA,high\n"):
        (tmp_path / gb1.FILE).write_bytes(lzma.compress(text.encode()))
        with pytest.raises(InputError, match="damaged"):
            gb1.read_fitness(tmp_path)
    (tmp_path / gb1.FILE).write_bytes(lzma.compress(b"AAA,1.0\n"))
    with pytest.raises(InputError, match="other lengths"):
        gb1.read_fitness(tmp_path)
