"""ULA: its update against dense algebra, its stationary law, and runs that stop early."""

import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.driver import Budget, Cost, State
from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.inner import smoothing, stiffness
from invdiff.samplers.ula import ULA

F64 = torch.float64
SHAPE = (1, 4, 4)
NOISE = 0.5


def field() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)


def mask() -> Operator:
    return operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE)


def problem(seed: int = 1) -> Problem:
    return Problem.simulate(mask(), field().sample(1, seed=3)[0], noise_std=NOISE, seed=seed)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def bent() -> Problem:
    return Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), torch.zeros(1, *SHAPE, dtype=F64), 0.5))


def dense(sigma: float, rate: float) -> tuple[Tensor, Tensor, float]:
    """Precision and mean of p_sigma(z) p(y | z), and the step size."""
    posterior, eye = Posterior(problem(), field(), dtype=F64), torch.eye(16, dtype=F64)
    A, y = posterior.linear.operator(eye.reshape(16, *SHAPE)).flatten(1).T, posterior.linear.measurement.flatten()
    smoothed = torch.linalg.inv(field().covariance + sigma**2 * eye)
    precision = smoothed + A.T @ A / NOISE**2
    mean = torch.linalg.solve(precision, smoothed @ field().mean.flatten() + A.T @ y / NOISE**2)
    return precision, mean, rate / (1 / sigma**2 + 1 / NOISE**2)  # ||A|| = 1


def test_one_step_is_that_of_dense_algebra():
    posterior, sampler = Posterior(problem(), field(), dtype=F64), ULA(sigma=0.2, rate=0.7)
    z = torch.randn(1, 6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    found, info = sampler.step(posterior, State(z=z, step=4), noise=Noise([7], 6, dtype=F64).at(5))
    precision, mean, e = dense(0.2, 0.7)
    eps = Noise([7], 6, dtype=F64).at(5).like(z)[0].flatten(1)
    flat = z[0].flatten(1)
    expected = flat - e * (flat - mean) @ precision + math.sqrt(2 * e) * eps
    torch.testing.assert_close(found.z[0].flatten(1), expected, rtol=1e-10, atol=1e-10)
    assert (found.step, info.sigma) == (5, 0.2)
    assert info.misfit == pytest.approx(posterior.misfit(found.z))


def test_walkers_reach_the_stationary_law():
    """Unadjusted steps on a Gaussian of precision L have the covariance L^{-1} (1 - e L / 2)^{-1}."""
    n, sigma, rate = 1500, 0.4, 1.0
    draws = invdiff.solve(problem(), field(), ULA(steps=150, sigma=sigma, rate=rate), draws=n, dtype=F64).draws
    precision, mean, e = dense(sigma, rate)
    values, vectors = torch.linalg.eigh(precision)
    assert float((1 - e * values).abs().max()) ** 150 < 1e-4  # mixed
    x = (draws.flatten(1) - mean) @ vectors
    ratio = x.square().mean(0) * values * (1 - e * values / 2)
    assert float((ratio - 1).abs().max()) < 4.5 * math.sqrt(2 / n)
    # What is left is the bias that the text states: too wide, and not an error of the draws.
    exact = field().posterior(mask(), Posterior(problem(), field(), dtype=F64).linear.measurement[0], NOISE)
    assert float((draws.var(0) / exact.std**2).mean()) > 1.05
    assert not ULA().exact


def test_a_run_stopped_early_keeps_its_walkers():
    posterior = Posterior(problem(), field(), dtype=F64)
    stopped = posterior.sample(ULA(steps=1000), 5, budget=Budget(max_evaluations=20))
    whole = posterior.sample(ULA(steps=20), 5)
    assert ULA.anytime
    assert len(stopped.trace) == 20
    assert torch.equal(stopped.draws, whole.draws)
    assert whole.about["evaluations_per_draw"] == 20
    assert ULA(steps=20).cost() == Cost(20)
    assert {info.sigma for info in whole.trace} == {0.1}  # 0.2 noise_std / ||A||


def test_a_checkpoint_resumes_the_same_walk(tmp_path):
    def interrupt(state, info):
        if state.step == 6:
            raise KeyboardInterrupt

    posterior, path = Posterior(problem(), field(), dtype=F64), tmp_path / "walk.safetensors"
    with pytest.raises(KeyboardInterrupt):
        posterior.sample(ULA(steps=15), 3, checkpoint=path, callback=interrupt)
    resumed = posterior.sample(ULA(steps=15), 3, checkpoint=path)
    assert torch.equal(resumed.draws, posterior.sample(ULA(steps=15), 3).draws)


def test_walkers_start_about_the_mean_at_their_own_level():
    n = 500
    state = ULA().init(Posterior(problem(), field(), dtype=F64), 2, n, noise=Noise([1, 2], n, dtype=F64))
    assert state.z.shape == (2, n, *SHAPE)
    spread = 1 / math.sqrt(2 * n * 16)
    assert abs(float(state.z.mean()) - 0.2) < 0.1 * 4.5 * spread + 1e-4
    assert abs(float(state.z.std()) / 0.1 - 1) < 4.5 * spread / math.sqrt(2)


def test_micro_batches_and_several_problems_give_the_same_draws():
    problems, sampler = [problem(1), problem(2)], ULA(steps=12)
    alone = [invdiff.solve(p, field(), sampler, draws=5, dtype=F64).draws for p in problems]
    together = invdiff.solve(problems, field(), sampler, draws=5, dtype=F64)
    small = Posterior(problems[0], field(), dtype=F64, micro_batch=2).sample(sampler, 5).draws
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b.draws, rtol=0, atol=1e-10)
    torch.testing.assert_close(alone[0], small, rtol=0, atol=1e-10)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


def test_the_level_follows_the_measurement_and_stays_in_the_priors_levels():
    def of(noise_std, share=0.2, slope=None):
        linear = Problem(likelihoods.Gaussian(mask(), torch.zeros(1, *mask().out_shape), noise_std))
        return smoothing(Posterior(linear, field()), slope, share)

    assert of(0.3) == pytest.approx(0.06)
    assert of(0.3, slope=2.0) == pytest.approx(0.03)
    assert of(1e-4) == 1e-3  # the prior's sigma_min
    assert of(50.0) == pytest.approx(0.1)  # a thousandth of its sigma_max


def test_a_problem_that_is_not_linear_needs_its_slope():
    with pytest.raises(CapabilityError, match="ULA needs linear"):
        invdiff.solve(bent(), field(), ULA(), draws=2)
    with pytest.raises(CapabilityError, match="needs slope"):
        stiffness(Posterior(bent(), field()), None)
    assert stiffness(Posterior(bent(), field()), 1.3) == pytest.approx(2.6)
    solution = invdiff.solve(bent(), field(), ULA(steps=300, slope=1.3), draws=50, dtype=F64)
    assert 0.5 < solution.trace[-1].misfit < 1.5


def test_the_prior_alone_where_nothing_is_measured():
    """A measurement of all but infinite noise leaves p_sigma."""
    prior = GaussianPrior(torch.zeros(2, dtype=F64), 0.5 * torch.eye(2, dtype=F64), sigma_min=1e-3, sigma_max=10.0)
    blind = Problem(likelihoods.Gaussian(operators.Affine((2,)), torch.zeros(1, 2, dtype=F64), 1e6))
    sampler = ULA(steps=200, sigma=0.5, rate=0.1, slope=1.0)
    draws = invdiff.solve(blind, prior, sampler, draws=3000, dtype=F64).draws
    expected = 0.75 / (1 - 0.1 * 0.25 / 0.75 / 2)
    assert abs(float(draws.var()) / expected - 1) < 4.5 * math.sqrt(2 / 6000)


def test_settings_out_of_range_are_refused():
    with pytest.raises(InputError, match="at least one step, got 0"):
        ULA(steps=0)
    for rate in (0.0, 2.0):
        with pytest.raises(InputError, match="rate lies in"):
            ULA(rate=rate)
    with pytest.raises(InputError, match="slope is a positive bound"):
        ULA(slope=0.0)
    for sigma in (1e-6, 1e4):
        with pytest.raises(InputError, match="does not lie within the prior's levels"):
            invdiff.solve(problem(), field(), ULA(sigma=sigma), draws=2)
