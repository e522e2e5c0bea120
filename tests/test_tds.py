"""The twisted diffusion sampler: its weights against dense algebra, its law and evidence against exact posteriors."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, plane_problem
from invdiff.diagnostics.mixture_measures import mode_shares, total_variation
from invdiff.diagnostics.mixtures import plane_modes
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.metrics import sliced_wasserstein
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.priors import GaussianPrior, MixturePrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import Levels
from invdiff.samplers.particles import Stratified
from invdiff.samplers.tds import TDS, TwistedState

F64 = torch.float64
SHAPE = (1, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Matrix(LinearOperator):
    """A dense matrix on flattened events, without an SVD."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(shape, (len(matrix),))
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.mT.to(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y)).reshape(-1, *self.in_shape)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def pictures() -> MixturePrior:
    b = normal(2, 16, 16, seed=3)
    covariances = b @ b.mT / 16.0 + 0.2 * torch.eye(16, dtype=F64)
    return MixturePrior(
        torch.tensor([0.4, 0.6]), normal(2, *SHAPE, seed=1), covariances, sigma_min=1e-2, sigma_max=60.0
    )


def blurred() -> Problem:
    A = operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="circular")
    return Problem(likelihoods.Gaussian(A, normal(1, *SHAPE, seed=2), 0.3))


def mixed(seed: int = 5, noise_std: float | Tensor = 0.3) -> Problem:
    A = Matrix(normal(6, 16, seed=4) / 4.0, SHAPE)
    return Problem(likelihoods.Gaussian(A, normal(1, 6, seed=seed), noise_std))


def log_twist(posterior: Posterior, prior: MixturePrior, z: Tensor, sigma: float, tau: float) -> Tensor:
    """Log psi by dense matrices."""
    linear = posterior.linear
    A = linear.operator(torch.eye(16, dtype=F64).reshape(-1, *SHAPE)).flatten(1).mT
    gram = A @ A.mT if linear.has_svd else torch.eye(len(A), dtype=F64) * torch.linalg.matrix_norm(A, 2) ** 2
    noise = torch.broadcast_to(linear.noise_std**2, linear.operator.out_shape).flatten().diag()
    r2 = sigma**2 * tau**2 / (sigma**2 + tau**2)
    law = torch.distributions.MultivariateNormal(linear.measurement[0].flatten(), noise + r2 * gram)
    return law.log_prob(prior.denoise(z, sigma).flatten(1) @ A.mT)


PROBLEMS = [blurred(), mixed(), mixed(noise_std=torch.linspace(0.2, 0.6, 6, dtype=F64))]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["svd", "no-svd", "diagonal"])
def test_steps_are_those_of_dense_algebra(problem):
    prior, n, tau = pictures(), 4, 1.3
    posterior, sampler = Posterior(problem, prior, dtype=F64), TDS(steps=12, prior_std=tau, threshold=0.0)
    levels = sampler.levels.of(posterior, 12)
    # ||A|| of an operator without an SVD is found by power iteration, to 1e-6.
    tolerance = 1e-9 if posterior.linear.has_svd else 1e-5
    state = sampler.init(posterior, 1, n, noise=Noise([7], n, dtype=F64).at(0))
    expected = log_twist(posterior, prior, state.z[0], levels[0], tau)
    torch.testing.assert_close(state.log_weights[0], expected, rtol=tolerance, atol=tolerance)
    for k in range(12):
        sigma, after = levels[k], levels[k + 1]
        new, info = sampler.step(posterior, state, noise=Noise([7], n, dtype=F64).at(k + 1))
        assert info.sigma == after
        z, x = state.z[0].clone().requires_grad_(), new.z[0]
        before = log_twist(posterior, prior, z, sigma, tau)
        (g,) = torch.autograd.grad(before.sum(), z)
        z, D = z.detach(), prior.denoise(z.detach(), sigma)
        if after == 0.0:
            torch.testing.assert_close(x, D)
            increment = posterior.log_likelihood(D) - before.detach()
        else:
            m = D + (after / sigma) ** 2 * (z - D)
            v = (sigma**2 - after**2) * after**2 / sigma**2
            eps = Noise([7], n, dtype=F64).at(k + 1).like(state.z)[0]
            torch.testing.assert_close(x, m + v * g + math.sqrt(v) * eps, rtol=tolerance, atol=tolerance)
            own, proposal = (torch.distributions.Normal(c, math.sqrt(v)) for c in (m, m + v * g))
            ratio = (own.log_prob(x) - proposal.log_prob(x)).flatten(1).sum(1)
            increment = ratio + log_twist(posterior, prior, x, after, tau) - before.detach()
        found = (new.log_weights - state.log_weights)[0]
        torch.testing.assert_close(found, increment, rtol=10 * tolerance, atol=10 * tolerance)
        state = new
    assert sampler.done(state)


SETTINGS = [{}, {"path": Noised(kappa=0.3)}, {"resampling": Stratified(), "prior_std": 2.0, "threshold": 0.9}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["default", "narrow", "stratified"])
def test_modes_and_evidence_are_those_of_the_posterior(settings):
    case = plane_modes()
    exact, posterior = case.exact, Posterior(case.problem, case.prior, dtype=F64)
    solution = posterior.sample(TDS(steps=60, **settings), 500, chains=4, seed=2)
    # The first-order chain of 60 steps leaves about 0.05 nats, and 0.03 of sliced distance.
    assert abs(solution.log_evidence - exact.log_evidence) < 0.1 + 4.0 * solution.log_evidence_se
    assert solution.log_evidence_se < 0.15
    assert solution.log_weights.shape == (4, 500)
    # 2000 draws of effectively no fewer than a quarter as many.
    error = total_variation(mode_shares(solution.draws, exact.law), exact.law.weights)
    assert error < 4.5 * 0.5 / math.sqrt(500)
    assert min(info.ess for info in solution.trace) > 0.05


def test_draws_are_as_near_to_the_posterior_as_exact_ones():
    """Where one mode is left: with two the error of their shares hides all other."""
    case = plane_modes(2.6)
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    draws = posterior.sample(TDS(steps=120, prior_std=2.5), 1000, seed=2).draws
    others = [case.exact.sample(1000, seed=s) for s in range(5)]
    floors = [sliced_wasserstein(others[0], other) for other in others[1:]]
    # What 120 steps leave is 0.03; draws of a quarter of their number have twice the floor.
    assert sliced_wasserstein(draws, others[0]) < 2.0 * sum(floors) / 4 + 0.03


def test_it_keeps_the_bounds_of_exact_draws():
    report = check_sampler(TDS(), problems=[plane_problem()], steps=(30, 150), draws=400, chains=8)
    assert report.exact
    _, row = report.rows["plane"]
    assert abs(row.log_evidence_error) < row.bounds["log_evidence_error"][1] < 0.15


@pytest.mark.parametrize("path", [None, Tempered(scale=0.2), Noised(kappa=0.0)], ids=["default", "tempered", "plain"])
def test_a_problem_that_is_not_linear(path):
    """Independent values, so that the posterior of each is an integral over a line."""
    y, noise_std, n = torch.tensor([[-1.2, 0.4]], dtype=F64), 0.4, 2000
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), sigma_min=0.02, sigma_max=30.0)
    problem = Problem(likelihoods.Gaussian(Bend((2,), (2,)), y, noise_std))
    solution = Posterior(problem, prior, dtype=F64).sample(TDS(steps=60, path=path), n, seed=1)
    t = torch.linspace(-6.0, 6.0, 4001, dtype=F64)[:, None]
    density = torch.distributions.Normal(y, noise_std).log_prob(t + 0.3 * torch.sin(t))
    density = (density - 0.5 * t**2 - 0.5 * math.log(2.0 * math.pi)).exp()
    evidence = float((density.sum(0) * 12.0 / 4000).log().sum())
    w = density / density.sum(0)
    mean = (w * t).sum(0)
    std = (w * (t - mean) ** 2).sum(0).sqrt()
    size = n / 4  # effective draws, no fewer
    assert float(((solution.draws.mean(0) - mean) / std).abs().max()) < 4.5 / math.sqrt(size)
    assert float((solution.draws.std(0) / std - 1.0).abs().max()) < 4.5 / math.sqrt(2 * size)
    if path != Noised(kappa=0.0):  # whose weights have long tails
        assert abs(solution.log_evidence - evidence) < 0.05 + 4.5 / math.sqrt(size)


def test_shifts_that_would_diverge_are_cut():
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), sigma_min=0.02, sigma_max=30.0)
    problem = Problem(likelihoods.Gaussian(Bend((2,), (2,)), torch.ones(1, 2, dtype=F64), 1e-4))
    draws = Posterior(problem, prior, dtype=F64).sample(TDS(steps=30, path=Noised(kappa=0.0)), 20).draws
    assert float(draws.abs().max()) < 10.0


@dataclass(frozen=True)
class Half(Path):
    """Kills what is denoised to a first value below a level."""

    level: float

    def potential(self, sigma, linear, log_prob_and_grad):
        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = Noised().potential(sigma, linear, log_prob_and_grad)(z)
            dead = z.flatten(1)[:, 0] < self.level
            nan = torch.where(dead, math.nan, 0.0).reshape(-1, *[1] * (z.ndim - 1))
            return torch.where(dead, -math.inf, value), grad + nan

        return value_and_grad


def test_dead_particles_stay_dead_and_harm_no_other():
    case = plane_modes()
    posterior, sampler = Posterior(case.problem, case.prior, dtype=F64), TDS(steps=20, path=Half(-1.0), threshold=0.0)
    state = sampler.init(posterior, 1, 400, noise=Noise([3], 400, dtype=F64).at(0))
    deaths = []
    while not sampler.done(state):
        before = torch.isneginf(state.log_weights)
        state, _ = sampler.step(posterior, state, noise=Noise([3], 400, dtype=F64).at(state.step + 1))
        assert bool(torch.isneginf(state.log_weights)[before].all())
        assert bool(torch.isfinite(state.z).all())
        deaths.append(int(torch.isneginf(state.log_weights).sum()))
    assert 0 < deaths[-1] < 400
    solution = posterior.sample(replace(sampler, threshold=0.5), 400)
    # The last weight, which the path does not touch, leaves only those to the right at the last level but for a step.
    assert float(solution.draws[:, 0, 0].min()) > -1.1
    with pytest.raises(SamplingError, match="All 4 particles of ensemble 0 are dead"):
        posterior.sample(TDS(steps=20, path=Half(50.0)), 4)


def test_a_network_that_is_not_a_number_ends_the_run():
    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-2, 50.0

        def denoise(self, z, sigma):
            return z * (math.nan if float(torch.as_tensor(sigma).max()) < 1.0 else 0.5)

    with pytest.raises(SamplingError, match=r"NaN or infinite at step \d, sigma"):
        Posterior(blurred(), Broken(), dtype=F64).sample(TDS(steps=9), 4)


def test_what_it_needs_is_said_before_the_run():
    class Opaque:
        shape, sigma_min, sigma_max, differentiable = SHAPE, 1e-2, 50.0, False

        def denoise(self, z, sigma):
            return 0.5 * z

    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(*SHAPE), 0.5))
    with pytest.raises(CapabilityError, match="TDS needs linear"):
        invdiff.solve(bent, pictures(), TDS(path=Noised()))
    with pytest.raises(CapabilityError, match="TDS needs denoiser_vjp"):
        invdiff.solve(bent, Opaque(), TDS())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cost_is_what_is_counted(steps):
    about = Posterior(mixed(), pictures(), dtype=F64).sample(TDS(steps=steps), 3).about
    assert about["evaluations_per_draw"] == TDS(steps=steps).cost().forward == steps
    assert about["backward_evaluations_per_draw"] == TDS(steps=steps).cost().backward == steps - 1


def test_it_starts_at_its_own_first_level():
    posterior, n = Posterior(mixed(), pictures(), dtype=F64), 500
    state = TDS(levels=Levels(sigma_max=20.0), threshold=0.0).init(posterior, 1, n, noise=Noise([1], n, dtype=F64))
    assert isinstance(state, TwistedState)
    spread = float((state.z - posterior.noised_mean()).std())
    assert abs(spread / 20.0 - 1.0) < 4.5 / math.sqrt(2 * state.z.numel())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"threshold": 1.5}, r"in \[0, 1\]; got 1\.5"),
        ({"prior_std": 0.0}, r"positive; got 0\.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TDS(**settings)
