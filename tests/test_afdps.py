"""AFDPS: its steps against dense algebra, its discretised law in closed form, mixtures, evidence, and refusals."""

import math
import re
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, plane_problem
from invdiff.diagnostics.mixtures import random_mixture
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.integrators import Ancestral, Euler, karras_levels
from invdiff.metrics import sliced_wasserstein
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.priors import GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.afdps import AFDPS, laplacian
from invdiff.samplers.annealing import Levels
from invdiff.samplers.particles import Stratified, Weighted

F64 = torch.float64
SHAPE = (1, 4, 4)
FORMS = ["half", "laplacian", "ode"]


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
    unit = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.unit * torch.sin(x / self.unit)


def gaussian() -> GaussianPrior:
    b = normal(16, 16, seed=3)
    return GaussianPrior(
        normal(*SHAPE, seed=1), b @ b.mT / 16.0 + 0.2 * torch.eye(16, dtype=F64), sigma_min=1e-2, sigma_max=60.0
    )


def blurred() -> Problem:
    A = operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="circular")
    return Problem(likelihoods.Gaussian(A, normal(1, *SHAPE, seed=2), 0.3))


def mixed(seed: int = 5, noise_std: float | Tensor = 0.3) -> Problem:
    A = Matrix(normal(6, 16, seed=4) / 4.0, SHAPE)
    return Problem(likelihoods.Gaussian(A, normal(1, 6, seed=seed), noise_std))


def dense(posterior: Posterior, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, y, and R + sigma^2 A A^T as the path has it."""
    linear = posterior.linear
    A = linear.operator(torch.eye(16, dtype=F64).reshape(-1, *SHAPE)).flatten(1).mT
    gram = A @ A.mT if linear.has_svd else torch.eye(len(A), dtype=F64) * torch.linalg.matrix_norm(A, 2) ** 2
    noise = torch.broadcast_to(linear.noise_std**2, linear.operator.out_shape).flatten().diag()
    return A, linear.measurement[0].flatten(), noise + sigma**2 * gram


# One step, and the start.

PROBLEMS = [blurred(), mixed(), mixed(noise_std=torch.linspace(0.2, 0.6, 6, dtype=F64))]


@pytest.mark.parametrize("problem", PROBLEMS, ids=["svd", "no-svd", "diagonal"])
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_dense_algebra(problem, form):
    prior, n, lam = gaussian(), 3, 0.7
    posterior = Posterior(problem, prior, dtype=F64)
    sampler = AFDPS(steps=10, form=form, stochasticity=lam, threshold=0.0)
    levels = sampler.levels.of(posterior, 10)
    C, m, one = prior.covariance, prior.mean.flatten(), torch.eye(16, dtype=F64)
    # ||A|| of an operator without an SVD is found by power iteration, to 1e-6.
    tolerance = 1e-9 if posterior.linear.has_svd else 1e-4

    def f(x: Tensor, sigma: float) -> Tensor:
        A, y, R = dense(posterior, sigma)
        return torch.distributions.MultivariateNormal(y, R).log_prob(x @ A.mT)

    def slope(x: Tensor, sigma: float) -> Tensor:  # of the flow: dz / dsigma
        return -sigma * (m - x) @ torch.linalg.inv(C + sigma**2 * one)

    for k in (0, 5, 9):
        sigma, after = levels[k], levels[k + 1]
        z = prior.mean + math.hypot(sigma, 1.0) * normal(1, n, *SHAPE, seed=k)
        state = replace(Weighted.begin(z), step=k)
        found, info = sampler.step(posterior, state, noise=Noise([7], n, dtype=F64).at(k + 1))
        assert info.sigma == after
        x = z[0].flatten(1)
        moved = x + (after - sigma) * slope(x, sigma)
        if form == "ode" and after > 0.0:
            moved = x + 0.5 * (after - sigma) * (slope(x, sigma) + slope(moved, after))
        expected, increment = moved, f(moved, after) - f(x, sigma)
        if form != "ode" and after > 0.0:
            # The score at the new level of the state that was denoised to the same D.
            score = -slope(x, sigma) / after
            e = 0.5 * after**2 * (1.0 - (after / sigma) ** (2.0 * lam))
            A, y, R = dense(posterior, after)
            information = A.mT @ torch.linalg.inv(R) @ A
            g = (y - moved @ A.mT) @ torch.linalg.inv(R) @ A
            eps = Noise([7], n, dtype=F64).at(k + 1).like(z)[0].flatten(1)
            pulls = 1.0 if form == "half" else 2.0
            expected = moved + e * (score + pulls * g) + math.sqrt(2.0 * e) * eps
            if form == "laplacian":
                increment = increment + e * ((g * (g + score)).sum(1) - information.trace())
        torch.testing.assert_close(found.z[0].flatten(1), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.log_weights[0], increment, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=["svd", "no-svd"])
def test_the_start_is_an_exact_draw(problem, kappa):
    posterior, n = Posterior(problem, gaussian(), dtype=F64), 4000
    sampler = AFDPS(form="ode", path=Noised(kappa=kappa), levels=Levels(sigma_max=2.0))
    state = sampler.init(posterior, 1, n, noise=Noise([3], n, dtype=F64).at(0))
    A, y, R = dense(posterior, 2.0 * math.sqrt(kappa))
    m = posterior.noised_mean().flatten()
    S = torch.linalg.inv(torch.eye(16, dtype=F64) / 4.0 + A.mT @ torch.linalg.inv(R) @ A)
    mean = m + S @ A.mT @ torch.linalg.inv(R) @ (y - A @ m)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(S), (state.z[0].flatten(1) - mean).mT, upper=False)
    assert float(whitened.mean(1).abs().max()) < 4.5 / math.sqrt(n)
    # Entries of the sample covariance have a standard deviation of at most sqrt(2 / n).
    assert float((whitened @ whitened.mT / n - torch.eye(16, dtype=F64)).abs().max()) < 5.0 * math.sqrt(2.0 / n)
    exact = torch.distributions.MultivariateNormal(A @ m, 4.0 * A @ A.mT + R).log_prob(y)
    assert abs(float(state.evidence[0] - exact)) < 1e-4


# The law of the discretised walk of one Gaussian value, without any sampling error.

C1, M1, A1, Y1, R1, SIGMAS = 0.8, 0.3, 1.2, 1.5, 0.49, (0.01, 30.0)


def law(
    form: str, steps: int, lam: float = 1.0, *, kappa: float = 1.0, ladder: Levels | None = None, euler: bool = False
) -> tuple[float, float, float]:
    """Errors of log evidence, of the variance (relative) and of the mean (in std) that ``steps`` leave.

    Each step multiplies a Gaussian measure by the exponential of a quadratic, maps it affinely and adds noise.
    ``euler`` is Euler-Maruyama from the old level.
    """
    ladder = ladder or Levels()
    top, pulls = ladder.sigma_max or SIGMAS[1], {"half": 1.0, "laplacian": 2.0, "ode": 0.0}[form]
    levels = karras_levels(steps, SIGMAS[0], top, ladder.rho)

    def f(z: float, s: float) -> float:
        V = R1 + kappa * s * s * A1**2
        return -0.5 * ((Y1 - A1 * z) ** 2 / V + math.log(2.0 * math.pi * V))

    def grad(z: float, s: float) -> float:
        return A1 * (Y1 - A1 * z) / (R1 + kappa * s * s * A1**2)

    def D(z: float, s: float) -> float:
        return M1 + C1 / (C1 + s * s) * (z - M1)

    V = R1 + kappa * top**2 * A1**2
    center = M1 + C1 / (C1 + SIGMAS[1] ** 2) * (0.0 - M1)
    S = 1.0 / (1.0 / top**2 + A1**2 / V)
    mu = S * (center / top**2 + A1 * Y1 / V)
    V += top**2 * A1**2
    log_mass = -0.5 * ((Y1 - A1 * center) ** 2 / V + math.log(2.0 * math.pi * V))
    for s, t in pairwise(levels):
        e = 0.0 if form == "ode" else 0.5 * t * t * (1.0 - (t / s) ** (2.0 * lam))

        def flow(z: float, s: float = s, t: float = t) -> float:
            return D(z, s) + t / s * (z - D(z, s))

        def move(z: float, s: float = s, t: float = t, e: float = e) -> float:
            x = flow(z, s, t)
            return x if t == 0.0 else x + e * ((D(z, s) - x) / t**2 + pulls * grad(x, t))

        def increment(z: float, s: float = s, t: float = t, e: float = e) -> float:
            x = flow(z, s, t)
            if form != "laplacian" or t == 0.0:
                return f(x, t) - f(z, s)
            g, second = grad(x, t), -(A1**2) / (R1 + kappa * t * t * A1**2)
            return f(x, t) - f(z, s) + e * (g * (g + (D(z, s) - x) / t**2) + second)

        if euler and t > 0.0:
            e = lam * s * (s - t)

            def move(z: float, s: float = s, t: float = t) -> float:
                return z + (s - t) * ((1.0 + lam) * (D(z, s) - z) / s + pulls * lam * s * grad(z, s))

            def increment(z: float, s: float = s, t: float = t) -> float:
                return (s - t) * (D(z, s) - z) / s * grad(z, s) + f(z, t) - f(z, s)

        curve = -(increment(1.0) - 2.0 * increment(0.0) + increment(-1.0))
        tilt = 0.5 * (increment(1.0) - increment(-1.0))
        after, b = 1.0 / (1.0 / S + curve), mu / S + tilt
        log_mass += increment(0.0) - 0.5 * mu**2 / S + 0.5 * b**2 * after + 0.5 * math.log(after / S)
        factor, shift = move(1.0) - move(0.0), move(0.0)
        mu, S = shift + factor * after * b, factor**2 * after + 2.0 * e
    V = R1 + A1**2 * C1
    evidence = -0.5 * ((Y1 - A1 * M1) ** 2 / V + math.log(2.0 * math.pi * V))
    variance = 1.0 / (1.0 / C1 + A1**2 / R1)
    mean = variance * (M1 / C1 + A1 * Y1 / R1)
    return log_mass - evidence, S / variance - 1.0, (mu - mean) / math.sqrt(variance)


def one_value() -> Posterior:
    prior = GaussianPrior(
        torch.tensor([M1], dtype=F64), torch.tensor([[C1]], dtype=F64), sigma_min=SIGMAS[0], sigma_max=SIGMAS[1]
    )
    A = Matrix(torch.tensor([[A1]], dtype=F64), (1,))
    return Posterior(Problem(likelihoods.Gaussian(A, torch.tensor([[Y1]], dtype=F64), math.sqrt(R1))), prior, dtype=F64)


@pytest.mark.parametrize(
    ("form", "steps", "lam"), [("half", 12, 1.0), ("half", 12, 0.4), ("laplacian", 20, 0.3), ("ode", 12, 1.0)]
)
def test_particles_follow_the_discretised_law(form, steps, lam):
    """At few steps, whose errors are far above the noise of the particles."""
    chains, n = 16, 2000
    sampler = AFDPS(form=form, steps=steps, stochasticity=lam, integrator=Euler())
    solution = one_value().sample(sampler, n, chains=chains, seed=2)
    evidence, variance, mean = law(form, steps, lam)
    V = R1 + A1**2 * C1
    exact = -0.5 * ((Y1 - A1 * M1) ** 2 / V + math.log(2.0 * math.pi * V))
    found = solution.log_evidence - exact
    assert abs(found - evidence) < 4.5 * solution.log_evidence_se + 1e-4
    std = math.sqrt(1.0 / (1.0 / C1 + A1**2 / R1))
    exact_mean = std**2 * (M1 / C1 + A1 * Y1 / R1)
    x = solution.draws
    size = chains * n / 4  # effective draws, no fewer
    assert abs((float(x.mean()) - exact_mean) / std - mean) < 4.5 / math.sqrt(size)
    assert abs(float(x.var()) / std**2 - 1.0 - variance) < 4.5 * math.sqrt(2.0 / size)
    # So that the exact law would not pass.
    assert abs(mean) * math.sqrt(size) > 6.0 or abs(found) > 9.0 * solution.log_evidence_se


def test_the_error_is_of_first_order():
    errors = [law("half", steps) for steps in (30, 60, 120, 240)]
    for coarse, fine in pairwise(errors):
        # Twice the steps leave half of the error; before the limit a little more or less.
        assert 1.8 < coarse[1] / fine[1] < 2.4
        assert 1.8 < coarse[2] / fine[2] < 2.2
        assert coarse[0] / fine[0] > 1.8
    for steps, (evidence, _, _) in zip((30, 60, 120, 240), errors, strict=True):
        # What the flow's own weight gains over Euler-Maruyama, which the file states.
        assert abs(law("half", steps, euler=True)[0]) > 50.0 * abs(evidence)
    second = [law("laplacian", steps)[0] for steps in (30, 60, 120, 240)]
    assert all(1.9 < coarse / fine < 2.1 for coarse, fine in pairwise(second))


# Mixtures.


# At 120 evaluations, by form and dimension: the largest distance, in units of the largest that exact draws of a quarter
# of the number have, less 0.03 that the steps leave; and the largest error of the evidence, of which particles leave
# 0.1, the steps of "laplacian" 0.6, and the flow in four dimensions, where its particles thin out, as much.
BOUNDS = {
    ("half", 2): (1.5, 0.25), ("half", 4): (1.5, 0.25), ("laplacian", 2): (1.5, 0.9), ("laplacian", 4): (1.5, 1.2),
    ("ode", 2): (1.5, 0.25), ("ode", 4): (5.0, 0.9),
}  # fmt: skip


def distance_bound(exact, form: str, d: int) -> float:
    floors = [sliced_wasserstein(exact.sample(512, seed=s), exact.sample(512, seed=10)) for s in range(5)]
    return BOUNDS[form, d][0] * max(floors) + 0.03


@pytest.mark.parametrize(("form", "d"), list(BOUNDS))
def test_mixtures_and_their_evidence(form, d):
    case, sampler = random_mixture(d), AFDPS(form=form, steps=60 if form == "ode" else 120)
    exact, posterior = case.exact, Posterior(case.problem, case.prior, dtype=F64)
    solution = posterior.sample(sampler, 1024, chains=2, seed=1)
    reference, bound = exact.sample(2048, seed=7), distance_bound(exact, form, d)
    assert sliced_wasserstein(solution.draws, reference) < bound
    assert abs(solution.log_evidence - exact.log_evidence) < BOUNDS[form, d][1]
    if form == "half":
        # The same walk without its weights goes elsewhere.
        free = posterior.sample(replace(sampler, threshold=0.0), 1024, chains=2, seed=1)
        (particles,) = free.particles.values()
        assert sliced_wasserstein(particles.flatten(0, 1), reference) > 3.0 * bound


def test_it_keeps_the_bounds_of_exact_draws():
    report = check_sampler(AFDPS(), problems=[plane_problem()], steps=(30, 150), draws=400, chains=8)
    assert report.exact
    _, row = report.rows["plane"]
    assert abs(row.log_evidence_error) < row.bounds["log_evidence_error"][1] < 0.15


# Paths.


def test_the_published_path_is_refused_where_it_would_diverge():
    case = random_mixture(2)
    posterior, constant = Posterior(case.problem, case.prior, dtype=F64), Noised(kappa=0.0)
    for form in ("half", "laplacian"):
        sampler = AFDPS(form=form, path=constant)
        with pytest.raises(
            InputError, match=r"from sigma 40 to .* too stiff for 120 steps.*Levels\(rho=0\.5\)"
        ) as found:
            posterior.sample(sampler, 8)
        # The refusal is no more than prudence: without it the walk leaves all bounds.
        noise = Noise([1], 8, dtype=F64)
        state = Weighted.begin(posterior.start(1, 8, noise))
        while not sampler.done(state) and float(state.z.abs().max()) < 1e30:
            state, _ = sampler.step(posterior, state, noise=noise.at(state.step + 1))
        assert float(state.z.abs().max()) >= 1e30
        # And as many steps as it asks for are taken.
        least = float(re.search(r"more than (\S+) steps", str(found.value)).group(1))
        for share, refused in ((0.95, True), (1.05, False)):
            enough = replace(sampler, steps=int(share * least), levels=Levels(rho=0.5))
            if refused:
                with pytest.raises(InputError, match="too stiff"):
                    enough.init(posterior, 1, 8, noise=noise.at(0))
            else:
                enough.init(posterior, 1, 8, noise=noise.at(0))


def test_the_published_path_follows_its_law_to_the_same_end():
    levels, path = Levels(sigma_max=5.0, rho=0.5), Noised(kappa=0.0)  # stable from 18 steps
    errors = [law("half", steps, kappa=0.0, ladder=levels)[0] for steps in (150, 300, 600, 1200, 2400)]
    solution = one_value().sample(AFDPS(path=path, steps=150, levels=levels), 500, chains=4, seed=1)
    V = R1 + A1**2 * C1
    evidence = -0.5 * ((Y1 - A1 * M1) ** 2 / V + math.log(2.0 * math.pi * V))
    assert abs(solution.log_evidence - evidence - errors[0]) < 4.5 * solution.log_evidence_se
    assert errors[0] > 9.0 * solution.log_evidence_se  # which is the steps': each doubling halves it
    differences = [coarse - fine for coarse, fine in pairwise(errors)]
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in pairwise(differences))
    # The start has no spread of the prior's in it: C / sigma_max^2 = 0.03, and as much of a nat.
    assert abs(errors[-1] - differences[-1]) < 0.03


def test_the_flow_along_the_published_path_fails_where_the_noised_one_does_not():
    case = random_mixture(4)
    exact, posterior = case.exact, Posterior(case.problem, case.prior, dtype=F64)
    solution = posterior.sample(AFDPS(form="ode", steps=60, path=Noised(kappa=0.0)), 1024, chains=2, seed=1)
    assert sliced_wasserstein(solution.draws, exact.sample(2048, seed=7)) > 3.0 * distance_bound(exact, "half", 4)
    assert abs(solution.log_evidence - exact.log_evidence) > 2.0


BENT = [
    ("half", {}),
    ("laplacian", {"stochasticity": 0.3}),  # with more its weights have long tails
    ("ode", {}),
    ("half", {"path": Tempered(scale=0.2)}),
    ("half", {"resampling": Stratified(), "threshold": 0.9, "stochasticity": 0.5}),
]


@pytest.mark.parametrize(("form", "settings"), BENT)
def test_a_problem_that_is_not_linear(form, settings):
    """Independent values, so that the posterior of each is an integral over a line."""
    y, noise_std, n = torch.tensor([[-1.2, 0.4]], dtype=F64), 0.4, 1000
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), sigma_min=0.02, sigma_max=30.0)
    problem = Problem(likelihoods.Gaussian(Bend((2,), (2,)), y, noise_std))
    solution = Posterior(problem, prior, dtype=F64).sample(AFDPS(steps=60, form=form, **settings), n, chains=2, seed=1)
    t = torch.linspace(-6.0, 6.0, 4001, dtype=F64)[:, None]
    density = torch.distributions.Normal(y, noise_std).log_prob(t + 0.3 * torch.sin(t))
    density = (density - 0.5 * t**2 - 0.5 * math.log(2.0 * math.pi)).exp()
    evidence = float((density.sum(0) * 12.0 / 4000).log().sum())
    w = density / density.sum(0)
    mean = (w * t).sum(0)
    std = (w * (t - mean) ** 2).sum(0).sqrt()
    size = 2 * n / 4  # effective draws, no fewer
    assert float(((solution.draws.mean(0) - mean) / std).abs().max()) < 4.5 / math.sqrt(size) + 0.02
    assert float((solution.draws.std(0) / std - 1.0).abs().max()) < 4.5 / math.sqrt(2 * size) + 0.02
    assert abs(solution.log_evidence - evidence) < (0.2 if form == "laplacian" else 0.05) + 4.5 / math.sqrt(size)


# The Laplacian.


@pytest.mark.parametrize("unit", [1.0, 1e-7, 1e7])
def test_the_laplacian_by_random_signs_of_a_likelihood_with_independent_values_is_exact(unit):
    """The Hessian is diagonal, whatever the signs; in any units."""
    operator, n = Bend(SHAPE, SHAPE), 3
    operator.unit = unit
    problem = Problem(likelihoods.Gaussian(operator, unit * normal(1, *SHAPE), 0.4 * unit))
    posterior, z = Posterior(problem, gaussian(), dtype=F64), normal(1, n, *SHAPE, seed=2)
    beta, sigma = 1.0 / (1.0 + (0.3 / 0.4) ** 2), 0.3
    r = problem.likelihood.measurement[0] / unit - z - 0.3 * torch.sin(z)
    second = beta * (-((1.0 + 0.3 * torch.cos(z)) ** 2) - 0.3 * torch.sin(z) * r) / 0.4**2
    path, noise = Tempered(scale=0.4 * unit), Noise([3], n, dtype=F64)
    found = laplacian(posterior, path, unit * z, sigma * unit, noise, 1) * unit**2
    torch.testing.assert_close(found, second.flatten(2).sum(2), rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class Own(Path):
    """The noised path under another name, so that its Laplacian is not known."""

    def potential(self, sigma, linear, log_prob_and_grad):
        return Noised().potential(sigma, linear, log_prob_and_grad)


@pytest.mark.parametrize("problem", PROBLEMS, ids=["svd", "no-svd", "diagonal"])
def test_the_laplacian_of_linear_problems(problem, monkeypatch):
    n = 400
    posterior, z, noise = Posterior(problem, gaussian(), dtype=F64), normal(1, n, *SHAPE), Noise([3], n, dtype=F64)
    for sigma in (0.1, 5.0):
        A, _, R = dense(posterior, sigma)
        G = A.mT @ torch.linalg.inv(R) @ A
        trace, spread = float(G.trace()), math.sqrt(2.0 * float((G**2).sum() - (G.diagonal() ** 2).sum()))
        assert float(laplacian(posterior, Noised(), z, sigma, noise, 1)) == pytest.approx(-trace, rel=1e-5)
        estimates = laplacian(posterior, Own(), z, sigma, noise, 2)
        assert estimates.shape == (1, n)
        assert abs(float(estimates.mean()) + trace) < 4.5 * spread / math.sqrt(2 * n) + 1e-6 * trace
        A, _, R = dense(posterior, 0.0)
        G = A.mT @ torch.linalg.inv(R) @ A / (1.0 + sigma**2 / 4.0)
        found = laplacian(posterior, Tempered(scale=2.0), z, sigma, noise, 1)
        assert float(found) == pytest.approx(-float(G.trace()), rel=1e-9)
    if not posterior.linear.has_svd:
        monkeypatch.setattr("invdiff.samplers.afdps._DENSE", 4)
        signs = [float(laplacian(posterior, Noised(), z, sigma, noise, 1)) for _ in range(2)]
        assert signs[0] == signs[1]
        assert 0.0 < abs(signs[0] + trace) < 4.5 * spread / math.sqrt(64)


# Company, deaths, and refusals.


@dataclass(frozen=True)
class Half(Path):
    """Kills what has a first value below a level, where noise is low."""

    level: float

    def potential(self, sigma, linear, log_prob_and_grad):
        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = Noised().potential(sigma, linear, log_prob_and_grad)(z)
            dead = (z.flatten(1)[:, 0] < self.level) & (0.0 < sigma < 2.0)
            nan = torch.where(dead, math.nan, 0.0).reshape(-1, *[1] * (z.ndim - 1))
            return torch.where(dead, -math.inf, value), grad + nan

        return value_and_grad


@pytest.mark.parametrize("form", FORMS)
def test_dead_particles_stay_dead_and_harm_no_other(form):
    case = random_mixture(2)
    middle = float(case.exact.mean[0, 0, 0])
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    sampler = AFDPS(steps=20, form=form, path=Half(middle), threshold=0.0, probes=1)
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
    # The last weight, which the path does not touch, leaves only those above at the last level but for a step.
    assert float(solution.draws[:, 0, 0].min()) > middle - 0.1
    with pytest.raises(SamplingError, match="All 4 particles of ensemble 0 are dead"):
        posterior.sample(replace(sampler, path=Half(50.0)), 4)


def test_a_network_that_is_not_a_number_ends_the_run():
    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-2, 50.0

        def denoise(self, z, sigma):
            return z * (math.nan if float(torch.as_tensor(sigma).max()) < 1.0 else 0.5)

    with pytest.raises(SamplingError, match=r"NaN or infinite at step \d, sigma"):
        Posterior(blurred(), Broken(), dtype=F64).sample(AFDPS(steps=9), 4)


def test_what_it_needs_is_said_before_the_run():
    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(*SHAPE), 0.5))
    with pytest.raises(CapabilityError, match="AFDPS needs linear"):
        invdiff.solve(bent, gaussian(), AFDPS(path=Noised()))
    assert AFDPS().requires() == {"denoiser", "likelihood_gradient"}
    assert AFDPS(form="ode").requires() == {"denoiser"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cost_is_what_is_counted(form, steps):
    about = Posterior(mixed(), gaussian(), dtype=F64).sample(AFDPS(steps=steps, form=form), 3).about
    forward = 2 * steps - 1 if form == "ode" else steps
    assert about["evaluations_per_draw"] == AFDPS(steps=steps, form=form).cost().forward == forward
    assert about["backward_evaluations_per_draw"] == AFDPS(steps=steps, form=form).cost().backward == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"threshold": 1.5}, r"in \[0, 1\]; got 1\.5"),
        ({"form": "sde"}, "one of half, laplacian, ode; got 'sde'"),
        ({"stochasticity": -1.0}, r"got -1\.0"),
        ({"stochasticity": math.nan}, "got nan"),
        ({"probes": 0}, "at least one probe, got 0"),
        ({"integrator": Ancestral()}, r"Heun\(\) or Euler\(\)"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        AFDPS(**settings)
