"""FPS: its steps and weights against dense algebra, its law and evidence against exact posteriors, and its bias."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import check_sampler, exact_problem
from invdiff.diagnostics.mixtures import random_mixture
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.metrics import sliced_wasserstein
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.operators.composition import Affine
from invdiff.operators.separable import Separable
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, GaussianPrior
from invdiff.problem import Problem
from invdiff.samplers.fps import FPS, FilteredState

F64 = torch.float64
SHAPE = (1, 4, 4)
STD = 0.3
EYE = torch.eye(4, dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def field(decoder: Operator | None = None) -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0, decoder=decoder)


def tent() -> Tensor:
    """A kernel whose circular transform is 0 at the highest frequency, 1/2 at the middle one and 1 at zero."""
    k = torch.tensor([0.25, 0.5, 0.25], dtype=F64)
    return k[:, None] * k


OPERATORS = {
    "inpainting": operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE),  # coefficients of full size
    "circular": operators.Blur(tent(), SHAPE, boundary="circular"),  # complex coefficients, nulls
    "half": operators.Downsampling(SHAPE, 2),  # fewer outputs than inputs
    "tall": Separable(normal(6, 4, seed=5) / 3.0, EYE, SHAPE),  # more outputs than inputs
}


def posterior_of(name: str, decoder: Operator | None = None, dtype: torch.dtype = F64) -> Posterior:
    A = OPERATORS[name]
    problem = Problem(likelihoods.Gaussian(A, normal(1, *A.out_shape, seed=2), STD))
    return Posterior(problem, field(decoder), dtype=dtype)


def matrix(A: LinearOperator) -> Tensor:
    return A(torch.eye(16, dtype=F64).reshape(16, *A.in_shape)).flatten(1).T


def adapted(A: Tensor, y: Tensor, m: Tensor, v: float, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and symmetric root of the covariance of N(m, v) N(y; A ., R), and log N(y; A m, R + v A A^T)."""
    S = R + v * A @ A.T
    gain = torch.linalg.solve(S, v * A).T
    values, vectors = torch.linalg.eigh(v * (torch.eye(16, dtype=F64) - gain @ A))
    root = vectors @ (values.clamp_min(0.0).sqrt()[:, None] * vectors.T)
    return m + (y - m @ A.T) @ gain.T, root, MultivariateNormal(y, S).log_prob(m @ A.T)


@pytest.mark.parametrize("trajectory", ["averaged", "drawn"])
@pytest.mark.parametrize("name", [*OPERATORS, "affine"])
def test_steps_are_those_of_dense_algebra(name, trajectory):
    posterior = posterior_of("half", Affine(SHAPE, 0.5, 0.5)) if name == "affine" else posterior_of(name)
    n, T, drawn = 3, 9, trajectory == "drawn"
    sampler = FPS(steps=T, trajectory=trajectory, threshold=0.0)
    levels = sampler.levels.of(posterior, T)
    A, y0 = matrix(posterior.linear.operator), posterior.linear.measurement[0].flatten()
    R = STD**2 * torch.eye(len(A), dtype=F64)
    slots = torch.zeros(1, dtype=torch.int64)

    def potential(sigma: float) -> Tensor:
        return R if drawn else R + sigma**2 * A @ A.T

    noise = Noise([7], n, dtype=F64)
    state = sampler.init(posterior, 1, n, noise=noise.at(0))
    fresh = Noise([7], n, dtype=F64).at(0)
    top = levels[0]
    xi = top * fresh.normal(slots, SHAPE).flatten() if drawn else torch.zeros(16, dtype=F64)
    eps = fresh.like(state.z)[0].flatten(1)
    centre, root, total = adapted(A, y0 + A @ xi, posterior.noised_mean().flatten()[None], top**2, potential(top))
    torch.testing.assert_close(state.z[0].flatten(1), centre + eps @ root, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.log_weights[0], total.expand(n), rtol=1e-9, atol=1e-9)
    for k, (sigma, after) in enumerate(itertools.pairwise(levels)):
        new, info = sampler.step(posterior, state, noise=noise.at(k + 1))
        assert info.sigma == after
        fresh = Noise([7], n, dtype=F64).at(k + 1)
        z, D = (t[0].flatten(1) for t in (state.z, posterior.denoise(state.z, sigma)))
        share, v = (after / sigma) ** 2, (sigma**2 - after**2) * (after / sigma) ** 2
        if drawn:
            xi = share * xi + math.sqrt(v) * fresh.normal(slots, SHAPE).flatten()
        if after > 0.0:
            fresh.shared()  # what the resampling takes, whether or not it is needed
        eps = fresh.like(state.z)[0].flatten(1)
        centre, root, weight = adapted(A, y0 + A @ xi, D + share * (z - D), v, potential(after))
        total = total + weight
        if not drawn:
            total = total - MultivariateNormal(y0, potential(sigma)).log_prob(z @ A.T)
        end = centre + eps @ root if after > 0.0 else D
        torch.testing.assert_close(new.z[0].flatten(1), end, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(new.log_weights[0], total, rtol=1e-8, atol=1e-8)
        state = new
    assert sampler.done(state)
    assert (sampler.finish(posterior, state, noise=noise).log_evidence is None) == drawn


def test_a_drawn_trajectory_is_one_an_ensemble_and_has_the_levels_width():
    n, chains = 3, 300
    posterior, sampler = posterior_of("half"), FPS(steps=6, trajectory="drawn")
    noise = Noise(list(range(chains)), n, dtype=F64)
    levels = sampler.levels.of(posterior, 6)
    state = sampler.init(posterior, chains, n, noise=noise.at(0))
    for k in range(5):
        assert isinstance(state, FilteredState)
        assert torch.equal(state.shift, state.shift[:, :1].expand_as(state.shift))
        spread = float(state.shift[:, 0].square().mean().sqrt()) / levels[k]
        assert abs(spread - 1.0) < 4.5 / math.sqrt(2 * chains * 16)
        state, _ = sampler.step(posterior, state, noise=noise.at(k + 1))


# The law.


def walked(sampler: FPS, posterior: Posterior, n: int) -> FilteredState:
    """Last state of a run of one ensemble."""
    noise = Noise([2], n, dtype=posterior.dtype)
    with torch.no_grad():
        state = sampler.init(posterior, 1, n, noise=noise.at(0))
        while not sampler.done(state):
            state, _ = sampler.step(posterior, state, noise=noise.at(state.step + 1))
    return state


# Means over seeds of the sliced distance at 512 particles, and of the rms error of the evidence at 4096, of a fully
# adapted sampler in plain code.
TABLE = {2: (0.058, 0.05), 4: (0.063, 0.15)}


@pytest.mark.parametrize("d", [2, 4])
def test_modes_and_evidence_are_those_of_the_posterior(d):
    case = random_mixture(d)
    exact, posterior = case.exact, Posterior(case.problem, case.prior, dtype=F64)
    n, chains, (distance, rms) = 1024, 3, TABLE[d]
    solution = posterior.sample(FPS(steps=120), n, chains=chains, seed=3)
    others = exact.sample(chains * n, seed=9)
    # 3 chains of 1024 are more draws than 512: they keep the bound with the margin of what their modes' shares vary.
    assert sliced_wasserstein(solution.draws.double(), others) < 1.2 * distance
    # The error of an evidence falls with the square root of the particles: 4096 in the table.
    assert abs(solution.log_evidence - exact.log_evidence) < 4.0 * rms * math.sqrt(4096 / (n * chains))
    # Without weights and resampling the same proposals miss the same bound.
    bare = walked(FPS(steps=120, threshold=0.0), posterior, n)
    assert sliced_wasserstein(bare.z[0], others[:n]) > 2.0 * 1.2 * distance


@pytest.mark.parametrize(("steps", "share"), [(30, 0.39), (120, 0.26)])
def test_a_drawn_trajectory_leaves_too_little_of_what_is_measured(steps, share):
    case = random_mixture(2)
    A, exact = case.problem.likelihood.operator, case.exact
    posterior = Posterior(case.problem, case.prior, dtype=F64)
    solution = posterior.sample(FPS(steps=steps, trajectory="drawn"), 500, chains=6, seed=1)
    assert solution.log_evidence is None
    # Within a chain: the mean follows the trajectory, and other chains have others.
    seen = A(solution.draws.double()).reshape(6, 500)
    ratio = float(seen.std(1).mean() / A(exact.sample(20_000, seed=1)).std())
    assert ratio == pytest.approx(share, abs=0.03)


def plane():
    """Two correlated values, their sum measured weakly, as a picture of two lines."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64)
    prior = GaussianPrior(torch.tensor([0.3, -0.2], dtype=F64).reshape(1, 2, 1), covariance)
    return exact_problem("plane", prior, Separable(torch.ones(1, 2, dtype=F64), EYE[:1, :1], (1, 2, 1)), 0.7)


def chain_target(problem, levels) -> tuple[float, Tensor, Tensor]:
    """Log evidence, mean and covariance of the posterior of the chain's own Gaussian z_0, in closed form."""
    prior, one = problem.prior, torch.eye(2, dtype=F64)
    centre, C = prior.mean.flatten(), levels[0] ** 2 * one  # every D is centre + B (z - centre), and so is the mean
    for sigma, after in itertools.pairwise(levels):
        B = torch.linalg.solve(prior.covariance + sigma**2 * one, prior.covariance).mT
        share = (after / sigma) ** 2
        F = B + share * (one - B)
        C = F @ C @ F.mT + (sigma**2 - after**2) * share * one
    h, r = torch.ones(2, dtype=F64), problem.problem.likelihood.measurement.flatten() - centre.sum()
    S = h @ C @ h + 0.7**2
    evidence = float(MultivariateNormal(torch.zeros(1, dtype=F64), S.reshape(1, 1)).log_prob(r))
    return evidence, centre + C @ h / S * r, C - torch.outer(C @ h, C @ h) / S


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 8), (0.5, 8), (1.0, 20)])
def test_the_target_is_that_of_the_chain_with_and_without_resampling(threshold, steps):
    problem, n, chains = plane(), 3000, 4
    sampler = FPS(steps=steps, threshold=threshold)
    posterior = Posterior(problem.problem, problem.prior, dtype=F64)
    evidence, mean, covariance = chain_target(problem, sampler.levels.of(posterior, steps))
    solution = posterior.sample(sampler, n, chains=chains, seed=1)
    # The weights' tails are longer than four chains show. The posterior's own evidence lies further off.
    assert solution.log_evidence_se < 0.03
    assert abs(solution.log_evidence - evidence) < 0.1 < abs(problem.exact.log_evidence - evidence)
    size = n * chains * min(info.ess for info in solution.trace)
    x = solution.draws.flatten(1).double()
    assert float(((x.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 4.5 / math.sqrt(size)
    assert float((x.var(0) / covariance.diagonal() - 1.0).abs().max()) < 4.5 * math.sqrt(2.0 / size)


def test_the_error_of_the_chain_is_what_the_file_states():
    problem = plane()
    posterior = Posterior(problem.problem, problem.prior, dtype=F64)
    errors = []
    for steps, share in ((30, 0.79), (150, 0.95), (400, 0.98)):
        target = chain_target(problem, FPS().levels.of(posterior, steps))[2]
        ratio = (target.diagonal() / problem.exact.std.flatten() ** 2).mean()
        assert float(ratio) == pytest.approx(share, abs=5.1e-3)
        errors.append(1.0 - float(ratio))
    # First order: steps times 2.7 divide the error by nearly as much.
    assert errors[1] / errors[2] > 2.4


def test_it_keeps_the_bounds_of_exact_draws():
    report = check_sampler(FPS(), problems=[plane()], steps=(30, 150), draws=150, chains=8)
    assert report.exact
    assert not report.failures
    drawn = check_sampler(FPS(trajectory="drawn"), problems=[plane()], steps=(30, 150), draws=150, chains=8)
    assert not drawn.exact
    assert any("variance_ratio" in failure for failure in drawn.failures)


# The contract.


@pytest.mark.parametrize("name", list(OPERATORS))
def test_single_precision_gives_the_same_draws(name):
    sampler = FPS(steps=8, threshold=0.0)
    single, double = (walked(sampler, posterior_of(name, dtype=t), 3) for t in (torch.float32, F64))
    assert single.z.dtype == torch.float32
    torch.testing.assert_close(single.z.double(), double.z, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(single.log_weights, double.log_weights, rtol=1e-2, atol=1e-2)


class Bend(Operator):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.sin(x)


def test_problems_without_an_svd_are_refused():
    y = normal(1, *SHAPE)
    slanted = operators.Blur(EYE[:3, :3] / 3.0, SHAPE, boundary="reflect")
    uneven = torch.linspace(0.1, 0.4, 16, dtype=F64).reshape(SHAPE)
    for likelihood in (
        likelihoods.Gaussian(Bend(SHAPE, SHAPE), y, STD),
        likelihoods.Gaussian(slanted, y, STD),
        likelihoods.Gaussian(OPERATORS["circular"], y, uneven),
    ):
        with pytest.raises(CapabilityError, match=r"FPS needs .*svd"):
            invdiff.solve(Problem(likelihood), field(), FPS())
    with pytest.raises(CapabilityError, match="Blur has no SVD"):
        FPS().init(Posterior(Problem(likelihoods.Gaussian(slanted, y, STD)), field()), 1, 1, noise=Noise([0], 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"threshold": 1.5}, r"in \[0, 1\]; got 1\.5"),
        ({"trajectory": "mean"}, "averaged, drawn; got 'mean'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        FPS(**settings)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cost_is_what_is_counted(steps):
    about = posterior_of("half").sample(FPS(steps=steps), 3).about
    assert about["evaluations_per_draw"] == FPS(steps=steps).cost().forward == steps
    assert about["backward_evaluations_per_draw"] == FPS(steps=steps).cost().backward == 0


def test_a_network_that_is_not_a_number_ends_the_run():
    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-2, 50.0

        def denoise(self, z, sigma):
            return z * (math.nan if float(torch.as_tensor(sigma).max()) < 1.0 else 0.5)

    problem = Problem(likelihoods.Gaussian(OPERATORS["half"], normal(1, 1, 2, 2), STD))
    with pytest.raises(SamplingError, match=r"NaN or infinite at step \d, sigma"):
        Posterior(problem, Broken(), dtype=F64).sample(FPS(steps=9), 4)
