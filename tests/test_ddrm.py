"""DDRM: its three cases against dense algebra, the variances that its theory promises, and its measured bias."""

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
from invdiff.samplers.annealing import AnnealedState
from invdiff.samplers.ddrm import DDRM, transition

F64 = torch.float64
SHAPE = (1, 4, 4)
STD, SIGMA = 0.3, 0.4  # singular values at 0.75 and above are known at SIGMA


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
    "inpainting": operators.Inpainting(MASK, SHAPE),  # coefficients of full size, singular values 0 and 1
    "circular": operators.Blur(tent(), SHAPE, boundary="circular"),  # complex coefficients, nulls
    "mirror": operators.Blur(tent(), SHAPE, boundary="reflect"),  # Kronecker
    "half": operators.Downsampling(SHAPE, 2),  # fewer outputs than inputs
    "faint": Separable(torch.diag(torch.tensor([1.0, 0.5, 1e-9, 0.0], dtype=F64)), torch.eye(4, dtype=F64), SHAPE),
    "tall": Separable(normal(6, 4, seed=5) / 3.0, torch.eye(4, dtype=F64), SHAPE),  # more outputs than inputs
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


def data(u: Tensor, y: Tensor) -> Tensor:
    """U^T y, filled with zeros to 16 values."""
    c = u.T @ y.flatten()
    return torch.cat([c, c.new_zeros(max(0, 16 - len(c)))])[:16]


def three_cases(
    s: Tensor, uy: Tensor, x0: Tensor, eps: Tensor, fresh: Tensor, sigma: float, eta: float, eta_b: float
) -> Tensor:
    """The paper's eqs. 4 and 5, a value at a time, on coefficients."""
    out = []
    for i in range(16):
        si = float(s[i])
        if si == 0.0:
            mean, var = x0[i] + math.sqrt(1 - eta**2) * sigma * eps[i], (eta * sigma) ** 2
        elif sigma < STD / si:
            mean = x0[i] + math.sqrt(1 - eta**2) * sigma * (uy[i] / si - x0[i]) / (STD / si)
            var = (eta * sigma) ** 2
        else:
            mean, var = (1 - eta_b) * x0[i] + eta_b * uy[i] / si, sigma**2 - (eta_b * STD / si) ** 2
        out.append(mean + math.sqrt(var) * fresh[i])
    return torch.stack(out)


# The update.


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_step_is_that_of_dense_algebra(name, affine):
    posterior = posterior_of(name, affine=affine)
    A, y = posterior.linear.operator, posterior.linear.measurement[0]
    u, s, v = dense(A)
    sampler = DDRM(steps=30, eta=0.6, eta_b=0.8)
    levels = sampler.levels.of(posterior, 30)
    k = min(range(30), key=lambda i: abs(levels[i + 1] - SIGMA / (0.5 if affine else 1.0)))
    state = AnnealedState(z=0.2 + levels[k] * normal(1, 3, *SHAPE, seed=4), step=k)
    moved, info = sampler.step(posterior, state, noise=Noise([7], 3, dtype=F64).at(k + 1))
    fresh = Noise([7], 3, dtype=F64).at(k + 1).like(state.z)
    denoised = posterior.denoise(state.z, levels[k])
    for i in range(3):
        x0, z, e = (v.T @ t[0, i].flatten() for t in (denoised, state.z, fresh))
        expected = v @ three_cases(s, data(u, y), x0, (z - x0) / levels[k], e, levels[k + 1], 0.6, 0.8)
        torch.testing.assert_close(moved.z[0, i].flatten(), expected, rtol=1e-9, atol=1e-9)
    assert info.sigma == levels[k + 1]
    if name == "circular" and not affine:
        known = s * levels[k + 1] >= STD
        assert bool(known.any()), "no value is known at this level: the third case is not seen"
        assert bool(((s > 0) & ~known).any()), "every measured value is known: the second case is not seen"
        assert bool((s == 0).any()), "every value is measured: the first case is not seen"


@pytest.mark.parametrize(("eta", "eta_b"), [(0.85, 1.0), (0.3, 0.5), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", list(OPERATORS))
def test_variances_are_those_of_the_theory(name, eta, eta_b):
    """q(z_t | z_0, y) has the stated variances; over y = A z_0 + n it is N(z_0, sigma^2)  (proposition 3.1)."""
    A = OPERATORS[name]
    m = math.prod(A.out_shape)
    x0 = normal(*SHAPE, seed=6)
    clean = A(x0[None])
    settings = {"sigma": SIGMA, "eta": eta, "eta_b": eta_b}
    # The draw is affine in its fresh noise, in the carried noise and in n: three matrices tell its law exactly.
    posterior = posterior_of(name, clean)
    center, zero = x0.expand(1, 17, *SHAPE), torch.zeros(1, 17, *SHAPE, dtype=F64)
    basis = torch.cat([torch.zeros(1, 16, dtype=F64), torch.eye(16, dtype=F64)]).reshape(1, 17, *SHAPE)
    fresh = transition(posterior, center, zero, basis, **settings).flatten(2)[0]
    carried = transition(posterior, center, basis, zero, **settings).flatten(2)[0]
    shifts = torch.eye(m, dtype=F64).reshape(m, *A.out_shape)
    alone = torch.zeros(m, 1, *SHAPE, dtype=F64)
    moved = transition(posterior_of(name, clean + shifts), x0.expand(m, 1, *SHAPE), alone, alone, **settings)
    parts = [fresh[1:] - fresh[0], carried[1:] - carried[0], STD * (moved[:, 0].flatten(1) - fresh[0])]
    # The mean over n and both noises is z_0.
    torch.testing.assert_close(fresh[0], x0.flatten(), rtol=1e-10, atol=1e-10)
    of_fresh, of_carried, of_data = (p.T @ p for p in parts)
    torch.testing.assert_close(
        of_fresh + of_carried + of_data, SIGMA**2 * torch.eye(16, dtype=F64), rtol=1e-10, atol=1e-10
    )
    _, s, v = dense(A)
    variance = torch.full((16,), (eta * SIGMA) ** 2, dtype=F64)
    known = s * SIGMA >= STD
    variance[known] = SIGMA**2 - (eta_b * STD / s[known]) ** 2
    torch.testing.assert_close(of_fresh, v @ torch.diag(variance) @ v.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_start_knows_the_measurement(name):
    posterior = posterior_of(name)
    u, s, v = dense(posterior.linear.operator)
    noise = Noise([3], 2, dtype=F64)
    z = DDRM(steps=5).init(posterior, 1, 2, noise=noise).z
    eps = Noise([3], 2, dtype=F64).like(z)
    mean = posterior.noised_mean().flatten()
    top = posterior.sigma_max
    known = s * top >= STD
    at = torch.where(known, data(u, posterior.linear.measurement[0]) / s.clamp_min(1e-3), v.T @ mean)
    std = torch.where(known, (top**2 - (STD / s.clamp_min(1e-3)) ** 2).clamp_min(0.0).sqrt(), top)
    for i in range(2):
        expected = v @ (at + std * (v.T @ eps[0, i].flatten()))
        torch.testing.assert_close(z[0, i].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_the_last_step_returns_the_denoised_state():
    posterior = posterior_of("circular")
    state = AnnealedState(z=normal(1, 2, *SHAPE), step=9)
    moved, info = DDRM(steps=10).step(posterior, state, noise=Noise([0], 2, dtype=F64).at(10))
    torch.testing.assert_close(moved.z, posterior.denoise(state.z, posterior.sigma_min))
    assert info.sigma == 0.0


# The draws.


@pytest.mark.parametrize(
    ("steps", "variance", "whitened", "mass", "mean"),
    [
        (20, (0.79, 0.27, 0.47), (0.83, 0.51, 0.47), (0.79, 0.57, 0.74), (0.74, 0.41, 0.11)),
        (100, (0.50, 0.23), (0.51, 1.48), (0.67, 0.42), (0.33, 1.00)),
    ],
)
def test_the_bias_is_what_the_file_states(steps, variance, whitened, mass, mean):
    """The noise enters in the operator's singular basis, whose signs differ between processors: 400 other draws."""
    cases = field_problems()[: len(variance)]
    report = check_sampler(DDRM(), problems=cases, steps=[steps], draws=400)
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
    sampler = DDRM(steps=8)
    together = invdiff.solve(problems, field(), sampler, draws=5, dtype=F64)
    for problem, one in zip(problems, together, strict=True):
        for micro_batch in (None, 2):
            alone = invdiff.solve(problem, field(), sampler, draws=5, dtype=F64, micro_batch=micro_batch)
            torch.testing.assert_close(alone.draws, one.draws, rtol=1e-10, atol=1e-10)
    assert together[0].about["evaluations_per_draw"] == sampler.cost().forward == 8
    assert together[0].about["backward_evaluations_per_draw"] == sampler.cost().backward == 0


@pytest.mark.parametrize("name", list(OPERATORS))
def test_single_precision_gives_the_same_draws(name):
    problem = Problem(likelihoods.Gaussian(OPERATORS[name], normal(*OPERATORS[name].out_shape, seed=2), STD))
    single, double = (
        invdiff.solve(problem, field(), DDRM(steps=8), draws=3, dtype=d).draws for d in (torch.float32, F64)
    )
    torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


# What it needs.


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def test_problems_without_an_svd_are_refused():
    y = normal(*SHAPE)
    slanted = operators.Blur(torch.eye(3, dtype=F64) / 3.0, SHAPE, boundary="reflect")
    uneven = likelihoods.Gaussian(OPERATORS["mirror"], y, torch.linspace(0.1, 0.4, 16, dtype=F64).reshape(SHAPE))
    for likelihood in (
        likelihoods.Gaussian(Bend(SHAPE, SHAPE), y, STD),
        likelihoods.Gaussian(slanted, y, STD),
        uneven,
    ):
        with pytest.raises(CapabilityError, match="DDRM needs svd"):
            Posterior(Problem(likelihood), field()).sample(DDRM(), 2)
    with pytest.raises(CapabilityError, match="has no SVD"):
        DDRM().init(Posterior(Problem(likelihoods.Gaussian(slanted, y, STD)), field()), 1, 1, noise=Noise([0], 1))


@pytest.mark.parametrize("setting", [{"eta": -0.1}, {"eta": 1.1}, {"eta_b": -1.0}, {"eta_b": 1.5}, {"steps": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError):
        DDRM(**setting)
