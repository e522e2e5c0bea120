"""Calibration accepts exact draws, and names what is wrong with others; the statistics that it stands on."""

import json
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any, ClassVar, final

import pytest
import torch

from invdiff import likelihoods
from invdiff.bench import calibration as bench
from invdiff.diagnostics import calibration_ranks as statistics
from invdiff.diagnostics.calibration import Calibration, calibrate, default_quantities
from invdiff.diagnostics.calibration_quantities import spread_values
from invdiff.draws import Draws
from invdiff.driver import Cost, Info, Sampler, State
from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.integrators import Heun
from invdiff.operators import Inpainting, random_mask
from invdiff.operators.composition import Affine
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers import DAPS, DPS, PiGDM, Spectral

SHAPE, NOISE = (1, 6, 6), 0.05
PRIOR = FieldPrior.power_law(SHAPE, exponent=2.0, std=0.2, mean=0.5)
A = Inpainting(random_mask(SHAPE, 0.5, seed=1), SHAPE)
SETTINGS = {"noise_std": NOISE, "truths": 64, "draws": 31, "dtype": torch.float64}


@final
@dataclass(frozen=True, kw_only=True)
class Conditioned(Sampler):
    """Exact draws of a Gaussian posterior, but for what its settings spoil.

    Their spread is multiplied, their mean shifted by standard deviations, or the measurement ignored.
    """

    spread: float = 1.0
    shift: float = 0.0
    blind: bool = False
    steps: int = 1
    anytime: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        return self == Conditioned()

    def requires(self) -> frozenset[str]:
        return frozenset({"linear"})

    def cost(self) -> Cost:
        return Cost(0)

    def init(self, posterior: Any, ensembles: int, n: int, *, noise: Any) -> State:
        return State(z=noise.like(torch.zeros(ensembles, n, *posterior.shape, dtype=posterior.dtype)))

    def step(self, posterior: Any, state: State, *, noise: Any) -> tuple[State, Info]:
        prior, linear = posterior.prior, posterior.linear
        d = prior.size
        M = linear.operator(torch.eye(d, dtype=torch.float64).reshape(d, *posterior.shape)).flatten(1).T
        C, m = prior.covariance, prior.mean.flatten()
        S = M @ C @ M.T + float(linear.noise_std) ** 2 * torch.eye(len(M), dtype=torch.float64)
        G = 0.0 * (C @ M.T) if self.blind else torch.linalg.solve(S, M @ C).T
        mean = m + (linear.measurement.flatten(1).double() - M @ m) @ G.T
        covariance = C - G @ M @ C
        std = covariance.diagonal().clamp_min(0.0).sqrt()
        root = torch.linalg.cholesky(covariance + 1e-14 * torch.eye(d, dtype=torch.float64))
        z = (mean + self.shift * std)[:, None] + self.spread * state.z.flatten(2).double() @ root.T
        return State(z=z.reshape(state.z.shape).to(state.z.dtype), step=1), Info(sigma=0.0)

    def done(self, state: State) -> bool:
        return state.step >= self.steps

    def progress(self, state: State) -> float:
        return float(state.step)

    def finish(self, posterior: Any, state: State, *, noise: Any) -> Draws:
        return Draws(z=state.z)


def run(sampler: Sampler, **more: Any) -> Calibration:
    return calibrate(A, PRIOR, sampler, **(SETTINGS | more))


# What is accepted.


def test_exact_draws_are_uniform_and_covered():
    found = [run(Conditioned(), seed=seed) for seed in range(3)]
    p = [c.p_value for c in found]
    assert min(p) > 0.003  # three uniform p-values: 1 % of the time below
    assert max(p) > 0.05
    # Coverage of the pooled values: mean of 3 x 64 truths, within four standard errors of its own.
    for level in (0.5, 0.9):
        covers = [c.coverage("values", level) for c in found]
        mean, se = sum(c.value for c in covers) / 3, sqrt(sum(c.se**2 for c in covers)) / 3
        assert mean == pytest.approx(level, abs=4 * se)
        assert se < 0.5 / sqrt(3 * 64)  # of one value; several tell more
    # The 95 % bands hold what they should: of 3 x 9 x 2 dependent ones, P(Binomial(54, 0.05) > 10) = 1e-4.
    names = list(found[0].members)
    missed = sum(not c.coverage(name, level).consistent for c in found for name in names for level in (0.5, 0.9))
    assert missed <= 10


def test_the_ranks_do_not_depend_on_batches():
    a, b = run(Conditioned(), truths=6), run(Conditioned(), truths=6, together=4, micro_batch=7)
    assert all(torch.equal(a.members[name], b.members[name]) for name in a.members)
    c = run(Conditioned(), truths=6, seed=1)
    assert any(not torch.equal(a.members[name], c.members[name]) for name in a.members)


def test_moment_matching_nears_uniform_as_steps_grow():
    """Few steps leave the fine scales too wide, see docs/exactness.json."""
    prior = FieldPrior.power_law(SHAPE, exponent=3.0, std=0.2, mean=0.5)
    few, many = (
        calibrate(A, prior, PiGDM(covariance=Spectral(), steps=k), noise_std=NOISE, truths=48) for k in (8, 30)
    )
    assert few.p_value < 0.005
    assert few.uniformity("roughness") < 0.002
    assert few.table()["roughness"]["mean_rank"] < 0.5 - 4 * sqrt(1 / (12 * 48))
    assert many.p_value > 0.01
    assert many.evaluations == 30


# What is rejected.


@pytest.mark.parametrize(("spread", "sign"), [(0.7, -1), (1.4, 1)])
def test_a_wrong_spread_is_caught_with_its_sign(spread, sign):
    found = run(Conditioned(spread=spread))
    assert found.p_value < 0.002
    for level in (0.5, 0.9):
        cover = found.coverage("values", level)
        assert not cover.consistent
        assert sign * (cover.value - level) > 4 * cover.se
    # Spread times s around the right mean: the central interval of 90 % holds P(|N(0, 1)| < 1.645 s), 0.75 or 0.979.
    expected = 1 - 2 * float(torch.special.ndtr(torch.tensor(-1.645 * spread)))
    assert found.coverage("values").value == pytest.approx(expected, abs=4 * found.coverage("values").se + 0.02)
    outer = found.histogram("values")
    assert bool((outer.counts[[0, -1]] > outer.high[[0, -1]]).all() if sign < 0 else True)
    assert bool((outer.counts[[0, -1]] < outer.expected).all() if sign > 0 else True)


def test_a_bias_is_caught_with_its_sign():
    found = run(Conditioned(shift=0.7))
    assert found.p_value < 0.002
    row = found.table()["values"]
    assert row["mean_rank"] < 0.5 - 4 * row["mean_rank_se"]
    assert found.uniformity("values") < 0.002


def test_ignoring_the_measurement_is_caught_by_the_log_likelihood_alone():
    found = run(Conditioned(blind=True))
    assert found.uniformity("log-likelihood") < 0.001
    assert all(found.uniformity(name) > 0.002 for name in found.members if name != "log-likelihood")
    assert found.p_value < 0.01


def test_gradient_guidance_is_caught():
    assert run(DPS(steps=30), truths=16).p_value < 0.002


# Ways in.


def test_a_problem_maker_and_a_decoder_give_what_the_operator_gives():
    prior = FieldPrior(PRIOR.spectrum * 4, 2 * PRIOR.mean - 1, decoder=Affine(SHAPE, 0.5, 0.5))

    seeds = set()

    def measured(truth, seed):
        seeds.add(seed)
        assert truth.shape == SHAPE
        assert 0.2 < float(truth.mean()) < 0.8  # physical units, not latent ones
        return Problem.simulate(A, truth, noise_std=NOISE, seed=seed)

    settings = {"truths": 8, "dtype": torch.float64}
    a = calibrate(A, prior, Conditioned(), noise_std=NOISE, **settings)
    b = calibrate(measured, prior, Conditioned(), **settings)
    assert len(seeds) == 8  # every truth has noise of its own
    assert all(torch.equal(a.members[name], b.members[name]) for name in a.members)


def test_other_truths_other_quantities_and_more_particles():
    prior = GaussianPrior(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    identity = Affine((3,), 1.0).linear
    quantities = {"sum": lambda x: x.sum(1), "two": lambda x: x[:, :2]}

    def solve_it(truth_sampler=None):
        return calibrate(
            identity,
            prior,
            Conditioned(),
            noise_std=0.5,
            draws=19,
            particles=40,
            quantities=quantities,
            truth_sampler=truth_sampler,
            dtype=torch.float64,
        )

    found = solve_it()
    assert {name: tuple(m.shape) for name, m in found.members.items()} == {
        "sum": (64, 20, 1),
        "two": (64, 20, 2),
        "log-likelihood": (64, 20, 1),
    }
    assert found.p_value > 0.005
    wide = solve_it(lambda n, seed: 3.0 * prior.sample(n, seed=seed))  # truths that the prior does not believe in
    assert wide.p_value < 0.002


def test_a_poisson_likelihood_is_calibrated_too():
    made = []

    def counted(truth, seed):
        generator = torch.Generator().manual_seed(seed >> 1)
        y = torch.poisson(50.0 * A(truth[None]).clamp_min(0.0), generator=generator)[0] / 50.0
        made.append(y)
        return Problem(likelihoods.Poisson(A, y, gain=1 / 50.0))

    found = calibrate(counted, PRIOR, DPS(steps=3), truths=3)
    assert len(made) == 3
    assert found.ranks["log-likelihood"].shape == (3, 1)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"draws": 18}, InputError, "19 draws"),
        ({"truths": 1}, InputError, "2 truths"),
        ({"particles": 20}, InputError, "20 particles"),
        ({"noise_std": None}, InputError, "noise_std"),
        ({"quantities": {"bad": lambda x: x}}, ShapeError, "'bad'"),
        ({"quantities": {"nan": lambda x: x.flatten(1).sum(1) / 0.0 * 0.0}}, InputError, "'nan'"),
        ({"truth_sampler": lambda n, seed: torch.zeros(n, 2)}, ShapeError, "truths"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        run(Conditioned(), **({"truths": 2} | change))


def test_a_prior_without_draws_is_told_so():
    class Bare:
        shape, sigma_min, sigma_max = SHAPE, 1e-3, 10.0

        def denoise(self, z, sigma):
            return PRIOR.denoise(z, sigma)

    with pytest.raises(CapabilityError, match="truth_sampler"):
        calibrate(A, Bare(), Conditioned(), noise_std=NOISE)


# The result.


def test_the_result_is_plain_and_plots():
    found = run(Conditioned(), truths=20)
    summary = found.summary()
    assert (summary["truths"], summary["draws"]) == (20, 31)
    assert set(summary["quantities"]) == {*default_quantities(SHAPE), "log-likelihood"}
    assert all(isinstance(v, (int, float)) for row in summary["quantities"].values() for v in row.values())
    assert "coverage 50" in str(found)
    axes = found.plot()
    assert len(axes) == 2 * len(found.members)
    axes[0].figure.canvas.draw()
    h = found.histogram("mean", bins=32)
    assert int(h.counts.sum()) == 20
    assert len(h.counts) == 32
    with pytest.raises(InputError, match="divide"):
        found.histogram("mean", bins=7)
    with pytest.raises(InputError, match="no quantity"):
        found.coverage("median")
    with pytest.raises(InputError, match="more than 31 draws"):
        found.coverage("mean", 0.99)


# The statistics.


def _uniform(truths, draws, q, seed, shared=0.0):
    """Members' ranks of exchangeable Gaussian members, their columns correlated."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(truths, draws + 1, q, generator=g, dtype=torch.float64)
    x = sqrt(shared) * x[:, :, :1] + sqrt(1 - shared) * x
    return torch.stack([statistics.ranks_of_all(row, g) for row in x])


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_p_values_are_uniform_for_exact_draws_however_dependent(shared):
    p = torch.tensor(
        [
            Calibration(
                members={"a": _uniform(12, 19, 5, seed, shared), "b": _uniform(12, 19, 1, seed, shared)},
                draws=19,
                evaluations=0.0,
                sampler="",
                seed=seed,
            ).p_value
            for seed in range(60)
        ]
    )
    for level in (0.1, 0.5):  # never more often than the level, beyond four standard errors
        assert float((p <= level).double().mean()) < level + 4 * sqrt(level * (1 - level) / 60)
    assert float((p <= 0.5).double().mean()) > 0.25  # nor idle


def test_ranks_break_ties_at_random_and_are_a_permutation():
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([[3.0], [1.0], [2.0]])
    assert statistics.ranks_of_all(x, g).flatten().tolist() == [2, 0, 1]
    ties = torch.stack([statistics.ranks_of_all(torch.zeros(4, 1), g)[0, 0] for _ in range(400)])
    counts = torch.bincount(ties, minlength=4)
    assert bool(((counts - 100).abs() < 4 * sqrt(400 * 0.25 * 0.75)).all())


@pytest.mark.parametrize("draws", [19, 30, 31])
def test_uniform_ranks_are_covered_exactly(draws):
    ranks = torch.arange(draws + 1)
    for level in (0.5, 0.83, 0.9):
        assert float(statistics.central_share(ranks, draws, level).mean()) == pytest.approx(level, abs=1e-12)


def test_tails_are_the_binomials():
    tails = statistics.two_sided_tails(10, 3)
    p = 0.5  # k = 2 of 4
    mass = [comb(10, c) * p**10 for c in range(11)]
    expected = [min(1.0, 2 * min(sum(mass[: c + 1]), sum(mass[c:]))) for c in range(11)]
    assert tails[1].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_simultaneous_band_holds_its_share_of_sequences():
    truths, draws, repeats = 30, 19, 4000
    g = torch.Generator().manual_seed(0)
    ranks = torch.randint(draws + 1, (repeats, truths), generator=g)
    low, high = statistics.simultaneous_band(truths, draws, 0.9)
    below = (ranks[:, :, None] < torch.arange(1, draws + 1)).sum(1)
    inside = float(((below >= low) & (below <= high)).all(1).double().mean())
    error = 4 * sqrt(0.9 * 0.1 / repeats)
    assert 0.9 - error < inside < 0.93 + error  # at least the level, and above it by what whole counts force


def test_proportions_have_the_intervals_of_clopper_and_pearson():
    low, high = statistics.proportion_interval(torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64))
    assert (low, high) == pytest.approx((0.4439045, 0.9747893), abs=1e-6)  # scipy.stats.binomtest(8, 10)
    assert statistics.proportion_interval(torch.ones(10, dtype=torch.float64))[1] == 1.0
    # Truths whose 16 values are one value tell as much as one each, independent ones more.
    g = torch.Generator().manual_seed(0)
    alone = (torch.rand(64, 1, generator=g) < 0.9).double()
    many = (torch.rand(64, 16, generator=g) < 0.9).double().mean(1)
    whole, fine = statistics.proportion_interval(alone.expand(64, 16).mean(1)), statistics.proportion_interval(many)
    assert whole == statistics.proportion_interval(alone[:, 0])
    assert fine[1] - fine[0] < 0.5 * (whole[1] - whole[0])


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 16, 12), (40,), (2, 4, 8, 8), (2,), (1,)])
def test_default_quantities_fit_every_shape(shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {name: f(x) for name, f in default_quantities(shape).items()}
    assert all(len(v) == 5 and bool(v.isfinite().all()) for v in values.values())
    # Frequencies are orthonormal on the mean over channels: they keep a plane wave's norm and see no constant.
    for name in {"low frequencies", "middle frequencies", "high frequencies"} & set(values):
        f = default_quantities(shape)[name]
        assert float(f(torch.ones(1, *shape, dtype=torch.float64)).abs().max()) < 1e-10
        basis = f(torch.eye(x[0].numel(), dtype=torch.float64).reshape(-1, *shape))
        gram = shape[0] * basis.T @ basis if len(shape) > 1 else basis.T @ basis
        assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-10)
    index = spread_values(shape, 16, torch.Generator().manual_seed(1))
    assert len(index.unique()) == len(index)
    assert int(index.max()) < x[0].numel()
    if shape == (3, 16, 12):
        assert len(index) == 16
        yx = torch.stack([(index % 192) // 12, index % 12], dim=1).double()
        apart = torch.cdist(yx, yx) + 100 * torch.eye(16)
        assert float(apart.min()) >= 2.0


# The benchmark.


def test_the_benchmark_runs_in_shares_and_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", {"truths": 3, "draws": 19, "evaluations": (2, 4)})
    monkeypatch.setattr(bench, "NAMES", ("PiGDM", "DPS", "DDRM", "Nobody"))
    monkeypatch.setattr(bench, "BLUR", (3, 0.6))
    prior = FieldPrior.power_law((3, 8, 8), exponent=2.0, std=0.2, mean=0.5)
    monkeypatch.setattr(bench, "load_prior", lambda name: prior)
    parts = [tmp_path / f"{i}.json" for i in range(2)]
    for i, part in enumerate(parts):
        bench.main(["--out", str(part), "--quick", "--worker", f"{i}/2"])
    out, text = tmp_path / "calibration.json", tmp_path / "table.md"
    bench.main(["--out", str(out), "--table", str(text), "--merge", *map(str, parts)])
    report = json.loads(out.read_text())
    jobs = {(r["task"], r["sampler"], r["wanted_evaluations"]) for key in ("rows", "left_out") for r in report[key]}
    assert jobs == set(bench.jobs((3, 8, 8), (2, 4)))
    gone = {r["sampler"]: r["reason"] for r in report["left_out"]}
    assert "is not among" in gone["Nobody"]
    pigdm = [r for r in report["rows"] if r["sampler"] == "PiGDM"]
    assert [(r["task"], r["evaluations"]) for r in pigdm] == [
        (task, k) for task in ("inpainting", "deblurring") for k in (2, 4)
    ]
    assert "steps=4" in pigdm[1]["settings"]
    for r in report["rows"]:
        assert sum(r["rank_histograms"]["mean"]) == pytest.approx(len(r["rank_histograms"]["mean"]), abs=1e-2)
        assert 0.0 < r["p_value"] <= 1.0
    assert report["truth_steps"] is None
    assert "| PiGDM | 4 + 0 | " in text.read_text()
    assert "Left out: Nobody at 4 passes, which is not among invdiff.samplers" in text.read_text()
    out.write_text(json.dumps(report | {"seed": 1}))
    with pytest.raises(InputError, match="different settings"):
        bench.merge([out, parts[0]])


def test_steps_are_found_for_a_number_of_evaluations():
    assert bench.at_cost(DAPS(), 100).steps == 50
    assert bench.at_cost(PiGDM(integrator=Heun()), 100).cost().forward == 99
    assert bench.at_cost(DAPS(ode_steps=9), 4).steps == 1
