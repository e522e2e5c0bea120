"""WDNO: its proximal point against the exact one, objectives that are not quadratic, control by the trained prior."""

import pytest
import torch

import invdiff
from invdiff import likelihoods, operators, samplers
from invdiff.errors import InputError
from invdiff.noise import Noise
from invdiff.pde import burgers_judge
from invdiff.posterior import Posterior
from invdiff.priors import FieldPrior, MixturePrior
from invdiff.problem import Problem, load_problem
from invdiff.samplers import WDNO, DiffPIR, Levels
from invdiff.samplers.annealing import AnnealedState

F64, SHAPE = torch.float64, (1, 4, 5)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture() -> MixturePrior:
    means = torch.stack([torch.zeros(SHAPE, dtype=F64), torch.ones(SHAPE, dtype=F64)])
    return MixturePrior(torch.tensor([0.5, 0.5], dtype=F64), means, torch.eye(20, dtype=F64).expand(2, -1, -1) * 0.3)


@pytest.mark.parametrize("zeta", [0.3, 1.0])
def test_its_step_is_diffpirs_where_the_problem_is_linear(zeta):
    """Conjugate gradients end where the exact solve is; rounding takes more iterations than there are values."""
    A = operators.Blur(operators.gaussian_kernel(3, 0.8).double(), SHAPE)
    problem = Problem(likelihoods.Gaussian(A, normal(*A.out_shape, seed=5), 0.3))
    posterior, n = Posterior(problem, mixture(), dtype=F64), 3
    mine, exact = (
        c(steps=12, lam=2.5, zeta=zeta, **more)
        for c, more in ((WDNO, {"inner": 80, "levels": Levels()}), (DiffPIR, {}))
    )
    levels = exact.levels.of(posterior, 12)
    for k in (4, 8, 11):
        state = AnnealedState(z=(1.0 + levels[k]) * normal(1, n, *SHAPE, seed=k), step=k)
        found, info = mine.step(posterior, state, noise=Noise([7], n, dtype=F64).at(k + 1))
        expected, other = exact.step(posterior, state, noise=Noise([7], n, dtype=F64).at(k + 1))
        torch.testing.assert_close(found.z, expected.z, rtol=1e-6, atol=1e-6)
        assert info.misfit == pytest.approx(other.misfit, rel=1e-6)


def test_more_iterations_come_closer_to_the_proximal_point():
    target, weight = normal(*SHAPE, seed=2), torch.linspace(0.2, 3.0, 20, dtype=F64).reshape(SHAPE)

    def J(x: torch.Tensor) -> torch.Tensor:
        return (weight * (x + 0.01 * x**3) - target).square().flatten(1).sum(1)

    posterior = Posterior(Problem(likelihoods.Objective(J, 0.1, SHAPE)), mixture(), dtype=F64)
    d, sigma = normal(1, 4, *SHAPE, seed=3), 0.5

    def phi(x: torch.Tensor) -> torch.Tensor:
        return J(x[0]) / 0.1 + (x - d)[0].square().flatten(1).sum(1) / (2 * sigma**2)

    values = [phi(WDNO(inner=k)._proximal(posterior, d, sigma)) for k in (1, 3, 12)]
    start = phi(d)
    assert all((v < start).all() for v in values)
    assert values[0].mean() > values[1].mean() > values[2].mean()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_where_the_objective_is_least_nothing_moves(dtype):
    """Nor is anything divided by the slope of zero, on a grid of any size."""
    grid = (8, 44, 60)
    prior = FieldPrior.power_law(grid, 2.0, 1.0)
    d = normal(*grid, seed=4).to(dtype)
    bowl = likelihoods.Objective(lambda x: (x - d).square().flatten(1).sum(1), 1.0, grid)
    z = d.expand(1, 2, *grid)
    assert torch.equal(WDNO()._proximal(Posterior(Problem(bowl), prior, dtype=dtype), z, 0.5), z)


@pytest.mark.parametrize("solver", [False, True])
def test_the_trained_prior_steers(solver):
    """One case of WDNO's setting in a few levels, by the drawn states and through the equation."""
    problem = load_problem("burgers-control", 2, control__solver=solver)
    prior = invdiff.load_prior("burgers-wavelet")
    sampler = WDNO(steps=3, inner=1) if solver else WDNO(steps=8, inner=4)
    solution = invdiff.solve(problem, prior, sampler, draws=1, seed=1)
    forcing = solution.draws["forcing"].double()
    found, idle = burgers_judge(problem.card, forcing), burgers_judge(problem.card, torch.zeros_like(forcing))
    assert float(found.J) < 0.1 * float(idle.J)
    state = solution.draws["state"].double()[0]
    # The prior was told the initial state, and the state that is drawn is the one that the forcing leads to.
    assert float((state[0] - problem.given["initial"]).square().mean()) < 1e-3
    if not solver:
        assert float((state[-1] - problem.given["target"]).square().mean()) < 2e-3


def test_bad_settings_and_priors():
    for settings in ({"steps": 0}, {"lam": 0.0}, {"zeta": 1.5}, {"inner": 0}):
        with pytest.raises(InputError):
            WDNO(**settings)
    assert not WDNO().exact
    assert WDNO(steps=7).cost().forward == 7
    narrow = FieldPrior.power_law(SHAPE, 2.0, 1.0, sigma_min=0.5, sigma_max=10.0)
    with pytest.raises(InputError, match="do not lie within"):
        invdiff.solve(
            Problem.simulate(
                operators.Inpainting(torch.ones(4, 5) > 0, SHAPE), torch.zeros(SHAPE, dtype=F64), noise_std=1.0
            ),
            narrow,
            samplers.WDNO(),
        )
