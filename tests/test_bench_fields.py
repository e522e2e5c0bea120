"""The benchmark on Gaussian fields: its posteriors and figures against closed forms, a gate in small, and its page."""

import json
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from math import log, sqrt

import pytest
import torch

from invdiff import samplers
from invdiff.bench import fields, fields_page
from invdiff.bench.fields_contenders import Contender, at, contenders, recommended
from invdiff.diagnostics.exactness import ALLOWANCE, measure
from invdiff.diagnostics.marginals import MarginalPosterior
from invdiff.errors import InputError, ShapeError
from invdiff.priors import FieldPrior
from invdiff.samplers import DDRM, TransportLangevin
from invdiff.solve import sampler_classes

SIDE, MEASUREMENTS = 6, 2


def case(task: str, side: int = SIDE, measurements: int = MEASUREMENTS) -> fields.FieldCase:
    return fields.field_case(task, side, measurements)


# The posteriors and the figures.


@pytest.mark.parametrize("task", fields.TASKS)
def test_posteriors_are_those_of_dense_algebra(task):
    c = case(task)
    for i, problem in enumerate(c.problems):
        likelihood = problem.likelihood
        dense = c.prior.posterior(likelihood.operator, likelihood.measurement[0], fields.NOISE_STD)
        torch.testing.assert_close(c.exact.mean[i], dense.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(c.exact.std, dense.std, rtol=1e-7, atol=1e-9)
        assert float(c.exact.log_evidence[i]) == pytest.approx(dense.log_evidence, abs=1e-7)
    assert not torch.allclose(c.exact.mean[0], c.exact.mean[1])


def test_channels_have_their_own_variance():
    prior = FieldPrior.power_law((2, 4, 4), 3.0, torch.tensor([0.5, 2.0]), 0.1)
    operator = fields.Downsampling((2, 4, 4), 2)
    y = operator(prior.sample(1, seed=1))
    dense = prior.posterior(operator, y[0], 0.3)
    torch.testing.assert_close(MarginalPosterior(prior, operator, y, 0.3).std, dense.std)


@pytest.mark.parametrize("task", fields.FRONTIER_TASKS)
def test_figures_are_those_of_the_dense_comparison(task):
    c, n = case(task), 40
    draws = 1.1 * c.exact.sample(n, seed=3) + 0.01  # not exact: the figures are off one
    found = c.exact.compare(draws)
    for i, problem in enumerate(c.problems):
        likelihood = problem.likelihood
        dense = c.prior.posterior(likelihood.operator, likelihood.measurement[0], fields.NOISE_STD)
        expected = measure(draws[i], dense)
        for name in ("mean_error", "variance_ratio", "whitened"):
            assert float(getattr(found, name)[i]) == pytest.approx(getattr(expected, name), rel=1e-6)
        inside = ((draws[i] - dense.mean).abs() <= 1.6448536269514722 * dense.std).double().mean()
        assert float(found.inside[i]) == pytest.approx(float(inside), abs=1e-12)
    summary = found.summary()
    assert summary["mean_error"] == pytest.approx(sqrt(float(found.mean_error.square().mean())))


def limits(c: fields.FieldCase, n: int, allowance: float = 0.0) -> dict[str, tuple[float, float]]:
    """What exact draws keep, four standard deviations wide, from the dense covariance; and an allowance."""
    likelihood = c.problems[0].likelihood
    S = c.prior.posterior(likelihood.operator, likelihood.measurement[0], fields.NOISE_STD).covariance
    total, d = n * len(c.problems), len(S)
    std = S.diagonal().sqrt()
    correlation2 = float(((S / std[:, None] / std) ** 2).mean())
    freedom = len(c.problems) * float(S.trace()) ** 2 / float((S**2).sum())
    spread = 2.0 / (9.0 * freedom)  # Wilson & Hilferty 1931
    mean = sqrt((1.0 - spread + 4.0 * sqrt(spread)) ** 3 + allowance**2 * n)

    def around(center: float, variance: float) -> tuple[float, float]:
        return center - 4.0 * sqrt(variance) - allowance, center + 4.0 * sqrt(variance) + allowance

    return {
        "mean_error": (0.0, mean),
        "variance_ratio": around(1.0, 2.0 * correlation2 / total),
        "whitened": around(1.0, 2.0 / (total * d)),
        # Bernoulli variables of values whose correlations r are positive: at most |r| times their variance.
        "inside": around(0.9, 0.09 * sqrt(correlation2) / total),
    }


def outside(found: dict[str, float], bounds: dict[str, tuple[float, float]]) -> list[str]:
    return [name for name, (low, high) in bounds.items() if not low <= found[name] <= high]


@pytest.mark.parametrize("task", fields.TASKS)
def test_exact_draws_keep_their_limits_and_others_do_not(task):
    c, n = case(task), 400
    draws, bounds = c.exact.sample(n, seed=5), limits(c, n)
    assert not outside(c.exact.compare(draws).summary(), bounds)
    mean = c.exact.mean[:, None]
    wide = mean + 1.15 * (draws - mean)
    assert {"variance_ratio", "whitened"} <= set(outside(c.exact.compare(wide).summary(), bounds))
    shifted = draws + 0.5 * c.exact.std
    assert "mean_error" in outside(c.exact.compare(shifted).summary(), bounds)
    assert not torch.equal(draws[0, 0], draws[0, 1])
    assert torch.equal(draws, c.exact.sample(n, seed=5))


def test_shapes_that_do_not_fit_are_refused():
    c = case("blur")
    with pytest.raises(ShapeError, match="n of at least 2"):
        c.exact.compare(torch.zeros(MEASUREMENTS, 1, 1, SIDE, SIDE))
    with pytest.raises(ShapeError, match=r"Draws have shape \(2"):
        c.exact.compare(torch.zeros(3, 5, 1, SIDE, SIDE))
    with pytest.raises(ShapeError, match="Measurements have shape"):
        MarginalPosterior(c.prior, c.problems[0].likelihood.operator, torch.zeros(1, SIDE, SIDE), 0.1)


def test_the_prior_of_a_case_stays_as_it_is():
    c = case("blur")
    before = deepcopy(c.prior.state_dict())
    fields.run_ours(c, DDRM(steps=2), 4)
    assert all(torch.equal(v, before[k]) for k, v in c.prior.state_dict().items())


# A gate in small.


def gate(task: str, sampler: samplers.Sampler, draws: int = 96) -> tuple[dict[str, float], list[str]]:
    c = case(task, 12, 2)
    z, found = fields.run_ours(c, sampler, draws)
    summary = c.exact.compare(z).summary()
    return found | summary, outside(summary, limits(c, draws, ALLOWANCE))


@pytest.mark.parametrize("task", fields.FRONTIER_TASKS)
def test_transport_with_momentum_passes(task):
    sampler = fields.with_evaluations(recommended(fields.largest_std(12)), 150)
    assert sampler.cost().forward == 150
    found, failed = gate(task, sampler)
    assert not failed, found
    assert abs(found["log_evidence_error"]) < fields_page.EVIDENCE
    assert found["log_evidence_deviation"] < fields_page.DEVIATION


@pytest.mark.parametrize("task", ["inpainting 50 %", "blur"])
def test_a_biased_sampler_fails(task):
    found, failed = gate(task, DDRM(steps=100))
    assert {"variance_ratio", "whitened"} <= set(failed), found


def test_momentum_needs_fewer_evaluations():
    """At 50 evaluations of half the pixels the plain refresh has not reached them; see the sampler's text."""
    momentum, _ = gate("inpainting 50 %", fields.with_evaluations(recommended(fields.largest_std(12)), 50))
    plain, _ = gate("inpainting 50 %", fields.with_evaluations(TransportLangevin(), 50))
    assert momentum["mean_error"] < 0.75 * plain["mean_error"]


# Contenders.


def test_every_sampler_takes_part():
    all_ = contenders(1.0, 0.2)
    of_tokens = {samplers.TwistedSMC, samplers.AnchoredSMC, samplers.AmortisedSMC, samplers.MaskedGibbs}
    of_tokens |= {samplers.APS, samplers.G2D2, samplers.SGDD, samplers.SVDD}
    steering = {samplers.WDNO}  # finds good controls, no posterior
    assert {type(s) for c in all_ for s in c.ours} == set(sampler_classes().values()) - of_tokens - steering
    assert {c.peer for c in all_ if c.library == "deepinv"} == {"DPS", "DDRM", "DiffPIR", "PosteriorDiffusion"}
    assert len({c.name for c in all_}) == len(all_)


@pytest.mark.parametrize("contender", [c for c in contenders(1.0, 0.2) if c.ours], ids=lambda c: c.name)
def test_no_contender_takes_more_passes_than_allowed(contender: Contender):
    for sampler in contender.ours:
        for passes in (10, 100, 1000):
            chosen = at(sampler, passes)
            if chosen is None:
                continue
            cost, more = chosen.cost(), replace(chosen, steps=chosen.steps + 1).cost()
            assert cost.forward + cost.backward <= passes < more.forward + more.backward


# From runs to a page.

SMALL = replace(fields.QUICK, sides=(8,), frontier_side=8, draws=8, gate=(15,), longer=(30,))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("fields")
    patch = pytest.MonkeyPatch()
    patch.setattr(fields, "QUICK", SMALL)
    parts = [folder / "0.json", folder / "1.json"]
    names = [fields.EXACT_DRAWS, "momentum", "DDRM", "deepinv DDRM"]
    for i, part in enumerate(parts):
        fields.main(["--out", str(part), "--quick", "--only", *names, "--worker", f"{i}/2"])
    again = folder / "again.json"
    fields.main(["--out", str(again), "--quick", "--parts", "frontier", "--only", "DDRM"])
    out = folder / "all.json"
    fields.main(["--merge", *map(str, [*parts, again]), "--out", str(out), "--table", str(folder / "table.md")])
    patch.undo()
    return json.loads(out.read_text()) | {"table": (folder / "table.md").read_text()}


def test_workers_share_the_rows_and_rows_run_again_replace_the_first(report):
    rows = report["rows"]
    keys = [(r["part"], r["side"], r["task"], r["name"], r["wanted"], r["settings"]) for r in rows]
    assert len(set(keys)) == len(keys)
    assert [r["part"] for r in rows] == sorted((r["part"] for r in rows), reverse=True)
    ddrm = [r for r in rows if r["name"] == "DDRM"]
    assert len(ddrm) == 2 * len(SMALL.passes) * len(fields.FRONTIER_TASKS)  # two settings
    theirs = [r for r in rows if r["name"] == "deepinv DDRM"]
    assert len(theirs) == len(SMALL.passes) * len(fields.FRONTIER_TASKS)
    for r in (*ddrm, *theirs):
        assert r["evaluations"] + r["backward"] == r["wanted"]
        assert len(r["each_mean_error"]) == SMALL.frontier_measurements
    momentum = [r for r in rows if r["name"] == "momentum"]
    assert [r["wanted"] for r in momentum] == [15, 30] * len(fields.TASKS)
    assert all(r["evaluations"] == r["wanted"] for r in momentum)


def test_runs_of_other_settings_do_not_merge(report, tmp_path):
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    fields.write(parts[0], report | {"table": None})
    fields.write(parts[1], report | {"table": None, "device": "another"})
    with pytest.raises(InputError, match="different settings, devices or versions"):
        fields.merge(parts)


def test_the_table_holds_every_task_and_every_contender(report):
    text = report["table"]
    assert "### The gate at 8 x 8" in text
    for task in fields.FRONTIER_TASKS:
        assert f"### The frontier at 8 x 8: {task}" in text
    for name, rows in fields_page.frontier(report, "blur").items():
        cells = " | ".join(f"{r['mean_error']:.3g} / {r['variance_ratio']:.3g}" for r in rows)
        assert f"| {name} | {cells} |" in text
    assert "**" not in text  # side 8 has no bounds


def test_the_figure_is_drawn_from_the_file_alone(report, tmp_path):
    source, pictures = tmp_path / "fields.json", [tmp_path / "a.svg", tmp_path / "b.svg"]
    fields.write(source, report)
    for picture in pictures:
        fields.main(["--from", str(source), "--figure", str(picture), "--table", str(tmp_path / "table.md")])
    first, second = (picture.read_bytes() for picture in pictures)
    assert first == second
    assert first.startswith(b"<?xml")
    assert "](/b.svg)" in (tmp_path / "table.md").read_text()
    assert "](/" not in report["table"]


def row(**more: object) -> dict:
    base = {"part": "gate", "side": 24, "task": "blur", "name": "momentum", "wanted": 300, "mean_error": 1.0}
    base |= {"variance_ratio": 1.0, "inside": 0.9, "whitened": 1.0}
    return base | {"log_evidence_error": 1.0, "log_evidence_deviation": 1.0} | more


@pytest.mark.parametrize(
    ("more", "figure"),
    [
        ({}, None),
        ({"mean_error": 1.31}, "mean_error"),
        ({"mean_error": 2.7, "wanted": 100, "inside": 0.8, "log_evidence_error": -50.0}, None),
        ({"mean_error": 2.9, "wanted": 100}, "mean_error"),
        ({"variance_ratio": 1.021}, "variance_ratio"),
        ({"variance_ratio": 1.06, "wanted": 100}, "variance_ratio"),
        ({"inside": 0.894}, "inside"),
        ({"log_evidence_error": -4.1}, "log_evidence_error"),
        ({"log_evidence_error": None}, "log_evidence_error"),
        ({"log_evidence_deviation": 2.6}, "log_evidence_deviation"),
        ({"side": 48, "log_evidence_error": -9.0}, None),
        ({"side": 64, "mean_error": 1.16}, "mean_error"),
        ({"side": 64, "mean_error": 1.16, "task": "inpainting 30 %"}, "mean_error"),
        ({"side": 24, "mean_error": 1.5, "task": "inpainting 30 %"}, None),
        ({"side": 64, "log_evidence_error": -4.1}, "evidence"),
    ],
)
def test_bounds_hold_what_they_say(more, figure):
    found = fields_page.failures({"rows": [row(**more)]})
    assert len(found) == (figure is not None)
    assert figure is None or figure in found[0]


def test_the_evidence_needs_as_many_evaluations_as_stay_within_its_bound():
    errors = {100: -3.0, 300: -9.0, 600: 3.9, 1200: 0.5}
    rows = [row(wanted=k, log_evidence_error=e) for k, e in errors.items()]
    assert fields_page.needed(rows) == 600
    assert fields_page.needed(rows[:2]) is None
    assert fields_page.needed(rows[:1]) == 100


def test_the_best_settings_are_not_those_that_are_right_by_being_narrow():
    narrow, right, far = ({"mean_error": e, "variance_ratio": v} for e, v in ((0.4, 0.3), (1.1, 0.98), (3.0, 1.0)))
    assert fields_page.best([narrow, far, right]) is right
    assert log(fields_page.best([narrow, far])["mean_error"]) == pytest.approx(log(3.0))


def test_labels_do_not_lie_on_each_other():
    places = sorted(torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist())
    found = fields_page._spread(places, 0.04)
    assert all(b - a >= 0.04 - 1e-12 for a, b in pairwise(found))
    assert found[0] >= 0.0
    assert found[-1] <= 1.0
    assert fields_page._spread([0.1, 0.5, 0.9], 0.04) == [0.1, 0.5, 0.9]
    assert fields_page._spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
