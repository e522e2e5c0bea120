"""MCGDiff: its steps and weights against dense algebra, its law and evidence against exact posteriors."""

import itertools
import math

import pytest
import torch
from torch import Tensor

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
from invdiff.samplers.annealing import Levels
from invdiff.samplers.mcgdiff import MCGDiff
from invdiff.samplers.particles import Weighted

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


EYE = torch.eye(4, dtype=F64)
OPERATORS = {
    "inpainting": operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE),  # coefficients of full size
    "circular": operators.Blur(tent(), SHAPE, boundary="circular"),  # complex coefficients, nulls
    "half": operators.Downsampling(SHAPE, 2),  # fewer outputs than inputs
    "faint": Separable(torch.diag(torch.tensor([1.0, 0.5, 1e-5, 0.0], dtype=F64)), EYE, SHAPE),  # never met, never seen
    "tall": Separable(normal(6, 4, seed=5) / 3.0, EYE, SHAPE),  # more outputs than inputs
}


def posterior_of(name: str, decoder: Operator | None = None, dtype: torch.dtype = F64) -> Posterior:
    A = OPERATORS[name]
    problem = Problem(likelihoods.Gaussian(A, normal(1, *A.out_shape, seed=2), STD))
    return Posterior(problem, field(decoder), dtype=dtype)


def dense(A: LinearOperator) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and V of the operator's matrix, with as many singular values as there are inputs."""
    matrix = A(torch.eye(16, dtype=F64).reshape(16, *A.in_shape)).flatten(1).T
    u, s, vt = torch.linalg.svd(matrix)
    s = torch.cat([s, s.new_zeros(16 - len(s))])
    return u, torch.where(s < 1e-12, 0.0, s), vt.T


def log_normal(x: float, mean: float, variance: float) -> float:
    return -0.5 * ((x - mean) ** 2 / variance + math.log(2.0 * math.pi * variance))


def plain_start(s, y, mean, sigma: float, kappa: float, eps) -> tuple[list[float], float]:
    """Draw and mass of N(mean, sigma^2) psi, a value at a time, in the singular basis and its units."""
    z, mass = [], 0.0
    for i, si in enumerate(s):
        if si * sigma < STD:
            z.append(mean[i] + sigma * eps[i])
            continue
        r = sigma**2 - (1.0 - kappa) * (STD / si) ** 2
        gain = sigma**2 / (sigma**2 + r)
        z.append(mean[i] + gain * (y[i] / si - mean[i]) + math.sqrt(sigma**2 * (1.0 - gain)) * eps[i])
        mass += log_normal(y[i] / si, mean[i], sigma**2 + r) - math.log(si)
    return z, mass


def plain_step(s, y, z, d, sigma: float, after: float, kappa: float, eps, bridge: bool) -> tuple[list[float], float]:
    """One step of a particle and its log-weight but for what is added at the end; eps of the fresh draws."""
    new, weight = [], 0.0
    share = (after / sigma) ** 2
    for i, si in enumerate(s):
        mean, v = d[i] + share * (z[i] - d[i]), (sigma**2 - after**2) * share
        tau = STD / si if si > 0.0 else math.inf
        if sigma >= tau:
            weight -= log_normal(y[i] / si, z[i], sigma**2 - (1.0 - kappa) * tau**2) - math.log(si)
        if after >= tau:
            r = after**2 - (1.0 - kappa) * tau**2
            weight += log_normal(y[i] / si, mean, v + r) - math.log(si)
            gain = v / (v + r)
            new.append(mean + gain * (y[i] / si - mean) + math.sqrt(v * (1.0 - gain)) * eps[i])
        elif sigma >= tau and bridge:  # to tau, where the value is met, and on by the prior: one Gaussian from both
            at, v = d[i] + (tau / sigma) ** 2 * (z[i] - d[i]), (sigma**2 - tau**2) * tau**2 / sigma**2
            weight += log_normal(y[i] / si, at, v + kappa * tau**2) - math.log(si)
            gain = v / (v + kappa * tau**2)
            at = at + gain * (y[i] / si - at)
            on = (after / tau) ** 2
            variance = on**2 * v * (1.0 - gain) + (tau**2 - after**2) * on
            new.append(d[i] + on * (at - d[i]) + math.sqrt(variance) * eps[i])
        else:
            new.append(mean + math.sqrt(v) * eps[i])
    return new, weight


@pytest.mark.parametrize("bridge", [True, False])
@pytest.mark.parametrize("name", [*OPERATORS, "affine"])
def test_steps_are_those_of_dense_algebra(name, bridge):
    posterior = posterior_of("half", Affine(SHAPE, 0.5, 0.5)) if name == "affine" else posterior_of(name)
    n, T, kappa = 3, 9, 0.02
    sampler = MCGDiff(steps=T, kappa=kappa, bridge=bridge, threshold=0.0)
    levels = sampler.levels.of(posterior, T)
    u, s, v = dense(posterior.linear.operator)
    y = posterior.linear.measurement[0].flatten()
    c = torch.cat([u.T @ y, torch.zeros(16, dtype=F64)])[:16].tolist()
    values = s.tolist()
    noise = Noise([7], n, dtype=F64)
    state = sampler.init(posterior, 1, n, noise=noise.at(0))
    eps = Noise([7], n, dtype=F64).at(0).like(state.z)[0].flatten(1) @ v
    mean = (posterior.noised_mean().flatten() @ v).tolist()
    total = []
    for i in range(n):
        z, mass = plain_start(values, c, mean, levels[0], kappa, eps[i].tolist())
        torch.testing.assert_close(state.z[0, i].flatten() @ v, torch.tensor(z, dtype=F64), rtol=1e-9, atol=1e-9)
        total.append(mass)
    torch.testing.assert_close(state.log_weights[0], torch.tensor(total, dtype=F64), rtol=1e-9, atol=1e-9)
    crossed = False
    for k in range(T):
        new, info = sampler.step(posterior, state, noise=noise.at(k + 1))
        assert info.sigma == levels[k + 1]
        fresh = Noise([7], n, dtype=F64).at(k + 1)
        if levels[k + 1] > 0.0:
            fresh.shared()  # what the resampling takes, whether or not it is needed
        eps = fresh.like(state.z)[0].flatten(1) @ v
        denoised = posterior.denoise(state.z, levels[k])
        for i in range(n):
            old, d = ((t[0, i].flatten() @ v).tolist() for t in (state.z, denoised))
            z, weight = plain_step(values, c, old, d, levels[k], levels[k + 1], kappa, eps[i].tolist(), bridge)
            torch.testing.assert_close(new.z[0, i].flatten() @ v, torch.tensor(z, dtype=F64), rtol=1e-8, atol=1e-8)
            total[i] += weight
        crossed |= bool(((s * levels[k] >= STD) & (s * levels[k + 1] < STD)).any())
        if k < T - 1:
            torch.testing.assert_close(new.log_weights[0], torch.tensor(total, dtype=F64), rtol=1e-8, atol=1e-8)
        state = new
    # At the end the likelihood of what has had no potential yet, or of all.
    for i in range(n):
        r = y - posterior.linear.operator(state.z[0, i : i + 1])[0].flatten()
        left = u.T @ r
        met = (s * levels[0] >= STD)[: len(left)] if len(left) <= 16 else torch.nn.functional.pad(s, (0, 8)) > 0.0
        if bridge:
            left = left[~met]
        total[i] += sum(log_normal(float(x), 0.0, STD**2) for x in left)
    torch.testing.assert_close(state.log_weights[0], torch.tensor(total, dtype=F64), rtol=1e-8, atol=1e-8)
    assert crossed, "no level lies below a tau: the bridge is not seen"
    assert sampler.done(state)


# The law.


def walked(sampler: MCGDiff, posterior: Posterior, n: int) -> Weighted:
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
    n, chains = 1024, 3
    sampler, (distance, rms) = MCGDiff(steps=120), TABLE[d]
    solution = posterior.sample(sampler, n, chains=chains, seed=3)
    others = exact.sample(chains * n, seed=9)
    # 3 chains of 1024 are more draws than 512: they keep the bound with the margin of what their modes' shares vary.
    assert sliced_wasserstein(solution.draws.double(), others) < 1.2 * distance
    # The error of an evidence falls with the square root of the particles: 4096 in the table.
    assert abs(solution.log_evidence - exact.log_evidence) < 4.0 * rms * math.sqrt(4096 / (n * chains))
    # Without weights and resampling the same proposals miss the same bound.
    bare = walked(MCGDiff(steps=120, threshold=0.0), posterior, n)
    assert sliced_wasserstein(bare.z[0], others[:n]) > 2.0 * 1.2 * distance


def plane():
    """Two correlated values, their sum measured weakly, as a picture of two lines."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=F64)
    prior = GaussianPrior(torch.tensor([0.3, -0.2], dtype=F64).reshape(1, 2, 1), covariance)
    return exact_problem("plane", prior, Separable(torch.ones(1, 2, dtype=F64), EYE[:1, :1], (1, 2, 1)), 0.7)


def test_the_error_of_the_chain_is_what_the_file_states():
    problem = plane()
    posterior = Posterior(problem.problem, problem.prior, dtype=F64)
    errors = []
    for steps, share in ((30, 0.61), (150, 0.90), (400, 0.96)):
        target = chain_target(problem, MCGDiff().levels.of(posterior, steps), 1e-4)[2]
        ratio = (target.diagonal() / problem.exact.std.flatten() ** 2).mean()
        assert float(ratio) == pytest.approx(share, abs=5.1e-3)
        errors.append(1.0 - float(ratio))
    # First order: steps times 2.7 divide the error by nearly as much.
    assert errors[1] / errors[2] > 2.4


def test_it_keeps_the_bounds_of_exact_draws():
    report = check_sampler(MCGDiff(), problems=[plane()], steps=(30, 150), draws=150, chains=8)
    assert report.exact
    assert not report.failures


def test_the_published_weights_do_not_converge_with_steps():
    sampler = MCGDiff(bridge=False)
    with pytest.raises(AssertionError, match="variance_ratio") as caught:
        check_sampler(sampler, problems=[plane()], steps=(30, 150), draws=400, chains=8)
    assert "variance 0.764" in str(caught.value)
    assert "variance 0.780" in str(caught.value)


def chain_target(problem, levels, kappa: float) -> tuple[float, Tensor, Tensor]:
    """Log evidence, mean and covariance of what the bridged chain of a Gaussian prior targets, in closed form.

    The joint Gaussian of z and of the measured value at its tau is walked down the levels in the singular basis.
    """
    prior, exact = problem.prior, problem.problem.likelihood
    _, s, vt = torch.linalg.svd(torch.ones(1, 2, dtype=F64))
    y, tau = float(exact.measurement.flatten()[0]) * float(vt[0].sum()) / float(s[0]) ** 2, 0.7 / float(s[0])
    centre, cov = vt @ prior.mean.flatten(), vt @ prior.covariance @ vt.mT
    mean, C = torch.cat([centre, centre.new_zeros(1)]), torch.zeros(3, 3, dtype=F64)
    C[:2, :2] = levels[0] ** 2 * torch.eye(2, dtype=F64)
    for sigma, after in itertools.pairwise(levels):
        B = torch.linalg.solve(cov + sigma**2 * torch.eye(2, dtype=F64), cov).mT  # D = centre + B (z - centre)
        F, Q = torch.eye(3, dtype=F64), torch.zeros(3, 3, dtype=F64)
        share = (after / sigma) ** 2
        F[:2, :2] = B + share * (torch.eye(2, dtype=F64) - B)
        Q[0, 0] = Q[1, 1] = (sigma**2 - after**2) * share
        if sigma >= tau > after:
            at, on, v = (tau / sigma) ** 2, (after / tau) ** 2, (sigma**2 - tau**2) * tau**2 / sigma**2
            F[2, :2], F[2, 2] = B[0] + at * (torch.eye(2, dtype=F64)[0] - B[0]), 0.0
            Q[2, 2], Q[0, 2], Q[2, 0] = v, on * v, on * v
            mean = torch.cat([mean[:2], centre[:1]])
        shift = torch.cat([centre, centre[:1]])
        mean, C = shift + F @ (mean - shift) if sigma >= tau > after else _walk(F, mean, centre), F @ C @ F.mT + Q
    width = C[2, 2] + kappa * tau**2
    gain = C[:2, 2] / width
    evidence = log_normal(y, float(mean[2]), float(width)) - math.log(float(s[0]))
    return evidence, vt.mT @ (mean[:2] + gain * (y - mean[2])), vt.mT @ (C[:2, :2] - gain[:, None] * C[2, :2]) @ vt


def _walk(F: Tensor, mean: Tensor, centre: Tensor) -> Tensor:
    """Mean after a step that leaves the measured value at tau as it was."""
    return torch.cat([centre + F[:2, :2] @ (mean[:2] - centre), mean[2:]])


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 8), (0.5, 8), (1.0, 20)])
def test_the_target_is_that_of_the_chain_with_and_without_resampling(threshold, steps):
    problem, n, chains = plane(), 3000, 4
    sampler = MCGDiff(steps=steps, threshold=threshold, kappa=0.1)
    posterior = Posterior(problem.problem, problem.prior, dtype=F64)
    evidence, mean, covariance = chain_target(problem, sampler.levels.of(posterior, steps), 0.1)
    solution = posterior.sample(sampler, n, chains=chains, seed=1)
    assert solution.log_evidence_se < 0.03
    # The weights' tails are longer than four chains show. The posterior's own evidence lies further off.
    assert abs(solution.log_evidence - evidence) < 0.1 < abs(problem.exact.log_evidence - evidence)
    size = n * chains * min(info.ess for info in solution.trace)
    x = solution.draws.flatten(1).double()
    assert float(((x.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max()) < 4.5 / math.sqrt(size)
    assert float((x.var(0) / covariance.diagonal() - 1.0).abs().max()) < 4.5 * math.sqrt(2.0 / size)


# The contract.


@pytest.mark.parametrize("name", list(OPERATORS))
def test_single_precision_gives_the_same_draws(name):
    sampler = MCGDiff(steps=8, threshold=0.0)
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
        with pytest.raises(CapabilityError, match=r"MCGDiff needs .*svd"):
            invdiff.solve(Problem(likelihood), field(), MCGDiff())
    with pytest.raises(CapabilityError, match="Blur has no SVD"):
        MCGDiff().init(Posterior(Problem(likelihoods.Gaussian(slanted, y, STD)), field()), 1, 1, noise=Noise([0], 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"threshold": 1.5}, r"in \[0, 1\]; got 1\.5"),
        ({"kappa": 0.0}, r"in \(0, 1\]; got 0\.0"),
        ({"kappa": 1.1}, r"in \(0, 1\]; got 1\.1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        MCGDiff(**settings)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_cost_is_what_is_counted(steps):
    about = posterior_of("half").sample(MCGDiff(steps=steps), 3).about
    assert about["evaluations_per_draw"] == MCGDiff(steps=steps).cost().forward == steps
    assert about["backward_evaluations_per_draw"] == MCGDiff(steps=steps).cost().backward == 0


def test_it_starts_at_its_own_first_level_and_in_the_measurements_width_there():
    posterior, n, top = posterior_of("inpainting"), 2000, 20.0
    state = MCGDiff(levels=Levels(sigma_max=top)).init(posterior, 1, n, noise=Noise([1], n, dtype=F64))
    stds = state.z[0].flatten(1).std(0)
    # Where the value is measured: two Gaussians of the same width but for the noise in their product.
    seen = OPERATORS["inpainting"].mask.flatten()
    bound = 4.5 / math.sqrt(2 * n)
    assert float((stds[~seen] / top - 1.0).abs().max()) < bound
    assert float((stds[seen] * math.sqrt(2.0) / top - 1.0).abs().max()) < bound


def test_a_network_that_is_not_a_number_ends_the_run():
    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-2, 50.0

        def denoise(self, z, sigma):
            return z * (math.nan if float(torch.as_tensor(sigma).max()) < 1.0 else 0.5)

    problem = Problem(likelihoods.Gaussian(OPERATORS["half"], normal(1, 1, 2, 2), STD))
    with pytest.raises(SamplingError, match=r"NaN or infinite at step \d, sigma"):
        Posterior(problem, Broken(), dtype=F64).sample(MCGDiff(steps=9), 4)
