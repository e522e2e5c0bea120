"""The benchmark of phase retrieval's two modes: how draws are counted, and the way to its table."""

import json

import torch

from invdiff.bench import phase_modes
from invdiff.priors import FieldPrior

PRIOR = FieldPrior.power_law((3, 64, 64), exponent=3.0, std=0.2, mean=0.5)


def test_draws_are_counted_by_the_mode_that_they_show():
    truth = PRIOR.sample(1, seed=1)[0]
    rotated = truth.flip(-2, -1)
    mixed = torch.cat([truth[:1], rotated[1:]])  # colours rotated apart are neither
    draws = torch.stack([truth, rotated, 0.5 * rotated, mixed, 1.0 - truth])
    assert phase_modes.count(draws, truth) == (1, 2)
    assert phase_modes.count(draws, rotated) == (2, 1)


def test_a_short_run_writes_its_file_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(phase_modes, "load_prior", lambda _: PRIOR.float())
    monkeypatch.setattr(phase_modes, "pictures", lambda *_: PRIOR.sample(2, seed=2).float())
    out, page = tmp_path / "out.json", tmp_path / "table.md"
    run = ["--data", ".", "--out", str(out), "--table", str(page), "--draws", "3", "--evaluations", "15"]
    phase_modes.main([*run, "--only", "TransportLangevin", "DPS"])
    report = json.loads(out.read_text())
    assert [r["sampler"] for r in report["rows"]] == ["TransportLangevin", "DPS"]
    for row in report["rows"]:
        assert row["evaluations"] + row["backward"] <= 15
        for counts in zip(row["upright"], row["rotated"], strict=True):
            assert 0 <= sum(counts) <= 3
    assert page.read_text().count("| TransportLangevin |") == 1
