"""SplitGibbs: its update against dense algebra, the bias of a finite rho, and the way to the exact posterior."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, field_problems
from invdiff.driver import Budget, Cost
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import AnnealedState, Levels
from invdiff.samplers.inner import ExactInner, Langevin
from invdiff.samplers.split_gibbs import SplitGibbs

F64 = torch.float64
SHAPE = (1, 4, 4)
NOISE = 0.3


def field() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)


def mask() -> Operator:
    return operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE)


def problem(seed: int = 1) -> Problem:
    return Problem.simulate(mask(), field().sample(1, seed=3)[0], noise_std=NOISE, seed=seed)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


# The update.


@pytest.mark.parametrize("prior_steps", [1, 3])
def test_one_step_is_that_of_dense_algebra(prior_steps):
    posterior, prior = Posterior(problem(), field(), dtype=F64), field()
    sampler = SplitGibbs(steps=5, prior_steps=prior_steps)
    x = torch.randn(1, 6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    found, info = sampler.step(posterior, AnnealedState(z=x, step=2), noise=Noise([7], 6, dtype=F64).at(3))

    noise = Noise([7], 6, dtype=F64).at(3)
    ladder = sampler.ladder(posterior)
    rho, eye = ladder[2], torch.eye(16, dtype=F64)
    m, S = prior.mean.flatten(), prior.covariance
    z = x[0].flatten(1)
    for j in range(prior_steps):
        s, t = rho * math.sqrt(1 - j / prior_steps), rho * math.sqrt(1 - (j + 1) / prior_steps)
        score = -torch.linalg.solve(S + s**2 * eye, (z - m).T).T
        z = z + (s**2 - t**2) * score + math.sqrt(s**2 - t**2) * noise.like(x)[0].flatten(1)
    A, y = posterior.linear.operator(eye.reshape(16, *SHAPE)).flatten(1).T, posterior.linear.measurement.flatten()
    z = z + rho * noise.like(x)[0].flatten(1)
    eps = noise.normal(noise.slots, posterior.linear.operator.out_shape).flatten(1)
    gain = rho**2 * A.T @ torch.linalg.inv(NOISE**2 * torch.eye(len(A), dtype=F64) + rho**2 * A @ A.T)
    expected = z + (y - z @ A.T - NOISE * eps) @ gain.T
    torch.testing.assert_close(found.z[0].flatten(1), expected, rtol=1e-10, atol=1e-10)
    assert found.step == 3
    assert info.sigma == ladder[3]


@pytest.mark.parametrize("prior_steps", [1, 2, 5])
def test_z_given_x_is_as_wide_as_rho_where_the_prior_is_broad(prior_steps):
    broad = FieldPrior.power_law(SHAPE, 0.0, 100.0)
    posterior = Posterior(problem(), broad, dtype=F64)
    n, rho = 4000, 0.5
    x = torch.zeros(1, n, *SHAPE, dtype=F64)
    z = SplitGibbs(prior_steps=prior_steps).reverse(posterior, x, rho, Noise([1], n, dtype=F64))
    assert abs(float(z.var()) / rho**2 - 1.0) < 4.5 * math.sqrt(2 / z.numel()) + 1e-3


def test_a_network_is_never_asked_below_its_sigma_min():
    seen = []

    class Asked:
        shape, sigma_min, sigma_max = SHAPE, 0.05, 20.0

        def denoise(self, z, sigma):
            seen.append(float(sigma))
            return z / (1.0 + float(sigma) ** 2)

    invdiff.solve(problem(), Asked(), SplitGibbs(steps=4, prior_steps=9), draws=2)
    assert min(seen) == 0.05


# The law.


def test_a_finite_rho_widens_by_what_its_text_says():
    """At one rho, with K = 1, the chain's variance is rho^2 (2 + a) / ((1 + a)^2 - (1 + u)^-2), value by value."""
    prior, rho, n = FieldPrior.power_law(SHAPE, 0.0, 1.0, sigma_min=1e-3, sigma_max=100.0), 0.3, 3000
    sampler = SplitGibbs(steps=60, levels=Levels(sigma_min=rho, sigma_max=rho * (1 + 1e-9)))
    draws = invdiff.solve(problem(), prior, sampler, draws=n, dtype=F64).draws
    variance = draws.var(0).flatten()
    observed = torch.arange(16) % 4 > 0
    u = rho**2
    for where, precision in ((observed, 1 / NOISE**2), (~observed, 0.0)):
        a = rho**2 * precision
        expected = rho**2 * (2 + a) / ((1 + a) ** 2 - (1 + u) ** -2)
        spread = math.sqrt(2 / (n * int(where.sum())))
        assert abs(float(variance[where].mean()) / expected - 1.0) < 4.5 * spread
        # The first order that the text gives, for a small rho; the posterior's variance is rho^2 / (a + u).
        b, v = a / 100, u / 100
        ratio = (b + v) * (2 + b) / ((1 + b) ** 2 - (1 + v) ** -2)
        assert ratio - 1.0 == pytest.approx((b * v + 3 * v**2) / (2 * (b + v)), rel=0.02)


def test_error_falls_with_steps_and_reaches_the_bounds_of_exact_draws():
    # The sampler declares itself exact: check_sampler raises where its figures at 400 steps are not.
    report = check_sampler(SplitGibbs(), problems=field_problems(8)[:1], steps=(10, 30, 100, 400), draws=300)
    assert report.exact
    for row in report.rows.values():
        errors = [r.whitened - 1.0 for r in row]
        for coarse, fine in itertools.pairwise(errors):
            assert abs(fine) < coarse, errors
        # As the text has it, with four standard deviations of 300 draws of 64 values.
        spread = 4 * math.sqrt(2 / (300 * 64))
        assert 0.02 - spread < errors[2] < 0.08 + spread
        assert abs(errors[3]) < 0.04 + spread


def test_only_exact_inner_draws_are_called_exact():
    assert SplitGibbs().exact
    assert not SplitGibbs(inner=Langevin()).exact


def test_langevin_draws_of_x_come_near_the_exact_ones():
    posterior = Posterior(problem(), field(), dtype=F64)
    exact = field().posterior(mask(), posterior.linear.measurement[0], NOISE)
    solution = posterior.sample(SplitGibbs(steps=60, inner=Langevin(steps=20)), 200)
    ratio = (solution.std() / exact.std) ** 2
    # The steps' own excess is at most 1 / (1 - 0.3 / 2), that of rho and of 60 levels 0.1.
    assert float(ratio.mean()) < 1.1 / (1 - 0.15)
    assert float(ratio.mean()) > 1.0 - 4 * math.sqrt(2 / 200)
    assert float(((solution.mean() - exact.mean) / exact.std).abs().max()) < 4.5 / math.sqrt(200) + 0.1


# The ladder.


def test_the_ladder_follows_the_measurement_and_stays_in_the_priors_levels():
    def of(noise_std, **levels):
        linear = Problem(likelihoods.Gaussian(mask(), torch.zeros(1, *mask().out_shape), noise_std))
        return SplitGibbs(steps=6, levels=Levels(**levels)).ladder(Posterior(linear, field()))

    ladder = of(0.3)
    assert ladder[0] == pytest.approx(100.0 / 8)
    assert ladder[5] == pytest.approx(0.03)  # 0.1 noise_std / ||A||
    assert ladder[6] == 0.0
    assert list(ladder) == sorted(ladder, reverse=True)
    assert of(1e-5)[5] == pytest.approx(1e-3)  # the prior's sigma_min
    assert of(50.0)[5] == pytest.approx(0.1)  # a thousandth of its sigma_max
    assert of(0.3, sigma_min=0.5, sigma_max=2.0)[:6:5] == pytest.approx((2.0, 0.5))


# The contract.


def test_micro_batches_and_several_problems_give_the_same_draws():
    problems, sampler = [problem(1), problem(2)], SplitGibbs(steps=8, prior_steps=2)
    alone = [invdiff.solve(p, field(), sampler, draws=5, dtype=F64).draws for p in problems]
    together = invdiff.solve(problems, field(), sampler, draws=5, dtype=F64)
    small = Posterior(problems[0], field(), dtype=F64, micro_batch=2).sample(sampler, 5).draws
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b.draws, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone[0], small, rtol=0, atol=1e-10)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_cost_is_what_is_counted():
    sampler = SplitGibbs(steps=7, prior_steps=3)
    solution = invdiff.solve(problem(), field(), sampler, draws=4)
    assert sampler.cost() == Cost(21)
    assert solution.about["evaluations_per_draw"] == 21
    assert solution.trace[-1].sigma == 0.0


def test_what_it_cannot_do_is_refused():
    y = torch.zeros(1, *SHAPE, dtype=F64)
    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), y, 0.5))
    for sampler in (SplitGibbs(), SplitGibbs(inner=Langevin())):
        with pytest.raises(CapabilityError, match="SplitGibbs needs linear"):
            invdiff.solve(bent, field(), sampler)
    able = SplitGibbs(steps=40, inner=Langevin(steps=10, slope=1.3))
    solution = invdiff.solve(bent, field(), able, draws=50, dtype=F64)
    assert 0.5 < solution.trace[-1].misfit < 1.5
    with pytest.raises(SamplingError, match="no draws before its end"):
        Posterior(problem(), field()).sample(SplitGibbs(steps=9), 2, budget=Budget(max_evaluations=4))


def test_settings_out_of_range_are_refused():
    for settings in ({"steps": 0}, {"prior_steps": 0}):
        with pytest.raises(InputError, match="at least one step, got 0"):
            SplitGibbs(**settings)
    for levels in (Levels(sigma_max=1e4), Levels(sigma_min=1e-6), Levels(sigma_min=50.0)):
        with pytest.raises(InputError, match="do not lie within the prior's"):
            invdiff.solve(problem(), field(), SplitGibbs(levels=levels, inner=ExactInner()), draws=2)
