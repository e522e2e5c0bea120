"""DiffPIR: its update against dense algebra, its law on exact posteriors, and what it refuses."""

import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import ExactProblem, field_problems, measure_solution
from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import AnnealedState
from invdiff.samplers.diffpir import DiffPIR

F64 = torch.float64
SHAPE = (1, 4, 4)
SIZE = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian_prior() -> GaussianPrior:
    root = normal(SIZE, SIZE, seed=1)
    return GaussianPrior(normal(*SHAPE, seed=2), root @ root.T / SIZE + 0.1 * torch.eye(SIZE, dtype=F64))


def blur() -> Operator:
    return operators.Blur(operators.gaussian_kernel(3, 1.0), SHAPE, boundary="reflect")


def mask() -> Operator:
    return operators.Inpainting(torch.arange(SIZE).reshape(4, 4) % 4 > 0, SHAPE)


def matrix(operator: Operator) -> Tensor:
    return operator(torch.eye(SIZE, dtype=F64).reshape(SIZE, *SHAPE)).flatten(1).T


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("operator", [mask(), blur()], ids=["svd", "conjugate-gradients"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_one_step_is_that_of_dense_algebra(operator, zeta, diagonal):
    prior, n, lam = gaussian_prior(), 3, 2.5
    std = torch.full(operator.out_shape, 0.3, dtype=F64)
    if diagonal:
        std = 0.1 + normal(*operator.out_shape, seed=4).abs()
    y = normal(*operator.out_shape, seed=5)
    posterior = Posterior(Problem(likelihoods.Gaussian(operator, y, std if diagonal else 0.3)), prior, dtype=F64)
    sampler = DiffPIR(steps=12, lam=lam, zeta=zeta)
    levels = sampler.levels.of(posterior, 12)
    A, weight = matrix(operator), torch.diag(std.flatten() ** -2)
    eye, m = torch.eye(SIZE, dtype=F64), prior.mean.flatten()
    for k in (4, 9, 11):
        sigma, after = levels[k], levels[k + 1]
        z = m + (1.0 + sigma) * normal(n, SIZE, seed=k)
        noise = Noise([7], n, dtype=F64)
        state = AnnealedState(z=z.reshape(1, n, *SHAPE), step=k)
        found, info = sampler.step(posterior, state, noise=noise.at(k + 1))
        gain = prior.covariance @ torch.linalg.inv(prior.covariance + sigma**2 * eye)
        denoised = m + (z - m) @ gain.T
        # The minimum of |y - A x|^2 / (2 R) + lambda |x - D|^2 / (2 sigma^2), from its normal equations.
        normal_matrix = A.T @ weight @ A + lam / sigma**2 * eye
        x = torch.linalg.solve(normal_matrix, (A.T @ weight @ y.flatten() + lam / sigma**2 * denoised).T).T
        eps = Noise([7], n, dtype=F64).at(k + 1).like(state.z).reshape(n, SIZE)
        expected = x + after * (math.sqrt(1.0 - zeta) * (z - x) / sigma + math.sqrt(zeta) * eps)
        torch.testing.assert_close(found.z.reshape(n, SIZE), expected, rtol=1e-9, atol=1e-9)
        assert (info.sigma, found.step) == (after, k + 1)
        chi_square = float((((y.flatten() - x @ A.T) / std.flatten()) ** 2).mean())
        assert info.misfit == pytest.approx(chi_square, rel=1e-9)
    assert after == 0.0  # the last of them was the step that returns the proximal point itself
    torch.testing.assert_close(found.z.reshape(n, SIZE), x, rtol=1e-9, atol=1e-9)


def spreads(case: ExactProblem, draws: int) -> tuple[float, float]:
    """Standard deviations of the variance ratio and of the mass that exact draws would have."""
    covariance = case.exact.covariance
    std = covariance.diagonal().sqrt()
    correlation2 = float(((covariance / std[:, None] / std) ** 2).mean())
    return math.sqrt(2.0 * correlation2 / draws), math.sqrt(0.09 * math.sqrt(correlation2) / draws)


@pytest.mark.parametrize(
    ("index", "zeta", "steps", "variance", "mass"),
    [(0, 0.8, 100, 0.73, 0.83), (1, 0.8, 100, 0.66, 0.82), (2, 0.8, 100, 0.66, 0.82), (0, 0.3, 100, 1.04, 0.88)],
)
def test_the_bias_is_the_one_stated(index, zeta, steps, variance, mass):
    case, draws = field_problems()[index], 200
    solution = invdiff.solve(
        case.problem, case.prior, DiffPIR(steps=steps, zeta=zeta), draws=draws, seed=4, dtype=torch.float64
    )
    found = measure_solution(solution, case)
    by_variance, by_mass = spreads(case, draws)
    # Both the stated figure, of 400 draws, and this one, of 200, have their sampling error.
    assert abs(found.variance_ratio - variance) < 4.0 * math.sqrt(1.5) * by_variance
    assert abs(found.mass - mass) < 4.0 * math.sqrt(1.5) * by_mass
    assert found.failures  # it is biased by more than sampling error
    assert not DiffPIR().exact


class Still(Noise):
    """Noise that is zero."""

    def like(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)


def test_variance_tends_to_the_stated_share_as_levels_are_added():
    """On a Gaussian a step is affine: its slope, from two states without noise, carries the variance exactly."""
    shape, zeta = (1, 1, 1), 0.4
    prior = GaussianPrior(torch.zeros(shape, dtype=F64), torch.eye(1, dtype=F64), sigma_min=1e-3, sigma_max=50.0)
    everything = operators.Inpainting(torch.ones(1, 1, dtype=torch.bool), shape)
    posterior = Posterior(Problem(likelihoods.Gaussian(everything, normal(1), 0.5)), prior, dtype=F64)
    ends, ratios = torch.tensor([0.0, 1.0], dtype=F64).reshape(1, 2, *shape), []
    for steps in (100, 200):
        sampler, variance = DiffPIR(steps=steps, zeta=zeta), posterior.sigma_max**2
        for k in range(steps):
            after, info = sampler.step(posterior, AnnealedState(z=ends, step=k), noise=Still([0], 2, dtype=F64))
            variance = float(after.z[0, 1] - after.z[0, 0]) ** 2 * variance + zeta * info.sigma**2
        ratios.append(variance / (1.0 / (1.0 + 1.0 / 0.25)))
    # The distance falls as 1 / steps (0.11 and 0.06); without its first order what is left is of the second.
    limit = (1.0 + math.sqrt(1.0 - zeta)) / 2.0
    assert abs(ratios[1] - limit) < 0.6 * abs(ratios[0] - limit)
    assert abs(2.0 * ratios[1] - ratios[0] - limit) < 0.02


def test_scale_of_the_prior_only_scales_the_draws():
    found = []
    for scale in (1.0, 1e3):
        prior = FieldPrior.power_law(SHAPE, 2.0, scale, 0.2 * scale)
        problem = Problem(likelihoods.Gaussian(mask(), scale * normal(*mask().out_shape), 0.3 * scale))
        posterior, sampler = Posterior(problem, prior, dtype=F64), DiffPIR(steps=15)
        noise = Noise([3], 4, dtype=F64)
        state = sampler.init(posterior, 1, 4, noise=noise.at(0))
        while not sampler.done(state):
            state, _ = sampler.step(posterior, state, noise=noise.at(state.step + 1))
        found.append(state.z / scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", [mask(), blur()], ids=["svd", "conjugate-gradients"])
def test_neither_micro_batches_nor_company_change_the_draws(operator):
    prior = FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)
    problems = [Problem.simulate(operator, prior.sample(1, seed=i)[0], noise_std=0.3, seed=i) for i in (3, 4)]
    sampler = DiffPIR(steps=12)
    together = invdiff.solve(problems, prior, sampler, draws=4, dtype=F64)
    for problem, solution in zip(problems, together, strict=True):
        alone = invdiff.solve(problem, prior, sampler, draws=4, dtype=F64, micro_batch=3)
        torch.testing.assert_close(alone.draws, solution.draws, rtol=0.0, atol=1e-10)
        assert alone.about["evaluations_per_draw"] == sampler.cost().forward == 12
        assert alone.about["backward_evaluations_per_draw"] == sampler.cost().backward == 0
    assert not torch.allclose(together[0].draws, together[1].draws, atol=1e-2)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def test_problems_that_are_not_linear_are_refused():
    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(*SHAPE), 0.5))
    with pytest.raises(CapabilityError, match="DiffPIR needs linear"):
        invdiff.solve(bent, FieldPrior.power_law(SHAPE, 2.0, 1.0), DiffPIR())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"lam": 0.0}, "positive weight, got 0.0"),
        ({"lam": math.inf}, "positive weight, got inf"),
        ({"lam": math.nan}, "positive weight, got nan"),
        ({"zeta": -0.1}, r"in \[0, 1\], got -0.1"),
        ({"zeta": 1.1}, r"in \[0, 1\], got 1.1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        DiffPIR(**settings)
