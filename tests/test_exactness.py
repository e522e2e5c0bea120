"""Samplers against exact posteriors, and the measure itself: it accepts what is right and rejects what is not."""

from dataclasses import dataclass, replace
from typing import Any, final

import pytest
import torch

from invdiff.bench import exactness as bench
from invdiff.bench import exactness_deepinv
from invdiff.bench.deepinv_samplers import Passes, draw, physics_of
from invdiff.diagnostics.exactness import (
    check_sampler,
    exact_problem,
    field_problems,
    measure,
    measure_solution,
    plane_problem,
)
from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import CapabilityError, InputError
from invdiff.event import Variable
from invdiff.likelihoods import Gaussian
from invdiff.noise import Noise
from invdiff.operators import Blur, motion_kernel
from invdiff.samplers import DAPS, DPS, ExactInner, ImportanceSampling, Isotropic, Jacobian, PiGDM, Spectral
from invdiff.samplers.annealing import Levels
from invdiff.solve import solve

SIDE, DRAWS, STD = 8, 300, 0.2
FIELDS = field_problems(SIDE)


@final
@dataclass(frozen=True, kw_only=True)
class Declared(Sampler):
    """Another sampler, declared exact, whatever it is."""

    inner: Any
    steps: int = 10

    @property
    def chosen(self) -> Any:
        return replace(self.inner, steps=self.steps)

    @property
    def exact(self) -> bool:
        return True

    def requires(self) -> frozenset[str]:
        return self.chosen.requires()

    def cost(self) -> Cost:
        return self.chosen.cost()

    def init(self, posterior: Any, ensembles: int, n: int, *, noise: Noise) -> State:
        return self.chosen.init(posterior, ensembles, n, noise=noise)

    def step(self, posterior: Any, state: Any, *, noise: Noise) -> tuple[State, Info]:
        return self.chosen.step(posterior, state, noise=noise)

    def done(self, state: Any) -> bool:
        return self.chosen.done(state)

    def progress(self, state: Any) -> float:
        return self.chosen.progress(state)

    def finish(self, posterior: Any, state: Any, *, noise: Noise) -> Draws:
        return self.chosen.finish(posterior, state, noise=noise)


# Samplers.


@pytest.mark.parametrize("covariance", [Jacobian(max_iterations=30), Spectral()], ids=["jacobian", "spectral"])
def test_moment_matching_is_exact_on_gaussian_fields(covariance):
    report = check_sampler(PiGDM(covariance=covariance), problems=FIELDS, steps=(8, 50), draws=DRAWS)
    assert report.exact
    assert not report.failures
    for row in report.rows.values():
        assert row[0].failures, "eight steps must be seen to be too few, or the check sees nothing"
    assert "field-blur, 50 steps" in str(report)


def test_a_declaration_passes_for_a_sampler_that_is_exact():
    """The wrapper of the failing tests below is not what fails there."""
    sampler = Declared(inner=PiGDM(covariance=Spectral()))
    assert not check_sampler(sampler, problems=FIELDS[:1], steps=(8, 50), draws=DRAWS).failures


def test_importance_sampling_is_exact_on_the_plane_with_its_evidence():
    report = check_sampler(ImportanceSampling(), problems=[plane_problem()], steps=(10, 60), draws=DRAWS, chains=8)
    figures = report.rows["plane"][-1]
    assert figures.log_evidence_error is not None
    low, high = figures.bounds["log_evidence_error"]
    assert low < figures.log_evidence_error < high
    assert high < 0.2
    assert 100 < figures.draws < 8 * DRAWS


@pytest.mark.parametrize(
    ("sampler", "figure"),
    [
        (DAPS(inner=ExactInner()), "variance_ratio"),
        (DPS(scale=0.3), "mean_error"),
        (PiGDM(covariance=Isotropic(prior_std=STD)), "mean_error"),
    ],
    ids=["daps", "dps", "isotropic"],
)
@pytest.mark.parametrize("case", FIELDS, ids=[case.name for case in FIELDS])
def test_a_sampler_that_is_declared_exact_and_is_not_fails(sampler, figure, case):
    with pytest.raises(AssertionError, match=f"Declared declares itself exact(.|\n)*{figure}"):
        check_sampler(Declared(inner=sampler), problems=[case], steps=(8, 40), draws=DRAWS)


def test_a_sampler_that_stops_early_in_sigma_fails():
    """Right but for the last step, which leaps from 0.06 to 0 and takes the fine scales' spread away."""
    early = PiGDM(covariance=Spectral(), levels=Levels(sigma_min=0.3 * STD))
    with pytest.raises(AssertionError, match=r"field-inpainting at 40 steps: whitened 0\."):
        check_sampler(early, problems=FIELDS[:1], steps=(8, 40), draws=DRAWS)


def test_a_sampler_that_says_it_is_biased_is_measured_and_not_judged():
    report = check_sampler(DAPS(inner=ExactInner()), problems=FIELDS[:1], steps=(10,), draws=50)
    assert not report.exact
    assert report.failures
    assert not any("does not fall" in text for text in report.failures)  # there is one number of steps only


def test_an_error_that_does_not_fall_is_a_failure():
    sampler = DAPS(inner=ExactInner())
    backwards = lambda s, k: replace(s, steps=45 - k)  # noqa: E731
    report = check_sampler(sampler, problems=FIELDS[:1], steps=(5, 40), draws=50, variant=backwards)
    assert any("does not fall from 5 to 40 steps" in text for text in report.failures)


# The measure.


@pytest.mark.parametrize("case", [*FIELDS, plane_problem()], ids=[*[case.name for case in FIELDS], "plane"])
@pytest.mark.parametrize("n", [25, 300])
def test_exact_draws_are_accepted(case, n):
    """At four standard deviations five figures fail with a probability of 5 * 6.3e-5; with skewed tails, under 1 %."""
    seeds = 60
    found = [measure(case.exact.sample(n, seed=seed), case.exact) for seed in range(seeds)]
    failures = [text for figures in found for text in figures.failures]
    assert len(failures) <= 3, failures  # P(Binomial(60, 0.01) > 3) = 0.003, and the seeds are fixed
    # The floors are floors: the mean squares of both errors are 1, to four standard errors of their chi-squares.
    S = case.exact.covariance
    freedom = float(S.trace() ** 2 / (S**2).sum())
    spread = 4.0 * (2.0 / (freedom * seeds)) ** 0.5
    assert sum(f.mean_error**2 for f in found) / seeds == pytest.approx(1.0, abs=spread)
    assert sum(f.covariance_error**2 for f in found) / seeds == pytest.approx(1.0, abs=2.0 * spread + 2.0 / n)
    assert sum(f.mass for f in found) / seeds == pytest.approx(0.9, abs=4.0 * (0.09 / (n * seeds)) ** 0.5 + 0.3 / n)


def _broken(kind, draws, exact):
    if kind == "variance 15 % too large":
        return exact.mean + 1.15**0.5 * (draws - exact.mean)
    if kind == "mean shifted by 0.3 standard deviations":
        return draws + 0.3 * exact.std
    # The same marginals, other correlations: every value is drawn in a run of its own.
    standard = ((draws - exact.mean) / exact.std).flatten(1)
    generator = torch.Generator().manual_seed(0)
    shuffled = [column[torch.randperm(len(column), generator=generator)] for column in standard.T]
    return exact.mean + exact.std * torch.stack(shuffled, dim=1).reshape(draws.shape)


@pytest.mark.parametrize(
    ("kind", "seen", "unseen"),
    [
        ("variance 15 % too large", {"variance_ratio", "whitened"}, {"mean_error"}),
        ("mean shifted by 0.3 standard deviations", {"mean_error"}, {"variance_ratio", "covariance_error"}),
        ("correlations lost", {"whitened", "covariance_error"}, {"variance_ratio", "mass", "mean_error"}),
    ],
)
@pytest.mark.parametrize("case", FIELDS, ids=[case.name for case in FIELDS])
def test_wrong_draws_are_rejected_by_the_figure_that_sees_them(case, kind, seen, unseen):
    for seed in range(5):
        draws = case.exact.sample(DRAWS, seed=seed)
        failing = {text.split()[0] for text in measure(_broken(kind, draws, case.exact), case.exact).failures}
        assert seen <= failing, (seed, failing)
        assert not unseen & failing, (seed, failing)


def test_dropped_weights_are_rejected():
    case = plane_problem()
    solution = solve(case.problem, case.prior, ImportanceSampling(steps=60), draws=2000, dtype=torch.float64)
    particles = solution.particles["x"].flatten(0, 1)
    assert not measure(particles, case.exact, solution.log_weights.flatten()).failures
    failing = {text.split()[0] for text in measure(particles, case.exact).failures}
    assert {"mean_error", "variance_ratio", "whitened"} <= failing


@pytest.mark.parametrize("chains", [1, 8])
def test_a_wrong_evidence_is_rejected(chains):
    case = plane_problem()
    sampler = ImportanceSampling(steps=60)
    solution = solve(case.problem, case.prior, sampler, draws=2000, chains=chains, dtype=torch.float64)
    assert not measure_solution(solution, case).failures
    wrong = replace(solution, chain_log_evidence=solution.chain_log_evidence + 0.3)
    assert [text.split()[0] for text in measure_solution(wrong, case).failures] == ["log_evidence_error"]


def test_several_variables_are_refused():
    case = plane_problem()
    solution = solve(case.problem, case.prior, PiGDM(covariance=Jacobian(), steps=5), draws=20, dtype=torch.float64)
    event = tuple(Variable(name=name, dims=("dim_0",), shape=(1,)) for name in "uv")
    draws = solution.by_chain["x"]
    two = replace(solution, by_chain={"u": draws[..., :1], "v": draws[..., 1:]}, event=event)
    with pytest.raises(CapabilityError, match="one variable"):
        measure_solution(two, case)


# The benchmark.


def test_the_denoiser_given_to_deepinv_is_the_exact_one_with_its_gradient():
    case, passes = FIELDS[0], Passes()
    denoiser = exactness_deepinv.exact_denoiser(case.prior, passes)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, *case.prior.shape, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
    direct, pull = torch.func.vjp(lambda z: case.prior.denoise(z, sigma), x)
    wrapped, pull_wrapped = torch.func.vjp(lambda z: denoiser(z, sigma), x)
    torch.testing.assert_close(wrapped, direct)
    torch.testing.assert_close(pull_wrapped(v)[0], pull(v)[0])
    torch.testing.assert_close(denoiser(x, 0.3), case.prior.denoise(x, 0.3))
    assert passes == Passes(forward=6, backward=3)


@pytest.mark.parametrize("case", FIELDS, ids=[case.name for case in FIELDS])
def test_the_physics_given_to_deepinv_is_the_problem(case):
    physics, y = physics_of(case.problem.likelihood)
    z = case.prior.sample(2, seed=3).float()
    direct = case.problem.likelihood.log_prob(z.double())
    residual = (physics.A(z) - y).double().flatten(1).square().sum(1)
    torch.testing.assert_close(
        -0.5 * (residual[0] - residual[1]) / 0.05**2, direct[0] - direct[1], rtol=1e-4, atol=1e-3
    )
    assert float(physics.noise_model.sigma) == pytest.approx(0.05)


def test_deepinv_runs_repeat_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    a, b = (exactness_deepinv.run("DDRM", {}, FIELDS[0], 5, 0) for _ in range(2))
    c = exactness_deepinv.run("DDRM", {}, FIELDS[0], 5, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.draws, b.draws)
    assert not torch.equal(a.draws, c.draws)
    assert a.evaluations == 100
    shaken = Blur(motion_kernel(5, 0.5, seed=0), FIELDS[0].prior.shape)  # neither circular nor of rank one
    with pytest.raises(CapabilityError, match="DDRM needs an SVD"):
        exactness_deepinv.run("DDRM", {}, exact_problem("shaken", FIELDS[0].prior, shaken, 0.05), 5, 0)


def test_deepinv_draws_for_several_measurements_stand_measurement_by_measurement():
    case = FIELDS[0]
    two = torch.cat([case.problem.likelihood.measurement, 1.0 - case.problem.likelihood.measurement])
    likelihood, shape = Gaussian(case.problem.likelihood.operator, two, 0.05), case.prior.shape
    run = draw("DDRM", {}, likelihood, lambda passes: exactness_deepinv.exact_denoiser(case.prior, passes), shape, 4, 0)
    residual = (case.problem.likelihood.operator(run.draws.double()) - two.repeat_interleave(4, 0)).square().mean(1)
    assert float(residual.max()) < (4 * 0.05) ** 2


def test_the_table_marks_what_exact_draws_would_not_give():
    case = FIELDS[0]
    exact = case.exact.sample(DRAWS, seed=0)
    wide = _broken("variance 15 % too large", exact, case.exact)
    passes = {"evaluations": 3.0, "backward": 0.0}
    rows = [
        bench.row(case, "here", name, "", 3, measure(z, case.exact), **passes)
        for name, z in (("a", exact), ("b", wide))
    ]
    report = {
        "rows": rows,
        "problems": [{"name": case.name, "shape": [1, SIDE, SIDE], "measured": 32}],
        "left_out": [{"problem": case.name, "sampler": "c", "reason": "needs more"}],
        "versions": {"torch": "x"},
        "quick": True,
        "draws": DRAWS,
        "seed": 0,
        "device": "cpu",
        "allowance": 0.02,
    }
    lines = bench.table(report, "f.json", "f.md").splitlines()
    assert "`python -m invdiff.bench.exactness --out f.json --table f.md --quick`" in lines[0]
    right, wrong = (next(line for line in lines if line.startswith(f"| here | {name} | 3 | 3 + 0 |")) for name in "ab")
    assert "**" not in right
    assert f"**{rows[1]['variance_ratio']:.3f}**" in wrong
    assert "Left out: c of deepinv, which needs more." in lines


def test_some_samplers_are_run_again_in_the_file_there_is():
    def rows(*names: str, value: int) -> list[dict]:
        return [{"problem": p, "library": "l", "sampler": n, "steps": value} for p, n in (n.split() for n in names)]

    common = {"draws": 4, "problems": [{"name": "p"}, {"name": "q"}], "left_out": ["kept"]}
    old = common | {"rows": rows("p a", "p b", "p b", "q a", value=1)}
    new = common | {"rows": rows("p b", "q c", "q c", value=2), "left_out": []}
    found = bench.update(old, new)
    assert [(r["problem"] + " " + r["sampler"], r["steps"]) for r in found["rows"]] == [
        ("p a", 1),
        ("p b", 2),
        ("q a", 1),
        ("q c", 2),
        ("q c", 2),
    ]
    assert found["left_out"] == ["kept"]
    assert [r["problem"] + " " + r["sampler"] for r in bench.update(old, new, ["b", "a"])["rows"]] == [
        "p b",
        "q c",
        "q c",
    ]
    with pytest.raises(InputError, match="file's draws is 4, this run's is 5"):
        bench.update(old, new | {"draws": 5})
