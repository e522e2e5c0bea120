"""The benchmark of infilling: its exact answers against sums over all sequences, and a short run."""

import itertools
import json

import pytest
import torch

from invdiff.bench import infill
from invdiff.errors import InputError

V = len(infill.ALPHABET)
TEXT = "To be, or not to be: that is the question. Whether it is nobler in the mind to suffer? " * 20


def test_a_text_becomes_letters_and_single_spaces():
    found = infill.symbols("Ab,  c\n-- D9e")
    assert "".join(infill.ALPHABET[t] for t in found.tolist()) == "ab c d e"


def test_the_chain_has_the_pairs_of_the_text():
    prior = infill.bigrams(infill.symbols("abababac"), 3)
    a, b, c = (infill.ALPHABET.index(s) for s in "abc")
    s = infill.SMOOTHING
    assert float(prior.transition[a, b]) == pytest.approx((3 + s) / (4 + V * s))
    assert float(prior.transition[a, c]) == pytest.approx((1 + s) / (4 + V * s))
    assert float(prior.log_initial.exp()[a]) == pytest.approx((4 + s) / (8 + V * s))


def test_symbols_are_given_read_and_lost_in_the_shares_that_are_claimed():
    truth = infill.symbols(TEXT)[:1000]
    given, read = infill.damaged(truth, 0)
    assert int((given < V).sum()) == 200
    assert int((read < V).sum()) == 400
    assert not bool(((given < V) & (read < V)).any())
    assert bool((given == truth)[given < V].all())
    wrong = float((read != truth)[read < V].double().mean())
    assert abs(wrong - infill.ERROR_RATE) < 4.0 * (0.2 * 0.8 / 400) ** 0.5


def test_the_exact_answer_is_the_sum_over_all_sequences():
    prior = infill.bigrams(infill.symbols(TEXT), 3)
    given, read = torch.tensor([V, V, 4]), torch.tensor([19, V, V])
    marginals, log_evidence = infill.exact(prior, given, read)
    z = torch.tensor(list(itertools.product(range(V), repeat=3)))
    p = torch.where(z[:, 2] == 4, prior.log_prob(z).exp(), 0.0)
    e = infill.ERROR_RATE
    joint = p * torch.where(z[:, 0] == 19, torch.tensor(1.0 - e, dtype=p.dtype), e / (V - 1))
    expected = torch.stack([torch.bincount(z[:, i], joint, V) for i in range(3)]) / joint.sum()
    assert torch.allclose(marginals, expected, atol=1e-12)
    assert log_evidence == pytest.approx(float((joint.sum() / p.sum()).log()), abs=1e-12)


def test_a_short_run_writes_its_file_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(infill, "LENGTH", 12)
    text, out, page = tmp_path / "t.txt", tmp_path / "o.json", tmp_path / "t.md"
    text.write_text(TEXT)
    infill.main(["--text", str(text), "--out", str(out), "--table", str(page), "--quick"])
    report = json.loads(out.read_text())
    rows = {r["sampler"]: r for r in report["rows"]}
    assert list(rows) == ["exact marginals", "TwistedSMC, no lookahead", "AmortisedSMC", "APS"]
    assert rows["TwistedSMC, no lookahead"]["marginal_tv"][0] < 4.0 * report["sentences"][0]["tv_floor"]
    assert rows["TwistedSMC, no lookahead"]["evidence_error"][0] < 0.7
    assert f"{report['sentences'][0]['truth']}  truth" in page.read_text()
    text.write_text("too short")
    with pytest.raises(InputError, match="are needed"):
        infill.main(["--text", str(text), "--out", str(out), "--quick"])
