"""The benchmark on promoters: the reward, and the way to its table."""

import itertools
import json
import lzma
import math

import pytest
import torch

from invdiff.bench import dna
from invdiff.likelihoods import Objective
from invdiff.networks import MaskedTransformer
from invdiff.priors.masked_network import MaskedNetworkPrior

ALPHABET = "ACGT"


def sequence(box: str, start: int) -> torch.Tensor:
    text = "C" * start + box + "C" * (251 - start - len(box))
    return torch.tensor([[ALPHABET.index(a) for a in text]])


def one_hot(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(tokens, 4).double()


def test_the_motif_is_a_law_at_every_position():
    P = dna.motif(ALPHABET)
    torch.testing.assert_close(P.sum(1), torch.ones(8, dtype=torch.float64))
    assert P[0].argmax() == ALPHABET.index("T")
    assert P[4].tolist() == pytest.approx([0.45, 0.05, 0.05, 0.45])


def test_the_reward_is_the_bayes_factor_of_one_box():
    P = dna.motif(ALPHABET)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, (1, 251), generator=generator)
    places = range(*dna.WINDOW)
    factors = [math.prod(4.0 * float(P[j, tokens[0, s + j]]) for j in range(8)) for s in places]
    assert float(dna.reward(one_hot(tokens), P)) == pytest.approx(math.log(sum(factors) / len(factors)))
    assert float(dna.reward(one_hot(sequence("TATATAAG", 170)), P)) > 5.0
    assert float(dna.reward(one_hot(sequence("TATATAAG", 100)), P)) < 0.0


def test_laws_of_nucleotides_give_the_expected_factor():
    P, generator = dna.motif(ALPHABET), torch.Generator().manual_seed(1)
    x = one_hot(sequence("TATATAAG", 165))
    x[0, 168:171] = torch.softmax(torch.randn(3, 4, generator=generator, dtype=torch.float64), 1)
    total = 0.0
    for letters in itertools.product(range(4), repeat=3):
        y, p = x.clone(), 1.0
        for j, a in enumerate(letters):
            p *= float(x[0, 168 + j, a])
            y[0, 168 + j] = torch.eye(4, dtype=torch.float64)[a]
        total += p * float(dna.reward(y, P).exp())
    assert float(dna.reward(x, P)) == pytest.approx(math.log(total))


def test_the_consensus_is_looked_for_in_the_window_alone():
    cases = [("TATAAAAA", 160, True), ("TATATAAG", 175, True), ("TATATAAG", 176, False), ("TATACAAG", 165, False)]
    for box, start, there in cases:
        assert bool(dna.consensus(sequence(box, start), ALPHABET)) is there


def test_a_short_run_writes_its_file_and_table(tmp_path, monkeypatch):
    with torch.random.fork_rng():
        network = MaskedTransformer([251], 4, width=8, depth=1, heads=2)
    prior = MaskedNetworkPrior(network, alphabet=ALPHABET, name="tiny").eval_only()
    likelihood = dna.problem(prior, 0.5).likelihood
    assert isinstance(likelihood, Objective)
    assert float(likelihood.deviance(one_hot(prior.sample(20))).min()) >= 0.0
    monkeypatch.setattr(dna, "load_prior", lambda name: prior)
    monkeypatch.setattr(dna, "MASKS", 2)
    lines = [f"Mouse_tata\t{'ACGT' * 62}AC{a}" for a in "ACGT"] + [f"Mouse_nonprom\t{'A' * 251}"]
    (tmp_path / "promoters.tsv.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    monkeypatch.setattr(dna, "part_of", lambda s: "test")
    out, page = tmp_path / "out.json", tmp_path / "table.md"
    dna.main(["--data", str(tmp_path), "--out", str(out), "--table", str(page), "--quick", "--draws", "3"])
    rows = json.loads(out.read_text())["rows"]
    assert [r["sampler"] for r in rows] == ["held-out promoters", "prior", "TwistedSMC", "APS"]
    assert rows[0]["sequences"] == 3
    assert rows[2]["reward"][0] > rows[1]["reward"][0]
    assert rows[2]["evaluations"] == 251.0
    assert "| 1 | APS | 4 |" in page.read_text()
