"""RED-diff: its step against torch's Adam, its figures on exact posteriors, nonlinear problems, cut runs."""

import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import field_problems, measure_solution
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.red_diff import AdamState, REDDiff

F64 = torch.float64
SHAPE = (1, 4, 4)
SIZE = 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field(scale: float = 1.0) -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, scale, 0.5 * scale)


def blur() -> Operator:
    return operators.Blur(operators.gaussian_kernel(3, 1.0), SHAPE, boundary="reflect")


def mask() -> Operator:
    return operators.Inpainting(torch.arange(SIZE).reshape(4, 4) % 4 > 0, SHAPE)


class Amplitudes(Operator):
    """Phase retrieval: amplitudes of the Fourier transform, twofold oversampled."""

    def __init__(self, shape: tuple[int, ...], gain: float = 1.0) -> None:
        super().__init__(shape, (shape[0], 2 * shape[1], shape[2] + 1))
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        _, height, width = self.in_shape
        return self.gain * torch.fft.rfft2(x, s=(2 * height, 2 * width), norm="ortho").abs()


class Powers(Operator):
    """Squares of an image's blurred values: smooth, so that rounding decides nothing."""

    def __init__(self) -> None:
        super().__init__(SHAPE, SHAPE)
        self.inner = blur()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) ** 2


class Unknown(Operator):
    """A linear operator that does not say so."""

    def __init__(self, inner: Operator) -> None:
        super().__init__(inner.in_shape, inner.out_shape)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def walk(sampler: REDDiff, posterior: Posterior, n: int) -> list[AdamState]:
    noise = Noise([3], n, dtype=F64)
    states = [sampler.init(posterior, 1, n, noise=noise.at(0))]
    while not sampler.done(states[-1]):
        states.append(sampler.step(posterior, states[-1], noise=noise.at(states[-1].step + 1))[0])
    return states


@pytest.mark.parametrize("diagonal", [False, True])
def test_steps_are_those_of_torchs_adam_on_the_papers_loss(diagonal):
    root = normal(SIZE, SIZE, seed=1)
    prior = GaussianPrior(normal(*SHAPE, seed=2), root @ root.T / SIZE + 0.1 * torch.eye(SIZE, dtype=F64))
    operator, n, lam = blur(), 3, 0.4
    std = 0.1 + normal(*SHAPE, seed=4).abs() if diagonal else torch.full(SHAPE, 0.3, dtype=F64)
    y = normal(*SHAPE, seed=5)
    posterior = Posterior(Problem(likelihoods.Gaussian(operator, y, std if diagonal else 0.3)), prior, dtype=F64)
    sampler = REDDiff(steps=12, lam=lam, lr=0.05, betas=(0.8, 0.95))
    states = walk(sampler, posterior, n)
    levels = sampler.levels.of(posterior, 12)
    A = operator(torch.eye(SIZE, dtype=F64).reshape(SIZE, *SHAPE)).flatten(1).T
    bound = blur().norm() / float(std.min())
    m, eye = prior.mean.flatten(), torch.eye(SIZE, dtype=F64)
    mu = posterior.noised_mean().flatten().repeat(n, 1).requires_grad_()
    adam = torch.optim.Adam([mu], lr=0.05, betas=(0.8, 0.95), eps=1e-300)
    noise = Noise([3], n, dtype=F64)
    floors = 0
    for k, state in enumerate(states[1:]):
        sigma = max(levels[k], 1.0 / (math.sqrt(lam) * bound))
        floors += sigma > levels[k]
        eps = noise.at(k + 1).like(state.z).reshape(n, SIZE)
        z = mu.detach() + sigma * eps
        gain = prior.covariance @ torch.linalg.inv(prior.covariance + sigma**2 * eye)
        e = (z - m - (z - m) @ gain.T) / sigma
        residual = (y.flatten() - mu @ A.T) / std.flatten()
        # w(sigma) = lambda L sigma: the paper's weight lambda / SNR, and the true likelihood.
        loss = 0.5 * (residual**2).sum() + lam * bound**2 * sigma * ((e - eps) * mu).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        torch.testing.assert_close(state.z.reshape(n, SIZE), mu.detach(), rtol=1e-8, atol=1e-8)
    assert 0 < floors < 12


@pytest.mark.parametrize(
    ("index", "variance", "mean"), [(0, 0.34, 0.27), (1, 0.23, 0.08), (2, 0.11, 0.13)], ids=["mask", "blur", "down"]
)
def test_the_bias_is_the_one_stated(index, variance, mean):
    case, draws = field_problems()[index], 200
    found = measure_solution(invdiff.solve(case.problem, case.prior, REDDiff(), draws=draws, seed=4, dtype=F64), case)
    covariance = case.exact.covariance
    std = covariance.diagonal().sqrt()
    correlation2 = float(((covariance / std[:, None] / std) ** 2).mean())
    # Of the stated figure, of 400 draws, and this one, of 200; spreads are those of as correlated draws.
    assert abs(found.variance_ratio / variance - 1.0) < 4.0 * math.sqrt(3.0 * correlation2 / draws)
    assert found.mean_error / math.sqrt(draws) < mean + 4.0 * math.sqrt(variance / draws)
    assert found.mass < 0.8
    assert not REDDiff().exact


@pytest.mark.parametrize(("operator", "degree"), [(mask(), 1), (Powers(), 2)], ids=["linear", "powers"])
def test_settings_know_neither_the_units_of_the_measurement_nor_those_of_the_prior(operator, degree):
    y = operator(0.5 + normal(1, *SHAPE, seed=6))[0]
    found = []
    for scale in (1.0, 1e3):
        problem = Problem(likelihoods.Gaussian(operator, scale**degree * y, 0.3 * scale**degree))
        found.append(walk(REDDiff(steps=15), Posterior(problem, field(scale), dtype=F64), 4)[-1].z / scale)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_the_curvature_along_the_way_stays_below_the_largest():
    y = normal(*SHAPE, seed=5)
    posterior = Posterior(Problem(likelihoods.Gaussian(Unknown(blur()), y, 0.3)), field(), dtype=F64)
    assert posterior.linear is None
    states = walk(REDDiff(steps=20), posterior, 4)
    largest = (blur().norm() / 0.3) ** 2
    assert bool((states[1].curvature == 0.0).all())  # nothing is known before the second gradient
    assert all(bool((s.curvature <= largest * (1 + 1e-5)).all()) for s in states)
    assert all(bool((s.curvature > 0.1 * largest).all()) for s in states[2:])


def test_phase_retrieval_fits_its_measurement():
    prior = FieldPrior.power_law((1, 12, 12), 3.0, 0.2, 0.5)
    operator = Amplitudes((1, 12, 12), gain=50.0)
    problem = Problem.simulate(operator, prior.sample(1, seed=5).double(), noise_std=1.0, seed=0)
    posterior = Posterior(problem, prior, dtype=F64)
    assert posterior.misfit(posterior.noised_mean()[None, None]) > 10.0
    solution = posterior.sample(REDDiff(), 8)
    # 8 particles of 312 values each; a fit as good as the noise has 1, less what the fit takes of it.
    assert solution.trace[-1].misfit < 1.0 + 4.0 * math.sqrt(2.0 / (8 * 312))
    assert solution.trace[-1].sigma == 0.0


def test_neither_micro_batches_nor_company_change_the_draws():
    prior = field()
    for operator in (mask(), blur(), Powers()):
        problems = [Problem.simulate(operator, prior.sample(1, seed=i)[0], noise_std=0.3, seed=i) for i in (3, 4)]
        sampler = REDDiff(steps=12)
        together = invdiff.solve(problems, prior, sampler, draws=4, dtype=F64)
        for problem, solution in zip(problems, together, strict=True):
            alone = invdiff.solve(problem, prior, sampler, draws=4, dtype=F64, micro_batch=3)
            torch.testing.assert_close(alone.draws, solution.draws, rtol=0.0, atol=1e-10)
            assert alone.about["evaluations_per_draw"] == sampler.cost().forward == 12
            assert alone.about["backward_evaluations_per_draw"] == sampler.cost().backward == 0
        assert not torch.allclose(together[0].draws, together[1].draws, atol=1e-2)
        assert solution.draws.std(0).min() > 0.0  # each particle is its own run


@pytest.mark.parametrize("operator", [mask(), Powers()], ids=["linear", "powers"])
def test_a_run_that_was_cut_ends_as_one_that_was_not(operator, tmp_path):
    problem = Problem.simulate(operator, field().sample(1, seed=3)[0], noise_std=0.3, seed=3)
    sampler, file = REDDiff(steps=12), tmp_path / "run.safetensors"
    whole = invdiff.solve(problem, field(), sampler, draws=4, dtype=F64)
    with pytest.raises(SamplingError, match="max_evaluations"):
        invdiff.solve(problem, field(), sampler, draws=4, dtype=F64, checkpoint=file, max_evaluations=7)
    assert file.exists()
    resumed = invdiff.solve(problem, field(), sampler, draws=4, dtype=F64, checkpoint=file)
    assert torch.equal(resumed.draws, whole.draws)


class Silent(likelihoods.Gaussian.__mro__[1]):
    """A likelihood without a gradient."""

    differentiable = False
    in_shape, problems, measurements = SHAPE, 1, 1

    def log_prob(self, x: Tensor) -> Tensor:
        return -0.5 * self.deviance(x)

    def deviance(self, x: Tensor) -> Tensor:
        return x.flatten(1).square().sum(1)

    def rows(self, index: Tensor) -> "Silent":
        return self

    @classmethod
    def stack(cls, parts: object) -> "Silent":
        return cls()


def test_a_likelihood_without_gradient_is_refused():
    with pytest.raises(CapabilityError, match="REDDiff needs likelihood_gradient"):
        invdiff.solve(Problem(Silent()), field(), REDDiff())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"lam": 0.0}, "positive weight, got 0.0"),
        ({"lam": math.nan}, "positive weight, got nan"),
        ({"lr": 0.0}, "positive length in latent units, or None, got 0.0"),
        ({"lr": math.inf}, "positive length in latent units, or None, got inf"),
        ({"betas": (1.0, 0.99)}, r"lie in \[0, 1\), got \(1.0, 0.99\)"),
        ({"betas": (0.9, -0.1)}, r"lie in \[0, 1\), got \(0.9, -0.1\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        REDDiff(**settings)
