"""DMCMC: its sweep against dense algebra, its rungs against quadrature, and its draws against exact posteriors."""

import dataclasses
import math
import warnings

import pytest
import torch
from torch import Tensor

import invdiff
from invdiff import likelihoods, operators
from invdiff.diagnostics.exactness import plane_problem
from invdiff.diagnostics.mixture_measures import mode_shares, split_r_hat, total_variation
from invdiff.diagnostics.mixtures import parted_modes
from invdiff.driver import Budget, Cost
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator, Operator
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.priors import FieldPrior, GaussianPrior, MixturePrior
from invdiff.problem import Problem
from invdiff.samplers.annealing import Levels
from invdiff.samplers.dmcmc import DMCMC
from invdiff.samplers.sigma_ladder import LadderState, flow, levelled, tilt

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


def field() -> FieldPrior:
    return FieldPrior.power_law(SHAPE, 2.0, 1.0, 0.2, sigma_min=1e-3, sigma_max=100.0)


def masked(seed: int = 1) -> Problem:
    mask = operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 0, SHAPE)
    return Problem.simulate(mask, field().sample(1, seed=3)[0], noise_std=1.0, seed=seed)


def blurred() -> Problem:
    A = operators.Blur(operators.gaussian_kernel(3, 0.8), SHAPE, boundary="circular")
    return Problem(likelihoods.Gaussian(A, normal(1, *SHAPE, seed=2), 0.3))


def mixed(noise_std: float | Tensor = 0.3) -> Problem:
    A = Matrix(normal(6, 16, seed=4) / 4.0, SHAPE)
    return Problem(likelihoods.Gaussian(A, normal(1, 6, seed=5), noise_std))


def weak(seed: int = 1) -> Problem:
    """Four measured values, so that a short run makes its round trips."""
    mask = operators.Inpainting(torch.arange(16).reshape(4, 4) % 4 > 2, SHAPE)
    return Problem.simulate(mask, field().sample(1, seed=3)[0], noise_std=1.0, seed=seed)


def line() -> tuple[MixturePrior, Problem]:
    """Two modes on the line, and a measurement far from both."""
    prior = MixturePrior(
        torch.tensor([0.7, 0.3], dtype=F64),
        torch.tensor([[-1.5], [1.5]], dtype=F64),
        torch.tensor([[[0.3]], [[0.2]]], dtype=F64),
        sigma_max=80.0,
    )
    A = Matrix(torch.ones(1, 1, dtype=F64), (1,))
    return prior, Problem(likelihoods.Gaussian(A, torch.tensor([[3.2]], dtype=F64), 0.4))


def ladder_state(posterior: Posterior, sampler: DMCMC, n: int) -> LadderState:
    """A state in the middle of a run, with walkers at all rungs and in both directions."""
    state = sampler.init(posterior, 1, n, noise=Noise([7], n, dtype=F64).at(0))
    w = state.level.shape[1]
    level = torch.arange(w)[None] % sampler.rungs
    walker = state.sigma[0, level[0]].reshape(1, w, 1, 1, 1) * normal(1, w, *SHAPE, seed=9) + 0.2
    direction = 1 - 2 * (torch.arange(w)[None] // sampler.rungs % 2)
    log_h = normal(1, sampler.rungs, seed=8)
    return dataclasses.replace(
        state, walker=walker, level=level, direction=direction, log_h=log_h, step=sampler.burn_in
    )


# The sweep.


def test_one_sweep_is_that_of_dense_algebra():
    n, K = 16, 4
    sampler = DMCMC(rungs=K, keep=1, step_size=0.8)
    posterior, prior = Posterior(masked(), field(), dtype=F64), field()
    state = ladder_state(posterior, sampler, n)
    found, info = sampler.step(posterior, state, noise=Noise([7], n, dtype=F64).at(5))

    noise, eye = Noise([7], n, dtype=F64).at(5), torch.eye(16, dtype=F64)
    xi, (u, lots) = noise.like(state.walker)[0].flatten(1), noise.uniform(noise.slots, (2,)).T
    m, S = prior.mean.flatten(), prior.covariance
    A, y = posterior.linear.operator(eye.reshape(16, *SHAPE)).flatten(1).T, posterior.linear.measurement.flatten()
    sigmas = sampler.ladder(posterior)
    assert sigmas == pytest.approx(sorted(sigmas))
    assert len(sigmas) == K

    def denoised(z: Tensor, s: float) -> Tensor:
        return m + S @ torch.linalg.solve(S + s**2 * eye, z - m)

    def law(z: Tensor, s: float) -> tuple[float, Tensor]:
        V = torch.eye(len(A), dtype=F64) + (s**2 - sigmas[0] ** 2) * A @ A.T  # noise 1
        f = torch.distributions.MultivariateNormal(A @ z, V).log_prob(y)
        return float(f), A.T @ torch.linalg.solve(V, y - A @ z)

    kept, accepted = {}, 0
    for i in range(n):
        k, v, z = int(state.level[0, i]), int(state.direction[0, i]), state.walker[0, i].flatten()
        s = sigmas[k]
        e = 0.8 / (1 / s**2 + 1 / (1 + s**2 - sigmas[0] ** 2))  # ||A|| = 1
        step = math.sqrt(2 * e) * xi[i]
        q = z + (1 - math.sqrt(1 - 0.4)) / 0.8 * step
        z = z + step + e * ((denoised(q, s) - q) / s**2 + law(q, s)[1])
        if k == 0:
            kept[float(lots[i])] = 0.5 * (z + denoised(z, s))
        if 0 <= k + v < K:
            t = sigmas[k + v]
            middle = (s + t) / 2
            half = z + (middle - s) * (z - denoised(z, s)) / s
            there = z + (t - s) * (half - denoised(half, middle)) / middle
            log_h = state.log_h[0]
            ratio = law(there, t)[0] - law(z, s)[0] + float(log_h[k + v] - log_h[k])
            if float(u[i]) < math.exp(min(0.0, ratio)):
                z, k, accepted = there, k + v, accepted + 1
            else:
                v = -v
        else:
            v = -v
        torch.testing.assert_close(found.walker[0, i].flatten(), z, rtol=1e-10, atol=1e-10)
        assert (int(found.level[0, i]), int(found.direction[0, i])) == (k, v)
    assert 0 < accepted < n - 4  # both outcomes, besides walkers that turn round at the ends
    assert torch.equal(found.log_h, state.log_h)
    lowest = [kept[lot] for lot in sorted(kept)]
    order = found.lot[0].argsort()[: len(lowest)]
    torch.testing.assert_close(found.z[0, order].flatten(1), torch.stack(lowest), rtol=1e-10, atol=1e-10)
    assert len(lowest) == 4
    assert found.when[0, found.when[0].isfinite()].sort().values.tolist() == [
        (sampler.burn_in + 1) * n + i for i in (0, 4, 8, 12)
    ]
    assert (found.step, info.sigma) == (sampler.burn_in + 1, sigmas[0])


@pytest.mark.parametrize(
    ("problem", "path"),
    [
        (blurred(), Noised()),
        (mixed(), Noised(kappa=0.5)),
        (mixed(torch.linspace(0.2, 0.6, 6, dtype=F64)), Noised()),
        (mixed(), Tempered(scale=0.4)),
    ],
    ids=["svd", "no-svd", "diagonal", "tempered"],
)
def test_each_walker_has_the_path_at_its_own_level(problem, path):
    posterior, z = Posterior(problem, field(), dtype=F64), normal(1, 4, *SHAPE, seed=6)
    tau = torch.tensor([[0.0, 0.1, 0.7, 5.0]], dtype=F64)
    value, grad = tilt(posterior, path, z, tau)
    for i, t in enumerate(tau[0].tolist()):
        f, g = posterior.potential(t, path)(z)
        torch.testing.assert_close(value[0, i], f[0, i], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad[0, i], g[0, i], rtol=1e-12, atol=1e-12)


# The rungs, against quadrature.


def test_moves_between_rungs_have_the_ratio_of_the_joint_law():
    """On a line the flow is the map between equal quantiles, and the ratio follows from densities alone."""
    prior, problem = line()
    posterior = Posterior(problem, prior, dtype=F64)
    grid = torch.linspace(-12.0, 12.0, 240_001, dtype=F64)
    h = float(grid[1] - grid[0])

    def density(s: float) -> tuple[Tensor, Tensor]:
        p = prior.log_prob(grid[:, None], s).exp()
        return p, (p * h).cumsum(0) - 0.5 * p * h

    def at(values: Tensor, x: Tensor) -> Tensor:
        j = ((x + 12.0) / h).floor().long().clamp(0, len(grid) - 2)
        part = (x - grid[j]) / h
        return (1 - part) * values[j] + part * values[j + 1]

    errors = []
    for s, t in ((0.5, 1.0), (1.0, 0.5), (0.5, 0.7), (0.7, 0.5), (1.0, 0.0)):
        (p, P), (q, Q) = density(s), density(max(t, 1e-9))
        z = torch.linspace(-2.5, 2.5, 11, dtype=F64)
        j = torch.searchsorted(Q, at(P, z))
        low, high = Q[j - 1], Q[j]
        image = grid[j - 1] + h * (at(P, z) - low) / (high - low)
        # p' |dz' / dz| = p: what the move relies on, here from the map's own slope.
        slope = at(p, z) / at(q, image)
        nearby = torch.searchsorted(Q, at(P, z + 0.01))
        difference = (grid[nearby] - grid[j]) / 0.01
        assert float((difference / slope - 1).abs().max()) < 0.06
        if t:
            x = z.reshape(1, -1, 1)
            levels = torch.full((2, 1, 11), 1.0, dtype=F64) * torch.tensor([s, t], dtype=F64).reshape(2, 1, 1)
            moved = flow(posterior, x, posterior.denoise(x, s), *levels).flatten()
            errors.append(float((moved - image).abs().max()))
    # Third order a step: 0.2 in place of 0.5 errs less, by a factor of 15.6 in the limit.
    assert max(errors[:2]) < 0.12, errors
    assert max(errors[2:]) < max(errors[:2]) / 8, errors


def test_adapted_weights_and_visits_are_those_of_the_rungs_masses():
    prior, problem = line()
    posterior, n = Posterior(problem, prior, dtype=F64), 200
    levels, states = [], []
    sampler = DMCMC(keep=1, burn_in=150, steps=250, share=0.3)

    def watch(state: LadderState, info: object) -> None:
        states.append(state)
        if state.step > sampler.burn_in:
            levels.append(state.level)

    posterior.sample(sampler, n, callback=watch, seed=3)
    sigmas, grid = sampler.ladder(posterior), torch.linspace(-60.0, 60.0, 120_001, dtype=F64)
    masses = []
    for s in sigmas:
        tau = math.sqrt(s**2 - sigmas[0] ** 2)
        f = posterior.potential(tau, Noised())(grid[:, None])[0]
        masses.append(float(torch.logsumexp(prior.log_prob(grid[:, None], s) + f, 0)))
    target = torch.tensor([0.3] + [0.7 / (sampler.rungs - 1)] * (sampler.rungs - 1), dtype=F64).log()
    expected = target - torch.tensor(masses, dtype=F64)
    log_h = states[-1].log_h[0]
    assert torch.equal(log_h, states[sampler.burn_in].log_h[0])  # frozen since
    # 140 sweeps of 200 walkers adapted them, of which one in some 50 is new; and the flow errs by some per cent.
    spread = 4.5 * math.sqrt(50 / (140 * 200 * 0.175)) + 0.04
    assert float((expected - expected.mean() - log_h).abs().max()) < spread
    assert float(torch.tensor(masses).max() - torch.tensor(masses).min()) > 4 * spread
    # The visits have the shares that these weights give them.
    shares = torch.bincount(torch.cat(levels).flatten(), minlength=sampler.rungs) / (len(levels) * n)
    law = torch.softmax(log_h + torch.tensor(masses, dtype=F64), 0)
    assert float((shares / law - 1).abs().max()) < 4.5 * math.sqrt(50 / (250 * 200 * 0.175)) + 0.04


def test_the_weights_rest_where_the_shares_are_those_wanted():
    target = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    level, proposed = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[1, 0, 2, 1]])
    log_h = torch.tensor([[0.2, -0.3, 0.1]], dtype=F64)
    # Shares 1/2, 1/4 and 1/4 after the moves: walkers 3 and 4 change places on the average.
    rest, share = levelled(log_h, target, level, proposed, torch.tensor([[0.0, 1.0, 0.6, 0.6]], dtype=F64), 0.3)
    torch.testing.assert_close(share, target[None])
    torch.testing.assert_close(rest, log_h)
    moved, share = levelled(log_h, target, level, proposed, torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64), 0.1)
    torch.testing.assert_close(share, torch.tensor([[0.25, 0.5, 0.25]], dtype=F64))
    change = -0.1 * torch.tensor([[0.5, 2.0, 1.0]], dtype=F64)
    torch.testing.assert_close(moved, log_h + change - change.mean())


def test_draws_are_the_visits_in_the_order_of_time():
    posterior, sampler = Posterior(masked(), field(), dtype=F64), DMCMC(rungs=4, keep=1)
    state = ladder_state(posterior, sampler, 4)
    z = torch.arange(4.0, dtype=F64).reshape(1, 4, 1, 1, 1).expand(1, 4, *SHAPE)
    when = torch.tensor([[30.0, math.inf, 10.0, 20.0]], dtype=F64)
    state = dataclasses.replace(state, z=z, when=when, trips=torch.full_like(state.trips, 3))
    draws = sampler.finish(posterior, state, noise=Noise([7], 4, dtype=F64)).z
    assert draws[0, :, 0, 0, 0].tolist() == [2.0, 3.0, 0.0, 2.0]  # the first again, for want of a fourth
    few = dataclasses.replace(state, when=torch.tensor([[30.0, math.inf, math.inf, 20.0]], dtype=F64))
    with pytest.warns(RuntimeWarning, match=r"and 2 visits to the lowest rung for 4 draws"):
        sampler.finish(posterior, few, noise=Noise([7], 4, dtype=F64))


# The law.


def test_draws_of_a_gaussian_posterior():
    p, n = plane_problem(), 6000
    draws = Posterior(p.problem, p.prior, dtype=F64).sample(DMCMC(rungs=8, steps=12, keep=15), n, seed=1).draws
    # 8 rungs take some 35 sweeps for a round trip: of 12 a draw, one draw in three is new.
    size = n / 3
    error = (draws.mean(0) - p.exact.mean) / p.exact.std
    assert float(error.abs().max()) < 4.5 / math.sqrt(size) + 0.02
    covariance = draws.T.cov()
    whitened = torch.linalg.solve(p.exact.covariance, covariance)
    assert abs(float(whitened.trace()) / 2 - 1) < 4.5 / math.sqrt(size) + 0.02


def test_modes_have_their_shares_and_chains_agree():
    case = parted_modes()
    exact = case.exact
    solution = Posterior(case.problem, case.prior, dtype=F64).sample(DMCMC(), 1200, chains=4, seed=2)
    assert solution.is_chain
    assert solution.about["evaluations_per_draw"] == DMCMC().cost().forward == 20
    error = total_variation(mode_shares(solution.draws, exact.law), exact.law.weights)
    # One draw in three is new: a round trip takes some 20 sweeps.
    assert error < 4.5 * 0.5 / math.sqrt(4800 / 3)
    assert split_r_hat(next(iter(solution.by_chain.values()))) < 1.01
    z = (solution.draws - exact.law.means[1]).flatten(1) @ torch.linalg.inv(
        torch.linalg.cholesky(exact.law.covariances[1])
    ).T
    own = exact.law.responsibilities(solution.draws)[:, 1] > 0.99
    assert abs(float(z[own].square().mean()) - 1) < 4.5 * math.sqrt(1 / (own.sum() / 3)) + 0.05


def test_a_problem_that_is_not_linear():
    """Independent values, so that the posterior of each is an integral over a line."""
    y, noise_std, n = torch.tensor([[-1.2, 0.4]], dtype=F64), 0.4, 3000
    prior = GaussianPrior(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64), sigma_min=0.02, sigma_max=60.0)
    problem = Problem(likelihoods.Gaussian(Bend((2,), (2,)), y, noise_std))
    sampler = DMCMC(path=Tempered(scale=0.4), slope=1.3, steps=12, rungs=7, keep=15)
    draws = Posterior(problem, prior, dtype=F64).sample(sampler, n, seed=1).draws
    t = torch.linspace(-5.0, 5.0, 4001, dtype=F64)[:, None]
    w = torch.softmax(-0.5 * (((t + 0.3 * torch.sin(t) - y) / noise_std) ** 2 + t**2), 0)
    mean = (w * t).sum(0)
    std = (w * (t - mean) ** 2).sum(0).sqrt()
    size = n / 4
    assert float(((draws.mean(0) - mean) / std).abs().max()) < 4.5 / math.sqrt(size) + 0.03
    assert float((draws.std(0) / std - 1).abs().max()) < 4.5 / math.sqrt(2 * size) + 0.03


# The contract.


def test_a_short_ladder_is_warned_of():
    sharp = Problem.simulate(masked().likelihood.operator, field().sample(1, seed=3)[0], noise_std=0.02, seed=1)
    with (
        pytest.warns(RuntimeWarning, match=r"ladder is too short, or its run: .* Take more rungs than 2"),
        pytest.warns(RuntimeWarning, match=r"a factor of 1041\.7 apart"),
    ):
        Posterior(sharp, field(), dtype=F64).sample(DMCMC(rungs=2, keep=20), 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Posterior(weak(), field(), dtype=F64).sample(DMCMC(keep=20), 40)


def test_micro_batches_and_several_problems_give_the_same_draws():
    problems, sampler = [weak(1), weak(2)], DMCMC(rungs=4, keep=4, burn_in=20, steps=45)

    def both(**settings) -> list:
        return Posterior(problems, field(), dtype=F64, **settings).sample(sampler, 8, chains=2, seed=4)

    whole, parts = both(), both(micro_batch=3)
    for i, problem in enumerate(problems):
        alone = Posterior(problem, field(), dtype=F64).sample(sampler, 8, chains=2, seed=4)
        for other in (parts[i], alone):
            torch.testing.assert_close(whole[i].draws, other.draws, rtol=0.0, atol=1e-10)
    assert not torch.allclose(whole[0].draws, whole[1].draws, atol=1e-2)


@pytest.mark.parametrize("at", [5, 60])
def test_a_checkpoint_resumes_the_same_run(tmp_path, at):
    def interrupt(state, info):
        if state.step == at:
            raise KeyboardInterrupt

    posterior, path = Posterior(weak(), field(), dtype=F64), tmp_path / "run.safetensors"
    sampler = DMCMC(rungs=4, keep=10, burn_in=20, steps=12)
    with pytest.raises(KeyboardInterrupt):
        posterior.sample(sampler, 20, checkpoint=path, callback=interrupt)
    resumed = posterior.sample(sampler, 20, checkpoint=path)
    assert torch.equal(resumed.draws, posterior.sample(sampler, 20).draws)


def test_a_run_stopped_early_keeps_its_visits():
    posterior, sampler = Posterior(weak(), field(), dtype=F64), DMCMC(keep=40)
    # 40 + 200 sweeps in place of 40 + 240 keep most of the draws.
    solution = posterior.sample(sampler, 80, budget=Budget(max_evaluations=3 * 240 * 2 / 80))
    assert solution.draws.shape == (80, *SHAPE)
    assert len(solution.trace) == 240
    with pytest.raises(SamplingError, match="no draws after 10 sweeps: the burn-in takes 40"):
        posterior.sample(sampler, 80, budget=Budget(max_evaluations=3 * 10 * 2 / 80))


def test_cost_is_what_is_counted():
    sampler = DMCMC(keep=20, burn_in=40, steps=5)
    solution = Posterior(weak(), field(), dtype=F64).sample(sampler, 40)
    assert sampler.cost() == Cost(21)
    assert solution.about["evaluations_per_draw"] == 21
    assert {info.sigma for info in solution.trace} == {sampler.ladder(Posterior(weak(), field()))[0]}


def test_what_it_cannot_do_is_refused():
    class Other(Path):
        def potential(self, sigma, linear, log_prob_and_grad):
            return log_prob_and_grad

    class Broken:
        shape, sigma_min, sigma_max = SHAPE, 1e-3, 100.0

        def denoise(self, z, sigma):
            return z * math.nan

    bent = Problem(likelihoods.Gaussian(Bend(SHAPE, SHAPE), normal(1, *SHAPE), 0.5))
    with pytest.raises(CapabilityError, match="DMCMC needs linear"):
        invdiff.solve(bent, field(), DMCMC())
    with pytest.raises(CapabilityError, match="Other is not known"):
        invdiff.solve(masked(), field(), DMCMC(path=Other()))
    with pytest.raises(CapabilityError, match="Other has no form"):
        tilt(Posterior(masked(), field()), Other(), torch.zeros(1, 1, *SHAPE), torch.zeros(1, 1))
    with pytest.raises(SamplingError, match="left the finite numbers at step 1"):
        Posterior(masked(), Broken(), dtype=F64).sample(DMCMC(), 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step, got 0"),
        ({"rungs": 1}, "at least two rungs, got 1"),
        ({"burn_in": 8}, "takes 8 sweeps; burn_in must be longer, got 8"),
        ({"keep": 0}, "got keep=0"),
        ({"share": 1.0}, r"in \(0, 1\); got 1\.0"),
        ({"step_size": 1.7}, r"\(0, 1\.6\] .* got 1\.7"),
        ({"slope": -1.0}, "slope is a positive bound"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        DMCMC(**settings)


def test_levels_outside_the_priors_are_refused():
    with pytest.raises(InputError, match="do not lie within the prior's"):
        invdiff.solve(masked(), field(), DMCMC(levels=Levels(sigma_max=1e4)))
