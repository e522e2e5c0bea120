"""Trajectories of heat and advection as Gaussian laws, and samplers in the wavelet domain against their posteriors."""

import json
from dataclasses import replace

import pytest
import torch

from invdiff.bench import exactness as bench
from invdiff.bench import exactness_deepinv
from invdiff.bench.exactness_contenders import on_trajectories
from invdiff.diagnostics.exactness import check_sampler, measure
from invdiff.diagnostics.trajectories import (
    advection_diffusion_law,
    exact_wavelet_problem,
    trajectory_problems,
    weak_trajectory_problem,
)
from invdiff.errors import CapabilityError, CatalogueError, InputError, ShapeError
from invdiff.operators import Affine
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.samplers import (
    AFDPS,
    DMCMC,
    PCN,
    TDS,
    FKSteering,
    ImportanceSampling,
    Jacobian,
    Levels,
    PiGDM,
    SplitGibbs,
    Systematic,
    TransportLangevin,
)
from invdiff.solve import solve
from invdiff.testing import check_prior

KAPPA, C, LENGTH = 0.3, 0.7, 2.0
TIMES = (0.2, 0.3, 0.7)
SMALL = trajectory_problems(4, 8)
NAMES = ["heat-wavelets", "forced-heat-wavelets", "advection-wavelets", "forced-advection-wavelets"]


def field(n: int, std: float = 1.0, mean: torch.Tensor | float = 0.0) -> FieldPrior:
    return FieldPrior.matern((1, n), length=1.7, std=std, mean=mean)


def generator_of(n: int, kappa: float, c: float) -> torch.Tensor:
    """Make kappa D^2 - c D of the spectral derivative D on an odd number of points (Trefethen 2000, chapter 3)."""
    j = torch.arange(n, dtype=torch.float64)
    lag = j[:, None] - j
    D = torch.where(lag == 0, 0.0, torch.pi / LENGTH * (-1.0) ** lag / torch.sin(torch.pi * lag / n))
    return kappa * D @ D - c * D


@pytest.mark.parametrize(("kappa", "c"), [(KAPPA, 0.0), (0.0, C), (KAPPA, C)], ids=["heat", "advection", "both"])
@pytest.mark.parametrize("forced", [False, True])
def test_the_law_is_that_of_a_state_space_model(kappa, c, forced):
    """Steps of the state by matrix exponentials, of the noise's covariance by Van Loan's block (1978)."""
    n = 7
    mean = torch.linspace(0.0, 1.0, n, dtype=torch.float64).square().reshape(1, n)
    initial, noise = field(n, mean=mean), field(n, std=0.4)
    law = advection_diffusion_law(
        initial, TIMES, diffusivity=kappa, speed=c, length=LENGTH, forcing=noise if forced else None
    )
    G, Q = generator_of(n, kappa, c), noise.covariance * float(forced)
    m, P, cross = mean[0], initial.covariance, []
    means, blocks, previous = [], {}, 0.0
    for i, t in enumerate(TIMES):
        F = torch.linalg.matrix_exp((t - previous) * torch.cat((torch.cat((-G, Q), 1), torch.cat((0 * G, G.mT), 1))))
        step = F[n:, n:].mT
        m, P = step @ m, step @ P @ step.mT + step @ F[:n, n:]
        cross = [step @ block for block in cross] + [P]
        means.append(m)
        for j, block in enumerate(cross):
            blocks[i, j], blocks[j, i] = block, block.mT
        previous = t
    expected = torch.cat([torch.cat([blocks[i, j] for j in range(3)], 1) for i in range(3)])
    torch.testing.assert_close(law.mean[0], torch.stack(means), rtol=0, atol=1e-12)
    torch.testing.assert_close(law.covariance, expected, rtol=0, atol=1e-12)


def test_an_even_number_of_points_samples_the_same_field_as_a_finer_grid():
    """The last wavenumber of 8 points has half its power at either sign on 16."""
    coarse = torch.tensor([4.0, 3.0, 2.0, 1.5, 1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    fine = torch.zeros(16, dtype=torch.float64)
    fine[:4], fine[13:] = coarse[:4], coarse[5:]
    fine[4] = fine[12] = 0.5 * coarse[4]
    settings = {"diffusivity": KAPPA, "speed": C, "length": LENGTH}
    few, many = (
        advection_diffusion_law(FieldPrior(S[None]), TIMES, forcing=FieldPrior(0.1 * S[None]), **settings)
        for S in (coarse, 2.0 * fine)
    )
    seen = torch.arange(48).reshape(3, 16)[:, ::2].flatten()
    torch.testing.assert_close(few.covariance, many.covariance[seen][:, seen], rtol=0, atol=1e-12)


def test_without_forcing_every_draw_solves_the_equation():
    n = 9
    law = advection_diffusion_law(field(n), (0.0, *TIMES), diffusivity=KAPPA, speed=C, length=LENGTH)
    u = law.sample(5, seed=1)[:, 0]
    for i, t in enumerate(TIMES):
        moved = u[:, 0] @ torch.linalg.matrix_exp(t * generator_of(n, KAPPA, C)).mT
        torch.testing.assert_close(u[:, 1 + i], moved, rtol=0, atol=1e-6)  # the root of rounding's variances
    assert int((law.eigenvalues > 0).sum()) == n
    assert law.event[0].coords["t"] == (0.0, *TIMES)
    assert law.event[0].coords["x"][1] == pytest.approx(LENGTH / n)


def test_laws_refuse_what_does_not_fit(unchecked):
    with pytest.raises(ShapeError, match=r"one shape \(1, points\)"):
        advection_diffusion_law(field(8), TIMES, forcing=field(6))
    with pytest.raises(ShapeError, match=r"one shape \(1, points\)"):
        advection_diffusion_law(FieldPrior.matern((2, 8), length=1.0), TIMES)
    for times in ((), (0.2, 0.1), (-0.1, 0.2), (0.1, float("nan"))):
        with pytest.raises(InputError, match="not negative and rising"):
            advection_diffusion_law(field(8), times)
    for settings in ({"diffusivity": -1.0}, {"length": 0.0}, {"speed": float("inf")}):
        with pytest.raises(InputError, match="Diffusivity must not be negative"):
            advection_diffusion_law(field(8), TIMES, **settings)
    with pytest.raises(ShapeError, match="more than 4096"):
        advection_diffusion_law(field(64), range(65))
    with pytest.raises(InputError, match="White noise has no mean"):
        advection_diffusion_law(field(8), TIMES, forcing=field(8, mean=1.0))
    scaled = FieldPrior.matern((1, 8), length=1.0, decoder=Affine((1, 8), scale=2.0))
    with pytest.raises(InputError, match="decoders must be the identity"):
        advection_diffusion_law(scaled, TIMES)
    law = advection_diffusion_law(field(8), TIMES)
    with pytest.raises(ShapeError, match="both even"):
        exact_wavelet_problem("odd", law, (0,), 0.1)
    law = advection_diffusion_law(field(8), (0.0, 0.1))
    for sensors in ((), (8,), (-1,)):
        with pytest.raises(InputError, match="from 0 to 7"):
            exact_wavelet_problem("blind", law, sensors, 0.1)


# The problems.


@pytest.mark.parametrize("case", SMALL, ids=NAMES)
def test_the_posterior_is_that_of_the_coefficients(case):
    """Conditioned on its coefficients the trajectory has the same law and the same evidence."""
    prior, likelihood = case.prior, case.problem.likelihood
    assert case.name in NAMES
    assert prior.decoder.in_shape == (4, 2, 4)
    latent = GaussianPrior(prior.prior.mean, prior.prior.covariance, decoder=prior.decoder)
    here = latent.posterior(likelihood.operator, likelihood.measurement[0], 0.1)
    torch.testing.assert_close(prior.decode(here.mean[None])[0], case.exact.mean, rtol=0, atol=1e-9)
    assert here.log_evidence == pytest.approx(case.exact.log_evidence, abs=1e-7)
    L = prior.decoder.linear(torch.eye(32, dtype=torch.float64).reshape(-1, 4, 2, 4)).flatten(1)
    torch.testing.assert_close(L.mT @ here.covariance @ L, case.exact.covariance, rtol=0, atol=1e-9)
    # Every band of the latents has a mean square of one about zero.
    assert float(prior.prior.mean.abs().max()) < 1e-12
    bands = prior.prior.covariance.diagonal().reshape(4, -1).mean(1)
    torch.testing.assert_close(bands, torch.ones_like(bands))


def test_the_problems_keep_the_contract():
    for case in (SMALL[0], SMALL[3]):
        assert check_prior(case.prior, n=256).analytic
    ranks = [int(torch.linalg.matrix_rank(c.exact.covariance, hermitian=True, rtol=1e-10)) for c in SMALL]
    assert ranks == [8, 32, 9, 32]


@pytest.mark.parametrize("case", SMALL, ids=NAMES)
def test_exact_draws_are_accepted_and_wrong_ones_are_not(case):
    """At four standard deviations, tails skewed, under 1 % of seeds fail: P(Binomial(40, 0.01) > 3) < 0.001."""
    n, exact = 200, case.exact
    found = [measure(exact.sample(n, seed=seed), exact) for seed in range(40)]
    assert sum(bool(f.failures) for f in found) <= 3
    singular = case.name in {"heat-wavelets", "advection-wavelets"}
    assert all((f.off_support is not None) == singular for f in found)
    draws = exact.sample(n, seed=0)
    wide = measure(exact.mean + 1.3**0.5 * (draws - exact.mean), exact)
    assert {"variance_ratio", "whitened"} <= {text.split()[0] for text in wide.failures}
    if singular:
        assert max(f.off_support for f in found) < 1e-6
        # Noise of a twentieth of a value's deviation: most of it lies where no trajectory goes.
        noise = torch.randn(draws.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rough = measure(draws + 0.05 * exact.std.square().mean().sqrt() * noise, exact)
        missing = 32 - int(torch.linalg.matrix_rank(exact.covariance, hermitian=True, rtol=1e-10))
        assert rough.off_support == pytest.approx(0.05 * (missing / 32) ** 0.5, rel=4.0 / (2 * n * missing) ** 0.5)
        assert any(text.startswith("off_support") for text in rough.failures)


# Samplers.


@pytest.mark.parametrize("case", [pytest.param(0, id=NAMES[0], marks=pytest.mark.slow), pytest.param(3, id=NAMES[3])])
def test_moment_matching_agrees_in_the_wavelet_domain(case):
    report = check_sampler(
        PiGDM(covariance=Jacobian(max_iterations=30)), problems=[SMALL[case]], steps=(3, 40), draws=200
    )
    assert report.rows[NAMES[case]][0].failures, "three steps must be seen to be too few, or the check sees nothing"


@pytest.mark.parametrize("case", [pytest.param(1, id=NAMES[1]), pytest.param(2, id=NAMES[2], marks=pytest.mark.slow)])
def test_transport_agrees_in_the_wavelet_domain_with_its_evidence(case):
    sampler = TransportLangevin(resampling=Systematic(), refreshes=2)
    report = check_sampler(sampler, problems=[SMALL[case]], steps=(4, 50), draws=50, chains=4)
    first, last = report.rows[NAMES[case]]
    assert first.failures, "four levels must be seen to be too few, or the check sees nothing"
    assert last.log_evidence_error is not None


WEAKLY = {
    "importance": (ImportanceSampling(), "steps", (4, 60), 4),
    "afdps": (AFDPS(), "steps", (10, 100), 4),
    "tds": (TDS(), "steps", (20, 250), 4),
    "steering": (FKSteering(), "steps", (20, 400), 4),
    "pcn": (PCN(), "prior_steps", (5, 40), 4),
    # Its last rho is a tenth of the noise if not given, here more than the law's narrowest directions.
    "split": (SplitGibbs(levels=Levels(rho=-4.0, sigma_min=0.01)), "steps", (10, 300), 1),
    # One kept draw a walker: the bounds are of independent draws. With few steps it warns, which is an error here.
    "dmcmc": (DMCMC(rungs=8, burn_in=120, keep=1, levels=Levels(rho=-4.0, sigma_min=0.01)), "steps", (200,), 2),
}


@pytest.mark.parametrize("name", [n if n == "importance" else pytest.param(n, marks=pytest.mark.slow) for n in WEAKLY])
def test_exact_samplers_agree_where_little_is_measured(name):
    sampler, growing, counts, chains = WEAKLY[name]
    report = check_sampler(
        sampler,
        problems=[weak_trajectory_problem()],
        steps=counts,
        draws=100,
        chains=chains,
        variant=lambda s, k: replace(s, **{growing: k}),
    )
    assert report.exact
    assert not report.failures
    figures = report.rows["weak-heat-wavelets"]
    assert len(figures) == 1 or figures[0].failures, "few steps must be seen to be too few"


def test_every_sampler_of_the_benchmark_that_says_exact_is_run_here_or_is_refused():
    here = {type(s).__name__ for s, *_ in WEAKLY.values()} | {"TransportLangevin", "PiGDM"}
    capabilities = Posterior(SMALL[0].problem, SMALL[0].prior).capabilities
    for _, sampler, _ in on_trajectories(quick=True):
        runs = sampler.requires() <= capabilities
        assert runs or sampler.requires() - capabilities == {"svd"}
        assert not (runs and sampler.exact) or type(sampler).__name__ in here


# The benchmark.


def test_parts_of_the_benchmark_are_merged(tmp_path, capsys):
    out, page = tmp_path / "all.json", tmp_path / "all.md"
    parts = [tmp_path / "heat.json", tmp_path / "weak.json"]
    chosen = ["--only", "DDRM", "ImportanceSampling"]
    for part, name in zip(parts, ("heat-wavelets", "weak-heat-wavelets"), strict=True):
        bench.main(["--quick", "--problems", name, *chosen, "--out", str(part)])
    bench.main(["--merge", *map(str, parts), "--out", str(out), "--table", str(page)])
    bench.main(["--merge", str(parts[0]), "--out", str(out), "--table", str(page)])  # a second time changes nothing
    report = json.loads(out.read_text())
    assert [p["name"] for p in report["problems"]] == ["heat-wavelets", "weak-heat-wavelets"]
    assert report["problems"][0] == {"name": "heat-wavelets", "shape": [1, 8, 16], "measured": 24}
    assert [(r["problem"], r["sampler"]) for r in report["rows"]] == [
        ("heat-wavelets", "exact draws (the noise floor)"),
        ("weak-heat-wavelets", "exact draws (the noise floor)"),
        ("weak-heat-wavelets", "ImportanceSampling"),
    ]
    text = page.read_text()
    heat, weak = text.split("### weak-heat-wavelets")
    assert "| off support |" in heat
    assert "off support" not in weak
    assert "Left out: DDRM of invdiff, which needs svd, which this problem and prior do not have." in heat
    wrong = json.loads(parts[1].read_text())
    wrong["problems"][0]["measured"] = 5
    parts[1].write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="this run's is"):
        bench.main(["--merge", str(parts[1]), "--out", str(out)])
    capsys.readouterr()


def test_rows_of_problems_that_were_not_run_stay():
    def rows(*names: str) -> list[dict]:
        return [{"problem": p, "library": "l", "sampler": n, "steps": 1} for p, n in (n.split() for n in names)]

    old = {"problems": [{"name": "p"}, {"name": "q"}], "left_out": [], "rows": rows("p a", "q a", "q b")}
    new = {"problems": [{"name": "q"}], "left_out": [], "rows": rows("q b")}
    found = bench.update(old, new, ["a", "b"])
    assert [r["problem"] + " " + r["sampler"] for r in found["rows"]] == ["p a", "q b"]


def test_what_the_benchmark_refuses():
    with pytest.raises(CatalogueError, match="did you mean 'heat-wavelets'"):
        bench.collect(quick=True, problems=["heat-wavelet"])
    with pytest.raises(CapabilityError, match="not on wavelet coefficients"):
        exactness_deepinv.run("DPS", {}, SMALL[0], 2, 0)


def test_the_solution_has_the_trajectorys_axes():
    case = SMALL[2]
    solution = solve(case.problem, case.prior, replace(TransportLangevin(), steps=4), draws=3, dtype=torch.float64)
    assert solution.draws.shape == (3, 1, 4, 8)
    assert tuple(solution.data["posterior"]["u"].dims) == ("chain", "draw", "component", "t", "x")
    assert float(solution.data["posterior"]["t"][-1]) == 1.0
