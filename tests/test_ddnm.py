"""DDNM: its three cases against dense algebra, the noise that a step leaves, time travel, and its measured bias."""

import math

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, field_problems
from invdiff.errors import CapabilityError, InputError
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.operators.composition import Affine
from invdiff.operators.separable import Separable
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import AnnealedState, Levels
from invdiff.samplers.ddnm import DDNM, correction

F64 = torch.float64
SHAPE = (1, 4, 4)
STD = 0.3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field(decoder: Operator | None = None) -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0, decoder=decoder)


def tent() -> Tensor:
    """A kernel whose circular transform is 0 at the highest frequency, 1/2 at the middle one and 1 at zero."""
    k = torch.tensor([0.25, 0.5, 0.25], dtype=F64)
    return k[:, None] * k


MASK = torch.arange(16).reshape(4, 4) % 4 > 0
OPERATORS = {
    "inpainting": operators.Inpainting(MASK, SHAPE),
    "circular": operators.Blur(tent(), SHAPE, boundary="circular"),
    "mirror": operators.Blur(tent(), SHAPE, boundary="reflect"),
    "half": operators.Downsampling(SHAPE, 2),
    "faint": Separable(torch.diag(torch.tensor([1.0, 0.5, 1e-9, 0.0], dtype=F64)), torch.eye(4, dtype=F64), SHAPE),
}


def posterior_of(name: str, measurements: Tensor | None = None, *, affine: bool = False) -> Posterior:
    A = OPERATORS[name]
    y = normal(1, *A.out_shape, seed=2) if measurements is None else measurements
    prior = field(Affine(SHAPE, 0.5, 0.5) if affine else None)
    problems = [Problem(likelihoods.Gaussian(A, row, STD)) for row in y]
    return Posterior(problems if len(problems) > 1 else problems[0], prior, dtype=F64)


def dense(A: LinearOperator) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V of the operator's matrix, with as many singular values as there are inputs, those of null space 0."""
    matrix = A(torch.eye(16, dtype=F64).reshape(16, *A.in_shape)).flatten(1).T
    u, s, vt = torch.linalg.svd(matrix)
    s = torch.cat([s, s.new_zeros(16 - len(s))])
    return u, torch.where(s < 1e-12, 0.0, s), vt.T


def scalings(s: Tensor, a: float, tau: float, eta: float) -> tuple[Tensor, Tensor]:
    """lambda and phi, a singular value at a time."""
    pairs = []
    for si in map(float, s):
        if si == 0.0:
            pairs.append((1.0, tau**2))
        elif tau >= a * STD / si:
            pairs.append((1.0, tau**2 - (a * STD / si) ** 2))
        else:
            pairs.append((math.sqrt(1 - eta**2) * si * tau / (a * STD), (eta * tau) ** 2))
    lam, phi = zip(*pairs, strict=True)
    return torch.tensor(lam, dtype=F64), torch.tensor(phi, dtype=F64)


# The update.


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_step_is_that_of_dense_algebra(name, affine):
    posterior = posterior_of(name, affine=affine)
    A, y = posterior.linear.operator, posterior.linear.measurement[0]
    u, s, v = dense(A)
    sampler = DDNM(steps=30, eta=0.6)
    levels = sampler.levels.of(posterior, 30)

    def noises(k: int) -> tuple[float, float]:
        a = 1.0 - (levels[k + 1] / levels[k]) ** 2
        return a, levels[k + 1] * math.sqrt(a)

    # The last level at which the largest singular value is known, and half of it is not.
    k = max(k for k in range(29) if float(s.max()) * noises(k)[1] > 1.01 * noises(k)[0] * STD)
    a, tau = noises(k)
    state = AnnealedState(z=0.2 + levels[k] * normal(1, 3, *SHAPE, seed=4), step=k)
    moved, info = sampler.step(posterior, state, noise=Noise([7], 3, dtype=F64).at(k + 1))
    fresh = Noise([7], 3, dtype=F64).at(k + 1).like(state.z)
    denoised = posterior.denoise(state.z, levels[k])
    lam, phi = scalings(s, a, tau, 0.6)
    matrix = A(torch.eye(16, dtype=F64).reshape(16, *A.in_shape)).flatten(1).T
    r = int((s > 0).sum())
    pinv = v[:, :r] @ torch.diag(1.0 / s[:r]) @ u[:, :r].T
    Sigma, root = v @ torch.diag(lam) @ v.T, v @ torch.diag(phi.sqrt()) @ v.T
    for i in range(3):
        D, z, eps = (t[0, i].flatten() for t in (denoised, state.z, fresh))
        corrected = D - Sigma @ (pinv @ (matrix @ D - y.flatten()))
        expected = a * corrected + (1.0 - a) * z + root @ eps
        # A pseudo-inverse of 1e9 loses as many digits, in the dense algebra of this test alone.
        atol = 1e-5 if name == "faint" else 1e-9
        torch.testing.assert_close(moved.z[0, i].flatten(), expected, rtol=1e-9, atol=atol)
    assert info.sigma == levels[k + 1]
    if name == "circular":
        known = s * tau >= a * STD
        assert bool(known.any()), "no value is known at this level: the second case is not seen"
        assert bool(((s > 0) & ~known).any()), "every measured value is known: the third case is not seen"
        assert bool((s == 0).any()), "every value is measured: the first case is not seen"


@pytest.mark.parametrize("eta", [0.0, 0.85, 1.0])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_measurement_and_fresh_noise_add_up(name, eta):
    """a Sigma A^+ n and Phi^(1/2) eps have the variance tau^2 together, in every direction that A sees or not."""
    A, a, tau = OPERATORS[name], 0.6, 0.25  # known from s = 0.72 on
    m = math.prod(A.out_shape)
    x0 = normal(*SHAPE, seed=6)
    clean = A(x0[None])
    basis = torch.eye(16, dtype=F64).reshape(1, 16, *SHAPE)
    center = x0.expand(1, 16, *SHAPE)
    corrected, fresh = correction(posterior_of(name, clean), center, basis, a=a, tau=tau, eta=eta)
    torch.testing.assert_close(corrected, center.clone(), rtol=1e-10, atol=1e-10)
    shifts = torch.eye(m, dtype=F64).reshape(m, *A.out_shape)
    zero = torch.zeros(m, 1, *SHAPE, dtype=F64)
    moved, none = correction(posterior_of(name, clean + shifts), x0.expand(m, 1, *SHAPE), zero, a=a, tau=tau, eta=eta)
    assert float(none.abs().max()) == 0.0
    of_data = STD * a * (moved[:, 0] - x0).flatten(1)
    of_fresh = fresh[0].flatten(1)
    total = of_data.T @ of_data + of_fresh.T @ of_fresh
    torch.testing.assert_close(total, tau**2 * torch.eye(16, dtype=F64), rtol=1e-10, atol=1e-10)


# Time travel.


class Spy:
    """A field that writes down the levels at which it is asked, and the standard deviation of what it is shown."""

    shape, sigma_min, sigma_max = SHAPE, 0.01, 20.0

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []

    def denoise(self, z: Tensor, sigma: float) -> Tensor:
        self.seen.append((sigma, float(z.std())))
        return torch.zeros_like(z)


@pytest.mark.parametrize(
    ("settings", "visits"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"travel_length": 2}, [0, 1, 2, 3, 4]),
        ({"repeats": 2}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ({"travel_length": 2, "repeats": 2}, [0, 1, 0, 1, 2, 3, 2, 3, 4, 4]),
        ({"travel_length": 3, "repeats": 3}, [0, 1, 2] * 3 + [3, 4] * 3),
        ({"travel_length": 9, "repeats": 2}, [0, 1, 2, 3, 4] * 2),
    ],
)
def test_stretches_are_walked_again(settings, visits):
    spy = Spy()
    # One value in 16 is measured, so that what the denoiser sees is all but white noise of its level.
    A = operators.Inpainting(torch.arange(16).reshape(4, 4) == 0, SHAPE)
    problem = Problem(likelihoods.Gaussian(A, torch.zeros(1), 0.05))
    sampler = DDNM(steps=5, **settings)
    solution = invdiff.solve(problem, spy, sampler, draws=400)
    levels = sampler.levels.of(Posterior(problem, spy), 5)
    seen = spy.seen[-len(visits) :]  # the posterior asks once more, for the mean of the start
    assert [sigma for sigma, _ in seen] == [levels[k] for k in visits]
    for sigma, std in seen:
        # 15 * 400 independent values of standard deviation sigma and 400 of at most that.
        assert (
            sigma * (math.sqrt(15 / 16) - 4.0 / math.sqrt(2 * 6000)) < std < sigma * (1.0 + 4.0 / math.sqrt(2 * 6000))
        )
    assert sampler.cost().forward == len(visits) == solution.about["evaluations_per_draw"]
    trace = [info.sigma for info in solution.trace]
    assert trace == list(levels[1:])


def test_the_last_step_returns_the_denoised_state():
    posterior = posterior_of("circular")
    state = AnnealedState(z=normal(1, 2, *SHAPE), step=9)
    moved, info = DDNM(steps=10).step(posterior, state, noise=Noise([0], 2, dtype=F64).at(10))
    torch.testing.assert_close(moved.z, posterior.denoise(state.z, posterior.sigma_min))
    assert info.sigma == 0.0


# The draws.


@pytest.mark.parametrize(
    ("steps", "variance", "whitened", "mass", "mean"),
    [
        (20, (0.67, 0.64, 0.58), (0.68, 0.70, 0.57), (0.75, 0.81, 0.79), (0.69, 0.16, 0.17)),
        (100, (0.95, 0.74), (0.99, 0.80), (0.85, 0.82), (0.57, 0.31)),
    ],
)
def test_the_bias_is_what_the_file_states(steps, variance, whitened, mass, mean):
    """The noise enters in the operator's singular basis, whose signs differ between processors: 400 other draws."""
    cases = field_problems()[: len(variance)]
    report = check_sampler(DDNM(), problems=cases, steps=[steps], draws=400)
    rows = [row[0] for row in report.rows.values()]
    for i, row in enumerate(rows):
        # Four standard errors as if a field had 8 values of equal weight (few large modes have most of its variance),
        # and the rounding of the figures.
        assert row.variance_ratio == pytest.approx(variance[i], rel=4 * math.sqrt(2 / (400 * 8)), abs=5e-3)
        assert row.whitened == pytest.approx(whitened[i], rel=4 * math.sqrt(2 / (400 * 8)), abs=5e-3)
        assert row.mass == pytest.approx(mass[i], abs=4 * math.sqrt(0.25 / (400 * 8)))
        assert row.mean_error / math.sqrt(400) == pytest.approx(mean[i], abs=4 / math.sqrt(400 * 2 * 8) + 5e-3)
    assert report.failures, "these figures would pass as exact"


def test_micro_batches_and_other_problems_change_nothing():
    A = OPERATORS["mirror"]
    problems = [Problem.simulate(A, field().sample(1, seed=s)[0], noise_std=STD, seed=s, name=f"{s}") for s in (1, 2)]
    sampler = DDNM(steps=6, travel_length=2, repeats=2)
    together = invdiff.solve(problems, field(), sampler, draws=5, dtype=F64)
    for problem, one in zip(problems, together, strict=True):
        for micro_batch in (None, 2):
            alone = invdiff.solve(problem, field(), sampler, draws=5, dtype=F64, micro_batch=micro_batch)
            torch.testing.assert_close(alone.draws, one.draws, rtol=1e-10, atol=1e-10)
    assert together[0].about["backward_evaluations_per_draw"] == sampler.cost().backward == 0


@pytest.mark.parametrize("name", list(OPERATORS))
def test_single_precision_gives_the_same_draws(name):
    problem = Problem(likelihoods.Gaussian(OPERATORS[name], normal(*OPERATORS[name].out_shape, seed=2), STD))
    single, double = (
        invdiff.solve(problem, field(), DDNM(steps=8), draws=3, dtype=d).draws for d in (torch.float32, F64)
    )
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


# What it needs.


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def test_problems_without_an_svd_are_refused():
    y = normal(*SHAPE)
    slanted = operators.Blur(torch.eye(3, dtype=F64) / 3.0, SHAPE, boundary="reflect")
    uneven = torch.linspace(0.1, 0.4, 16, dtype=F64).reshape(SHAPE)
    for likelihood in (
        likelihoods.Gaussian(Bend(SHAPE, SHAPE), y, STD),
        likelihoods.Gaussian(slanted, y, STD),
        likelihoods.Gaussian(OPERATORS["mirror"], y, uneven),
    ):
        with pytest.raises(CapabilityError, match="DDNM needs svd"):
            Posterior(Problem(likelihood), field()).sample(DDNM(), 2)


@pytest.mark.parametrize(
    "setting",
    [{"eta": -0.1}, {"eta": 1.1}, {"travel_length": 0}, {"repeats": 0}, {"steps": 0}],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError):
        DDNM(**setting)


def test_levels_beyond_the_prior_are_refused():
    with pytest.raises(InputError, match="do not lie within"):
        posterior_of("half").sample(DDNM(levels=Levels(sigma_max=1e4)), 2)
