"""The mixtures' benchmark: its problems and measures against closed forms, its bounds at a small size, its page."""

import json
import math

import pytest
import torch
from torch import Tensor

from invdiff.bench import mixtures as bench
from invdiff.bench.mixtures_jobs import QUICK, Job, Plan, jobs
from invdiff.bench.mixtures_table import EXACT, UNWEIGHTED, W2_BOUNDS, WEIGHTED, Gate, gates, slope, table
from invdiff.diagnostics.mixture_measures import Sliced, mode_shares, split_r_hat, total_variation
from invdiff.diagnostics.mixtures import (
    matrix,
    mixture_problem,
    parted_modes,
    plane_modes,
    random_mixture,
    wide_mixture,
)
from invdiff.diagnostics.ring import SECTORS, ring_problem
from invdiff.errors import InputError, ShapeError
from invdiff.integrators import Heun
from invdiff.posterior import Posterior
from invdiff.priors import MixturePrior
from invdiff.samplers import DMCMC, DPS, Systematic, TransportLangevin

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def one_mode(mean: Tensor, covariance: Tensor) -> MixturePrior:
    return MixturePrior(torch.ones(1, dtype=F64), mean.reshape(1, 1, -1, 1), covariance[None])


# The problems.


@pytest.mark.parametrize(
    "case",
    [random_mixture(2), random_mixture(4, 3), plane_modes(), parted_modes(2.5)],
    ids=lambda case: case.name,
)
def test_the_posterior_is_bayes_rule(case):
    """Prior times likelihood over posterior is the evidence, wherever it is taken."""
    d, problem = case.prior.size, case.problem
    z = case.exact.sample(20, seed=1) + 0.3 * normal(20, 1, d, 1)
    joint = case.prior.log_prob(z) + problem.likelihood.log_prob(z)
    expected = torch.full((20,), case.exact.log_evidence, dtype=F64)
    torch.testing.assert_close(joint - case.exact.log_prob(z), expected, rtol=1e-9, atol=1e-9)


def test_measurements_differ_and_priors_do_not():
    first, second = wide_mixture(1), wide_mixture(2)
    assert first.prior.key == second.prior.key
    assert first.problem.key != second.problem.key
    assert total_variation(first.exact.law.weights, second.exact.law.weights) > 0.1
    # Live modes: the measurement leaves several of them in most cases.
    largest = [float(wide_mixture(i).exact.law.weights.max()) for i in range(1, 17)]
    assert sum(w < 0.9 for w in largest) >= 8
    with pytest.raises(InputError, match="mixtures in 2, 4, 8 dimensions; got 3"):
        random_mixture(3)


def test_modes_lie_as_far_apart_as_they_say():
    for apart in (2.5, 6.0):
        means = parted_modes(apart).prior.means.flatten(1)
        distances = torch.pdist(means)
        torch.testing.assert_close(distances, torch.full_like(distances, apart))


def test_the_ring_is_integrated():
    case = ring_problem()
    n, y, std = 100_000, 2.5, 0.2
    # The evidence is the mean likelihood of the prior's draws.
    x = case.prior.sample(n, seed=3)
    likelihood = (-0.5 * ((x.flatten(1).norm(dim=1) - y) / std) ** 2).exp() / (std * math.sqrt(2.0 * math.pi))
    error = 4.5 * float(likelihood.std()) / math.sqrt(n)
    assert abs(float(likelihood.mean()) - math.exp(case.log_evidence)) < error
    draws = case.sample(20_000, seed=1)
    mean, deviation = case.radius
    found = case.radius_of(draws)
    assert abs(found[0] - mean) < 4.5 * deviation / math.sqrt(20_000)
    assert abs(found[1] / deviation - 1.0) < 4.5 / math.sqrt(2 * 20_000)
    # The total variation of multinomial shares: half the sum of sqrt(2 p (1 - p) / (pi n)) in the mean.
    p = case.angles
    assert len(p) == SECTORS
    assert float(p.sum()) == pytest.approx(1.0)
    floor = float((2.0 * p * (1.0 - p) / (math.pi * 20_000)).sqrt().sum()) / 2.0
    assert case.angle_error(draws) == pytest.approx(floor, rel=0.4)
    with pytest.raises(InputError, match=r"radii from 0 to 4 less five deviations.* got y = 3\.5"):
        ring_problem(3.5)
    assert case.angle_error(draws, draws[:, 0, 0, 0]) > 10.0 * floor  # weights exp(x), which turn the law


# The measures.


def test_sliced_distances_of_gaussians_are_known():
    """Along theta W2^2 = (theta.(m - m'))^2 + (s - s')^2 between Gaussians."""
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=F64)
    law, other = (Sliced.of_mixture(one_mode(m, c)) for m, c in (
        (torch.zeros(2, dtype=F64), covariance), (torch.tensor([1.0, -2.0], dtype=F64), 2.25 * covariance)
    ))  # fmt: skip
    theta = law.directions
    std = torch.einsum("dp,de,ep->p", theta, covariance, theta).sqrt()
    quantiles = torch.special.ndtri((torch.arange(1000, dtype=F64) + 0.5) / 1000)
    torch.testing.assert_close(law.quantiles, quantiles[:, None] * std, rtol=0.0, atol=1e-7)
    found = (law.quantiles - other.quantiles).square().mean(0)
    exact = (theta.T @ torch.tensor([1.0, -2.0], dtype=F64)) ** 2 + (0.5 * std) ** 2
    torch.testing.assert_close(found, exact, rtol=0.01, atol=1e-3)  # of 1000 levels the midpoint rule cuts the tails


def test_the_distance_of_exact_draws_is_its_floor_and_weights_count():
    case = plane_modes(2.6)
    reference = Sliced.of_mixture(case.exact.law)
    floors = {n: math.sqrt(sum(reference.distance(case.exact.sample(n, seed=s)) ** 2 for s in range(8)) / 8)
              for n in (200, 3200)}  # fmt: skip
    assert floors[200] / floors[3200] == pytest.approx(4.0, rel=0.35)
    # Draws of the prior, weighted by the likelihood, are the posterior's; unweighted they are not.
    z = case.prior.sample(20_000, seed=4)
    log_weights = case.problem.likelihood.log_prob(z)
    assert reference.distance(z, log_weights) < 4.0 * floors[3200] < 0.2 < reference.distance(z)
    assert Sliced.of_draws(case.exact.sample(30_000)).distance(z, log_weights) < 4.0 * floors[3200]
    with pytest.raises(ShapeError, match="2 dimensions, these draws 3"):
        reference.distance(normal(10, 3))


def test_shares_of_modes():
    case = parted_modes()
    n = 20_000
    draws = case.exact.sample(n, seed=5)
    law = case.exact.law
    assert total_variation(mode_shares(draws, law), law.weights) < 4.5 * 0.5 / math.sqrt(n)
    # All in one mode: what the others weigh is missing.
    alone = law.means[:1].expand(10, 1, 2, 1)
    assert total_variation(mode_shares(alone, law), law.weights) == pytest.approx(1 - float(law.weights[0]), abs=1e-3)
    log_weights = torch.where(law.responsibilities(draws)[:, 0] > 0.5, 0.0, -math.inf)
    assert float(mode_shares(draws, law, log_weights)[0]) > 0.99


def test_split_r_hat_of_known_chains():
    """W and B by hand: two chains of [0, 1, 0, 1] and [2, 3, 2, 3] have W = 1/2, half-means 1/2, 1/2, 5/2, 5/2."""
    chains = torch.tensor([[0.0, 1.0, 0.0, 1.0], [2.0, 3.0, 2.0, 3.0]], dtype=F64)[:, :, None]
    between = 2 * (4 * 1.0 / 3)
    assert split_r_hat(chains) == pytest.approx(math.sqrt((0.5 + between) / (2 * 0.5)))
    assert split_r_hat(normal(4, 5000, 3)) < 1.002
    drifting = normal(4, 5000, 1) + torch.linspace(0.0, 2.0, 5000, dtype=F64)[None, :, None]
    assert split_r_hat(drifting) > 1.05  # chains that agree, but not with themselves
    with pytest.raises(ShapeError, match="at least 4 draws, got 3"):
        split_r_hat(normal(2, 3, 1))


# The bounds, at a size for every day.


@pytest.mark.parametrize("d", [2, 4])
def test_weighted_transport_keeps_the_bound_and_others_fail_it(d):
    """Bounds of 4096 particles, times sqrt(4096 / n), and of the evidence with four standard errors of its mean."""
    case, n, chains = random_mixture(d), 512, 6
    bound = W2_BOUNDS[case.name] * math.sqrt(4096 / n)
    reference, posterior = Sliced.of_mixture(case.exact.law), Posterior(case.problem, case.prior, dtype=F64)

    def rms(sampler) -> tuple[float, Tensor | None]:
        solution = posterior.sample(sampler, n, chains=chains, seed=3)
        squares = [reference.distance(r.z, r.log_weights) ** 2 for r in bench.ensembles(solution)]
        return math.sqrt(sum(squares) / chains), solution.chain_log_evidence

    weighted = TransportLangevin(steps=20, integrator=Heun(), resampling=Systematic())
    assert weighted.cost().forward == 119
    found, evidence = rms(weighted)
    assert found < bound
    error = evidence - case.exact.log_evidence
    assert abs(float(error.mean())) < 0.15 + 4.0 * float(error.std()) / math.sqrt(chains)
    assert rms(TransportLangevin(steps=24))[0] > 3.0 * bound
    assert rms(DPS(steps=120, scale=0.1))[0] > 2.0 * bound


# The file and its page.


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict:
    """Three samplers in every part that has them, by two workers, joined."""
    folder = tmp_path_factory.mktemp("mixtures")
    only = [EXACT, WEIGHTED, UNWEIGHTED]
    parts = [folder / f"{i}.json" for i in range(2)]
    for i, part in enumerate(parts):
        bench.main(["--quick", "--out", str(part), "--worker", f"{i}/2", "--only", *only])
    out, page = folder / "mixtures.json", folder / "mixtures_table.md"
    bench.main(["--merge", *map(str, parts), "--out", str(out), "--table", str(page)])
    return json.loads(out.read_text()) | {"page": page.read_text(), "path": out}


def test_a_quick_run_has_every_part_in_order_and_one_page(quick):
    report = {k: v for k, v in quick.items() if k not in {"page", "path"}}
    keys = [bench.key_of(r) for r in report["rows"]]
    plan = [job.key for job in jobs(QUICK)]
    assert keys == [k for k in plan if k in set(keys)]
    assert {r["part"] for r in report["rows"]} == {job.part for job in jobs(QUICK)} - {"steps"}
    assert quick["page"] == table(report, quick["path"].as_posix())
    assert "too few particles for the bounds" in quick["page"]
    own = next(r for r in report["rows"] if r["sampler"] == WEIGHTED and r["part"] == "mixtures")
    free = next(r for r in report["rows"] if r["sampler"] == UNWEIGHTED and r["part"] == "mixtures")
    assert own["evaluations"] == 119
    assert own["w2"]["rms"] < 0.3 < free["w2"]["rms"]
    assert f"| {own['w2']['rms']:.4f} |" in quick["page"]


def test_chains_are_compared_four_by_four_and_warnings_kept():
    sampler = DMCMC(burn_in=20, keep=20, steps=3)
    job = Job(part="chains", problem="modes-2.5-apart", label="DMCMC", sampler=sampler, particles=40, runs=8)
    row = bench.run(job, None)
    assert row["evaluations"] == 3 * (20 / 20 + 3)
    assert 0.97 < row["r_hat"]["mean"] < row["r_hat"]["max"] < 2.0
    assert row["joint_mode_error"]["rms"] < row["mode_error"]["rms"] < 0.6
    assert all("ladder is too short" in w for w in row["warnings"])
    assert len(row["warnings"]) == 1


def test_rows_run_again_take_the_place_of_their_old_ones(quick):
    report = {k: v for k, v in quick.items() if k not in {"page", "path"}}
    row = report["rows"][1]
    changed = report | {"rows": [row | {"w2": row["w2"] | {"rms": 9.0}}]}
    joined = bench.merge([report, changed])
    assert len(joined["rows"]) == len(report["rows"])
    assert joined["rows"][1]["w2"]["rms"] == 9.0
    with pytest.raises(InputError, match="One file's device is cpu, another's gpu"):
        bench.merge([report, report | {"device": "gpu"}])


def test_every_row_of_the_plan_has_a_key_of_its_own():
    keys = [job.key for job in jobs(Plan())]
    assert len(set(keys)) == len(keys)


def test_bounds_are_judged_by_the_figures():
    def row(part: str, problem: str, sampler: str, **figures) -> dict:
        head = {"part": part, "problem": problem, "sampler": sampler, "steps": 20, "particles": 4096, "runs": 16}
        return head | {"evaluations": 20.0, "backward": 0.0, "warnings": []} | figures

    def figure(value: float) -> dict:
        return {"mean": value, "se": 0.01, "rms": abs(value), "max": abs(value)}

    def kept(w2: float, evidence: float) -> list[bool]:
        rows = [
            row("mixtures", "mixture-2", "exact draws", w2=figure(0.014)),
            row("mixtures", "mixture-2", WEIGHTED, w2=figure(w2), evidence_error=figure(evidence)),
        ]
        return [g.met for g in gates({"rows": rows})]

    assert kept(0.02, -0.1) == [True, True]
    assert kept(0.03, -0.1) == [False, True]
    assert kept(0.02, -0.2) == [True, False]

    def order(biases: list[float]) -> Gate:
        rows = [
            row("steps", "mixture-4", "AFDPS, half", evidence_error=figure(b)) | {"steps": 30 * 2**i}
            for i, b in enumerate(biases)
        ]
        (gate,) = gates({"rows": rows})
        return gate

    assert order([-0.8, -0.4, -0.2, -0.1]).met
    assert not order([-0.8, -0.8, -0.8, -0.8]).met
    assert not order([-0.8, -0.2, -0.05, -0.0125]).met
    assert slope([(0.0, 1.0, 1.0), (1.0, 3.0, 1.0), (2.0, 5.0, 1.0)])[0] == pytest.approx(2.0)


def test_a_measurement_may_be_given_or_simulated():
    prior = one_mode(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    A = matrix(torch.tensor([[1.0, 0.0]], dtype=F64))
    given = mixture_problem("given", prior, A, 1.0, y=torch.full((1, 1, 1), 2.0, dtype=F64))
    torch.testing.assert_close(given.exact.mean.flatten(), torch.tensor([1.0, 0.0], dtype=F64))
    assert given.exact.log_evidence == pytest.approx(-0.5 * (4.0 / 2.0 + math.log(2.0 * math.pi * 2.0)))
    simulated = mixture_problem("simulated", prior, A, 1.0, seed=3)
    assert simulated.problem.reference is not None
    assert simulated.name == simulated.problem.name == "simulated"
