"""Transport with weights and Langevin refreshes: against dense algebra, exact posteriors, and company of any kind."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, field_problems, measure, plane_problem
from invdiff.diagnostics.mixture_measures import mode_shares, total_variation
from invdiff.diagnostics.mixtures import plane_modes
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.integrators import Euler, Heun
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.particles import Stratified, Systematic, conditional_ess
from invdiff.samplers.preconditioner import Information, precondition
from invdiff.samplers.transport_langevin import TransportLangevin, TransportState

F64 = torch.float64
SHAPE = (1, 4, 4)
FIELDS = field_problems()


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


def field() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)


def blurred() -> Problem:
    A = operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="circular")
    return Problem.simulate(A, field().sample(1, seed=4)[0], noise_std=0.3, seed=1)


def mixed(seed: int = 5) -> Problem:
    """A problem without an SVD."""
    return Problem(likelihoods.Gaussian(Matrix(normal(6, 16, seed=4) / 4.0, SHAPE), normal(1, 6, seed=seed), 0.3))


def dense(function, size: int = 16) -> Tensor:
    """Matrix of a linear function on (n, *SHAPE)."""
    return function(torch.eye(size, dtype=F64).reshape(-1, *SHAPE)).flatten(1).mT


def dense_problem(posterior: Posterior, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, y, and R + sigma^2 A A^T as the path has it."""
    linear = posterior.linear
    A, y = dense(linear.operator), linear.measurement[0].flatten()
    gram = A @ A.mT if linear.has_svd else torch.eye(len(A), dtype=F64) * torch.linalg.matrix_norm(A, 2) ** 2
    return A, y, linear.noise_std**2 * torch.eye(len(A), dtype=F64) + sigma**2 * gram


@pytest.mark.parametrize("problem", [blurred(), mixed()], ids=["svd", "no-svd"])
def test_one_step_is_that_of_dense_algebra(problem):
    posterior, sampler, n = Posterior(problem, field(), dtype=F64), TransportLangevin(steps=8, refreshes=2), 3
    levels = sampler.ladder(posterior)
    sigma, after = levels[4], levels[5]
    z, carried = normal(1, n, *SHAPE), normal(1, n, *SHAPE, seed=1)
    state = replace(TransportState.begin(z, carried=carried), step=4)
    found, info = replace(sampler, resampling=Systematic(), threshold=0.0).step(
        posterior, state, noise=Noise([7], n, dtype=F64).at(5)
    )
    assert info.sigma == after
    C, m, one = field().covariance, field().mean.flatten(), torch.eye(16, dtype=F64)
    noised, (A, y, R) = C + sigma**2 * one, dense_problem(posterior, sigma)
    information = Information.along(posterior, Noised(), sigma)
    pre = precondition(posterior, information, sigma, 0.8)
    zero = torch.zeros(16, *SHAPE, dtype=F64)
    eP = dense(lambda v: pre.refresh(zero, v, zero))
    root = dense(lambda v: pre.refresh(zero, zero, v))
    torch.testing.assert_close(root @ root, 2.0 * eP, rtol=1e-10, atol=1e-12)
    noise, x, xi = Noise([7], n, dtype=F64).at(5), z[0].flatten(1), carried[0].flatten(1)
    for _ in range(2):
        grad = (m - x) @ torch.linalg.inv(noised) + (y - x @ A.mT) @ torch.linalg.inv(R) @ A
        fresh = noise.like(z)[0].flatten(1)
        x, xi = x + grad @ eP + 0.5 * (xi + fresh) @ root, fresh
    values, vectors = torch.linalg.eigh(C)
    flow = vectors @ torch.diag(((values + after**2) / (values + sigma**2)).sqrt()) @ vectors.mT
    moved = m + (x - m) @ flow

    def f(x: Tensor, s: float) -> Tensor:
        _, _, R = dense_problem(posterior, s)
        return torch.distributions.MultivariateNormal(y, R).log_prob(x @ A.mT)

    # ||A|| of an operator without an SVD is found by power iteration, to 1e-6.
    tolerance = 1e-9 if posterior.linear.has_svd else 1e-5
    torch.testing.assert_close(found.z[0].flatten(1), moved, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.log_weights[0], f(moved, after) - f(x, sigma), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.carried[0].flatten(1), xi)


@pytest.mark.parametrize("problem", [blurred(), mixed()], ids=["svd", "no-svd"])
@pytest.mark.parametrize("sigma", [0.02, 1.0, 30.0])
def test_the_refresh_leaves_a_gaussian_as_it_is(problem, sigma):
    """Closed form: cov(z) = H^-1 and cov(z, xi) = sqrt(2 E) / 2 are kept by a step, which must also be stable."""
    posterior = Posterior(problem, field(), dtype=F64)
    A, _, R = dense_problem(posterior, sigma)
    one = torch.eye(16, dtype=F64)
    H = torch.linalg.inv(field().covariance + sigma**2 * one) + A.mT @ torch.linalg.inv(R) @ A
    pre = precondition(posterior, Information.along(posterior, Noised(), sigma), sigma, 1.6)
    zero = torch.zeros(16, *SHAPE, dtype=F64)
    eP = dense(lambda v: pre.refresh(zero, v, zero))
    root = dense(lambda v: pre.refresh(zero, zero, v))
    contraction = one - eP @ H
    spectrum = torch.linalg.eigvals(eP @ H).real
    # Power iteration comes from below, by less than a tenth here.
    assert 0.0 < float(spectrum.min()) <= float(spectrum.max()) < 1.76
    assert float(spectrum.max()) > 1.4  # and the step is not needlessly small
    covariance, cross = torch.linalg.inv(H), 0.5 * root
    half = contraction @ cross @ root.mT * 0.5
    after = contraction @ covariance @ contraction.mT + half + half.mT + 0.5 * root @ root.mT
    torch.testing.assert_close(after, covariance, rtol=2e-5, atol=2e-5 * float(covariance.abs().max()))


@pytest.mark.parametrize("problem", [blurred(), mixed()], ids=["svd", "no-svd"])
@pytest.mark.parametrize("steps", [6, 60])
def test_the_stiffest_direction_is_followed_from_level_to_level(problem, steps):
    """A few power iterations a level keep all steps stable, and no smaller than needed, along the whole ladder."""
    posterior, direction = Posterior(problem, field(), dtype=F64), None
    A, _, _ = dense_problem(posterior, 1.0)
    one, zero = torch.eye(16, dtype=F64), torch.zeros(16, *SHAPE, dtype=F64)
    for sigma in TransportLangevin(steps=steps).ladder(posterior)[:-1]:
        _, _, R = dense_problem(posterior, sigma)
        H = torch.linalg.inv(field().covariance + sigma**2 * one) + A.mT @ torch.linalg.inv(R) @ A
        pre = precondition(posterior, Information.along(posterior, Noised(), sigma), sigma, 1.6, direction=direction)
        direction = pre.direction
        largest = float(torch.linalg.eigvals(dense(lambda v, pre=pre: pre.refresh(zero, v, zero)) @ H).real.max())
        assert 1.4 < largest < 1.76


@pytest.mark.parametrize("problem", [blurred(), mixed()], ids=["svd", "no-svd"])
def test_a_step_with_momentum_is_that_of_dense_algebra(problem):
    posterior, n, c = Posterior(problem, field(), dtype=F64), 3, 0.6
    sampler = TransportLangevin(steps=8, refreshes=2, momentum=c)
    levels = sampler.ladder(posterior)
    sigma, after = levels[4], levels[5]
    z, carried = normal(1, n, *SHAPE), normal(1, n, *SHAPE, seed=1)
    state = replace(TransportState.begin(z, carried=carried), step=4)
    found, _ = sampler.step(posterior, state, noise=Noise([7], n, dtype=F64).at(5))
    C, m, one = field().covariance, field().mean.flatten(), torch.eye(16, dtype=F64)
    noised, (A, y, R) = C + sigma**2 * one, dense_problem(posterior, sigma)
    pre = precondition(posterior, Information.along(posterior, Noised(), sigma), sigma, 0.8)
    root = dense(lambda v: pre.root(v[None])[0])
    eP = dense(lambda v: pre.refresh(torch.zeros_like(v), v, torch.zeros_like(v)))
    torch.testing.assert_close(root @ root, 2.0 * eP, rtol=1e-10, atol=1e-12)

    def grad(x: Tensor) -> Tensor:
        return (m - x) @ torch.linalg.inv(noised) + (y - x @ A.mT) @ torch.linalg.inv(R) @ A

    noise, x, v = Noise([7], n, dtype=F64).at(5), z[0].flatten(1), carried[0].flatten(1)
    for kick in (0.5, 1.0):
        u = v + kick * grad(x) @ root
        v = c * u + math.sqrt(1.0 - c**2) * noise.like(z)[0].flatten(1)
        x = x + 0.5 * (u + v) @ root
    v = v + 0.5 * grad(x) @ root
    values, vectors = torch.linalg.eigh(C)
    flow = vectors @ torch.diag(((values + after**2) / (values + sigma**2)).sqrt()) @ vectors.mT
    tolerance = 1e-9 if posterior.linear.has_svd else 1e-5
    torch.testing.assert_close(found.z[0].flatten(1), m + (x - m) @ flow, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.carried[0].flatten(1), v, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("c", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("sigma", [0.02, 1.0, 30.0])
def test_momentum_leaves_a_gaussian_as_it_is(c, sigma):
    """Closed form: cov(z) = H^-1, cov(v) = 1 - root H root / 4, and z and v independent, are kept by a step."""
    posterior = Posterior(blurred(), field(), dtype=F64)
    A, _, R = dense_problem(posterior, sigma)
    one = torch.eye(16, dtype=F64)
    H = torch.linalg.inv(field().covariance + sigma**2 * one) + A.mT @ torch.linalg.inv(R) @ A
    pre = precondition(posterior, Information.along(posterior, Noised(), sigma), sigma, 0.8)
    root = dense(lambda v: pre.root(v[None])[0])
    zero = torch.zeros_like(one)
    kick = torch.cat((torch.cat((one, zero), 1), torch.cat((-0.5 * root @ H, one), 1)))
    # On (z, u): v = c u + noise, and half a drift with each.
    turn = torch.cat((torch.cat((one, 0.5 * (1.0 + c) * root), 1), torch.cat((zero, c * one), 1)))
    noise = math.sqrt(1.0 - c**2) * torch.cat((0.5 * root, one))
    law = torch.block_diag(torch.linalg.inv(H), one - 0.25 * root @ H @ root)
    after = kick @ (turn @ (kick @ law @ kick.mT) @ turn.mT + noise @ noise.mT) @ kick.mT
    torch.testing.assert_close(after, law, rtol=2e-5, atol=2e-5 * float(law.abs().max()))


@pytest.mark.parametrize("problem", [blurred(), mixed()], ids=["svd", "no-svd"])
def test_the_start_has_its_law_and_evidence(problem):
    posterior, n = Posterior(problem, field(), dtype=F64), 20_000
    sampler = TransportLangevin(steps=10, resampling=Systematic(), levels=invdiff.samplers.Levels(sigma_max=2.0))
    state = sampler.init(posterior, 1, n, noise=Noise([3], n, dtype=F64).at(0))
    A, y, R = dense_problem(posterior, 2.0)
    m, one = field().mean.flatten(), torch.eye(16, dtype=F64)
    S = torch.linalg.inv(one / 4.0 + A.mT @ torch.linalg.inv(R) @ A)
    mean = m + S @ A.mT @ torch.linalg.inv(R) @ (y - A @ m)
    x = state.z[0].flatten(1)
    std = S.diagonal().sqrt()
    assert float(((x.mean(0) - mean) / std).abs().max()) < 4.5 / math.sqrt(n)
    # Entries of the sample covariance of whitened draws have a standard deviation of at most sqrt(2 / n).
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(S), (x - mean).mT, upper=False)
    assert float((whitened @ whitened.mT / n - one).abs().max()) < 5.0 * math.sqrt(2.0 / n)
    exact = torch.distributions.MultivariateNormal(A @ m, 4.0 * A @ A.mT + R).log_prob(y)
    assert abs(float(state.evidence[0] - exact)) < 1e-4
    assert float(state.log_weights.abs().max()) == 0.0


@pytest.mark.parametrize("case", FIELDS, ids=[c.name for c in FIELDS])
def test_unweighted_draws_are_exact_on_fields_at_a_hundred_evaluations(case):
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(TransportLangevin(steps=20), 200, seed=1)
    assert solution.about["evaluations_per_draw"] == 100
    assert solution.log_weights is None
    assert not measure(solution.draws, case.exact).failures


def test_weighted_draws_and_evidence_are_exact():
    """Where the spread of the log-weights is small; the evidence of a field needs more levels than a test has."""
    sampler = TransportLangevin(resampling=Systematic())
    report = check_sampler(sampler, problems=[plane_problem()], steps=(20,), draws=400, chains=8)
    assert report.exact
    (row,) = report.rows["plane"]
    assert abs(row.log_evidence_error) < row.bounds["log_evidence_error"][1] < 0.1
    assert not TransportLangevin().exact
    case = FIELDS[0]
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(replace(sampler, steps=20), 200, seed=1)
    found = measure(solution.particles[case.problem.event[0].name][0], case.exact, solution.log_weights[0])
    assert not found.failures


def test_weights_find_modes_and_evidence_and_draws_without_them_do_not():
    case = plane_modes()
    exact, off = case.exact, {}
    for resampling in (None, Systematic(), Stratified()):
        sampler = TransportLangevin(steps=24, resampling=resampling)
        solution = Posterior(case.problem, case.prior, dtype=F64).sample(sampler, 1000, chains=4, seed=2)
        off[resampling] = total_variation(mode_shares(solution.draws, exact.law), exact.law.weights)
        if resampling is not None:
            # 4000 draws of effectively no fewer than a quarter as many; Euler's flow leaves about 0.1 nats.
            assert off[resampling] < 4.5 * 0.5 / math.sqrt(1000)
            assert abs(solution.log_evidence - exact.log_evidence) < 0.1 + 4.0 * solution.log_evidence_se
            assert solution.log_weights.shape == (4, 1000)
            assert min(info.ess for info in solution.trace) > 0.1
    assert off[None] > 0.1


def test_more_levels_bring_the_evidence_of_a_mixture_nearer():
    case, errors = plane_modes(), []
    for steps in (6, 48):
        sampler = TransportLangevin(steps=steps, refreshes=2, resampling=Systematic())
        found = Posterior(case.problem, case.prior, dtype=F64).sample(sampler, 1000, chains=4, seed=2)
        errors.append(abs(found.log_evidence - case.exact.log_evidence))
    assert errors[1] < errors[0] / 2.0


def test_levels_by_conditional_ess_keep_the_particles_alive():
    case = FIELDS[2]
    plain = TransportLangevin(steps=10, refreshes=2, resampling=Systematic())
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    assert min(info.ess for info in posterior.sample(plain, 100, seed=1).trace) < 0.1
    sampler, asked = replace(plain, conditional_ess=0.9), []

    def recorded(state: TransportState, info) -> None:
        asked.append((info.sigma, int(state.position[0, 0])))

    found = posterior.sample(sampler, 100, seed=1, callback=recorded)
    # Between resamplings at one half, a level of 0.9 cannot take more than a few tenths.
    assert min(info.ess for info in found.trace) > 0.3
    assert not measure(found.particles[case.problem.event[0].name][0], case.exact, found.log_weights[0]).failures
    ladder = sampler.ladder(posterior)
    assert [sigma for sigma, _ in asked] == [ladder[k] for _, k in asked]
    jumps = [b - a for (_, a), (_, b) in zip([(0.0, 0), *asked], asked, strict=False)]
    assert sum(jumps) == len(ladder) - 1 == 200
    assert 1 <= min(jumps) < max(jumps) == 20  # a level of the coarse ladder where the weights allow it
    assert plain.steps < len(found.trace) < 100
    assert found.about["evaluations_per_draw"] == 3 * len(found.trace) > sampler.cost().forward
    again = Posterior(case.problem, case.prior, dtype=F64, micro_batch=60).sample(sampler, 100, seed=1)
    torch.testing.assert_close(again.draws, found.draws, rtol=0.0, atol=1e-9)


def test_levels_by_conditional_ess_are_the_furthest_that_keep_it():
    case = plane_modes()
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    sampler = TransportLangevin(steps=8, refreshes=1, resampling=Systematic(), threshold=0.0, conditional_ess=0.9)
    before: dict[str, Tensor] = {}
    kept = []

    def look(state: TransportState, info) -> None:
        if before:
            shares = conditional_ess(before["w"], state.log_weights - before["w"])
            if int(state.position[0, 0]) - before["k"] > 1:  # the smallest step is taken whatever it costs
                kept.append(float(shares.min()))
        before.update(w=state.log_weights, k=int(state.position[0, 0]))

    posterior.sample(sampler, 500, chains=3, seed=3, callback=look)
    assert len(kept) >= 4
    assert all(share >= 0.9 for share in kept)


@pytest.mark.parametrize("resampling", [None, Systematic()])
def test_draws_do_not_depend_on_micro_batches_or_company(resampling):
    sampler = TransportLangevin(steps=5, refreshes=2, resampling=resampling, threshold=0.9)
    problems = [mixed(seed=5), mixed(seed=6)]

    def both(**settings) -> list:
        return Posterior(problems, field(), dtype=F64, **settings).sample(sampler, 12, chains=2, seed=4)

    whole, parts = both(), both(micro_batch=5)
    for i, problem in enumerate(problems):
        alone = Posterior(problem, field(), dtype=F64).sample(sampler, 12, chains=2, seed=4)
        for other in (parts[i], alone):
            torch.testing.assert_close(whole[i].draws, other.draws, rtol=0.0, atol=1e-10)
            torch.testing.assert_close(whole[i].chain_log_evidence, other.chain_log_evidence, rtol=0.0, atol=1e-9)
    assert not torch.allclose(whole[0].draws, whole[1].draws, atol=1e-2)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def test_a_problem_that_is_not_linear_by_tempering():
    """Independent values, so that the posterior of each is an integral over a line."""
    shape, y, noise_std = (3,), torch.tensor([[-1.2, 0.4, 2.0]], dtype=F64), 0.4
    prior = GaussianPrior(torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), sigma_max=30.0)
    problem = Problem(likelihoods.Gaussian(Bend(shape, shape), y, noise_std))
    sampler = TransportLangevin(steps=40, path=Tempered(scale=0.3), slope=1.3)
    n = 2000
    draws = Posterior(problem, prior, dtype=F64).sample(sampler, n, seed=1).draws
    t = torch.linspace(-6.0, 6.0, 4001, dtype=F64)[:, None]
    log_density = -0.5 * t**2 - 0.5 * ((y - t - 0.3 * torch.sin(t)) / noise_std) ** 2
    w = torch.softmax(log_density, 0)
    mean = (w * t).sum(0)
    std = (w * (t - mean) ** 2).sum(0).sqrt()
    assert float(((draws.mean(0) - mean) / std).abs().max()) < 4.5 / math.sqrt(n) + 0.02
    assert float((draws.std(0) / std - 1.0).abs().max()) < 4.5 / math.sqrt(2 * n) + 0.02
    with pytest.raises(CapabilityError, match="needs linear"):
        invdiff.solve(problem, prior, TransportLangevin())
    bound = Information.along(Posterior(problem, prior), Tempered(scale=0.3), 0.6, slope=1.3)
    assert bound.largest == pytest.approx((1.3 / 0.4) ** 2 / 5.0)
    torch.testing.assert_close(bound.apply(y), bound.largest * y)
    assert float(bound.diagonal(prior.curvature)) == pytest.approx(bound.largest)


def test_a_prior_without_curvature_takes_the_flat_step():
    class Plain:
        shape, sigma_min, sigma_max = SHAPE, 1e-3, 50.0

        def denoise(self, z, sigma):
            return z / (1.0 + torch.as_tensor(sigma, dtype=z.dtype).reshape(-1, *[1] * (z.ndim - 1)) ** 2)

    posterior = Posterior(blurred(), Plain(), dtype=F64)
    found = posterior.sample(TransportLangevin(steps=30), 300, seed=1).draws
    white = GaussianPrior(torch.zeros(SHAPE, dtype=F64), torch.eye(16, dtype=F64))
    exact = white.posterior(blurred().likelihood.operator, blurred().likelihood.measurement[0], 0.3)
    assert not measure(found, exact).failures
    assert posterior.curvature is None


def test_cost_is_what_is_counted():
    for sampler in (
        TransportLangevin(steps=5, refreshes=3),
        TransportLangevin(steps=5, refreshes=2, momentum=0.5),
        TransportLangevin(steps=5, refreshes=2, integrator=Heun()),
        TransportLangevin(steps=1, refreshes=1, integrator=Euler(), resampling=Systematic()),
    ):
        about = Posterior(mixed(), field(), dtype=F64).sample(sampler, 3).about
        assert about["evaluations_per_draw"] == sampler.cost().forward
        assert about["backward_evaluations_per_draw"] == sampler.cost().backward == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_size": 1.7}, r"larger steps diverge; got 1\.7"),
        ({"step_size": 0.0}, "step_size lies in"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"refreshes": 0}, "at least one refresh a level, got 0"),
        ({"threshold": 1.5}, r"in \[0, 1\]; got 1\.5"),
        ({"floor": -0.1}, r"in \[0, 1\]; got -0\.1"),
        ({"slope": -1.0}, "positive bound"),
        ({"momentum": 1.0}, r"in \[0, 1\); got 1\.0"),
        ({"conditional_ess": 1.0, "resampling": Systematic()}, r"in \(0, 1\); got 1\.0"),
        ({"conditional_ess": 0.9}, "need weights"),
        ({"conditional_ess": 0.9, "resampling": Systematic(), "integrator": Heun()}, "default integrator"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TransportLangevin(**settings)


@pytest.mark.parametrize("resampling", [None, Systematic()])
def test_a_score_that_is_not_a_number_ends_the_run(resampling):
    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-3, 50.0

        def denoise(self, z, sigma):
            return z * (math.nan if float(torch.as_tensor(sigma).max()) < 1.0 else 0.5)

    with pytest.raises(SamplingError, match=r"NaN or infinite at step \d, sigma"):
        Posterior(blurred(), Broken(), dtype=F64).sample(TransportLangevin(steps=9, resampling=resampling), 4)


@pytest.mark.parametrize("resampling", [None, Systematic()])
def test_an_ensemble_without_living_particles_ends_the_run(resampling):
    class Deadly(Posterior):
        def potential(self, sigma: float, path: Path):
            f = super().potential(sigma, path)
            return lambda z: (f(z)[0] - (math.inf if sigma < 1.0 else 0.0), f(z)[1])

    with pytest.raises(SamplingError, match="All 4 particles of ensemble 0 are dead"):
        Deadly(blurred(), field(), dtype=F64).sample(TransportLangevin(steps=9, resampling=resampling), 4)


def test_paths_of_unknown_curvature_are_refused():
    class Own(Path):
        def potential(self, sigma, linear, log_prob_and_grad):
            return log_prob_and_grad

    with pytest.raises(CapabilityError, match="path Own is not known"):
        Posterior(blurred(), field()).sample(TransportLangevin(steps=4, path=Own()), 2)
