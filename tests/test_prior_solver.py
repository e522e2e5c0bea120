"""Solving by a prior of trajectories, and searches that go through it; proportional control."""

import pytest
import torch

import invdiff
from invdiff.errors import InputError, ShapeError
from invdiff.noise import Noise, stream_key
from invdiff.pde import BurgersCost, BurgersSetting, PriorSolver, burgers_cases, optimal_forcing, pid_forcing
from invdiff.priors import GaussianPrior
from invdiff.priors.trajectory_loading import TrajectoryCard, make_trajectory_prior
from invdiff.priors.wavelet import WaveletPrior
from invdiff.training.trajectories import measured

F64 = torch.float64
SMALL = {"points": 16, "windows": 6, "duration": 0.6, "viscosity": 0.02}


def small_prior() -> tuple[BurgersSetting, WaveletPrior]:
    """A network of random weights in float64, whose output is not zero."""
    setting = BurgersSetting(**SMALL)
    u, f = burgers_cases(setting, range(4))
    decoder = measured(setting.solver(1)(u, f), f, "haar", "periodization") | {"grid": [4, 8]}
    network = {"channels": [4], "blocks": [1], "attention": [False], "embedding": 4, "groups": 2}
    card = TrajectoryCard(
        name="small", version="1", description="", licence="",
        setting=SMALL | {"narrow": 1.0, "scale": 2.0, "partial": "none"},
        sigma_min=0.01, sigma_max=20.0, sigma_data=(0.5,) * 8, network=network, decoder=decoder,
    )  # fmt: skip
    prior = make_trajectory_prior(card).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in prior.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=F64))
    return setting, prior.requires_grad_(requires_grad=False)


def test_rows_are_solved_together_as_alone_and_noises_stand_one_after_the_other():
    setting, prior = small_prior()
    u, f = burgers_cases(setting, range(3), seed=1)
    solver = PriorSolver(prior, levels=(20.0, 1.0, 0.3), draws=2, seed=4)
    assert (solver.points, solver.windows, solver.evaluations) == (16, 6, 6)
    together = solver(u, f)
    assert together.shape == (6, 7, 16)
    for i in range(3):
        torch.testing.assert_close(solver(u[i : i + 1], f[i : i + 1]), together[i::3], rtol=1e-5, atol=1e-6)
    assert float((together[:3] - together[3:]).abs().max()) > 1e-3  # two noises, two answers
    once = PriorSolver(prior, levels=(20.0, 1.0, 0.3), seed=4)(u, f)
    torch.testing.assert_close(once, together[:3], rtol=1e-5, atol=1e-6)


def test_the_first_level_is_the_denoiser_told_both():
    setting, prior = small_prior()
    u, f = burgers_cases(setting, range(1), seed=1)
    known = prior.condition({"initial": u[0], "forcing": f[0]})
    noise = Noise([stream_key(0, "solver", 0)], 1, dtype=F64)
    z = 20.0 * noise.normal(noise.slots, prior.shape)
    expected = known.decode(known.denoise(z, 20.0))[:, : 7 * 16].reshape(1, 7, 16)
    torch.testing.assert_close(PriorSolver(prior)(u, f), expected, rtol=1e-6, atol=1e-7)


def test_gradients_pass_through_the_network():
    setting, prior = small_prior()
    u, f = burgers_cases(setting, range(1), seed=1)
    cost = BurgersCost(PriorSolver(prior, levels=(20.0, 1.0), draws=2), u[0], u[0] + 0.1, weight=1e-3)
    leaf = f.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(leaf).sum(), leaf)
    way = torch.randn(f.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    h = 1e-2  # the network computes in single precision
    central = float(cost(f + h * way) - cost(f - h * way)) / (2 * h)
    assert float((slope * way).sum()) == pytest.approx(central, rel=2e-2)


def test_a_search_among_smooth_forcings():
    """Its forcing is smooth, its gradient that of the averages, and more calls are never worse."""
    setting = BurgersSetting(**SMALL)
    u, f = burgers_cases(setting, range(1), seed=1)
    solver = setting.solver(1)
    with torch.no_grad():
        target = solver(u, f)[0, -1]
    cost = BurgersCost(solver, u[0], target, weight=2e-3)
    few, many = (optimal_forcing(cost, calls=n, smooth=(1.0, 2.0)) for n in (5, 40))
    free = optimal_forcing(cost, calls=40)
    assert free.cost <= many.cost * 1.001
    assert many.cost <= few.cost
    assert many.cost < 0.5 * float(cost(torch.zeros_like(f)))
    rough = [float(x.forcing.diff(dim=1).square().sum() / x.forcing.square().sum()) for x in (many, free)]
    assert rough[0] < rough[1]
    assert few.calls == 5
    # A start is averaged too, and what acts nowhere is left out of it.
    masked = BurgersCost(solver, u[0], target, controlled=torch.arange(16) < 8)
    one = optimal_forcing(masked, start=torch.ones(6, 16), calls=1, smooth=(1.0, 2.0)).forcing
    assert not one[:, 8:].any()
    assert float(one[3, 0]) == pytest.approx(1.0, abs=0.01)
    assert 0.3 < float(one[3, 7]) < 0.7
    for wrong in ((0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(InputError, match="positive"):
            optimal_forcing(cost, smooth=wrong)


def test_the_trained_prior_solves():
    """Three held-out cases of its own setting; bounds are twice what was measured when it was trained."""
    prior, setting = invdiff.load_prior("burgers-wavelet"), BurgersSetting.named("wdno")
    u, f = burgers_cases(setting, range(3), seed=1)
    with torch.no_grad():
        truth = setting.solver(2)(u, f)
        errors = [
            float((PriorSolver(prior, levels=levels)(u, f) - truth)[:, 1:].square().mean())
            for levels in ((80.0,), (80.0, 1.0))
        ]
    assert errors[0] < 2e-3
    assert errors[1] < 1e-3
    assert float(truth[:, 1:].square().mean()) > 0.1


def test_proportional_control_goes_where_it_should():
    setting = BurgersSetting(points=16, windows=20, duration=2.0, viscosity=0.02)
    u, f = burgers_cases(setting, range(1), seed=1)
    with torch.no_grad():
        target = setting.solver(1)(u, 0.3 * f)[0, -1]
    half = torch.arange(16) < 8
    cost = BurgersCost(setting.solver(1), u[0], target, weight=0.0)
    none = float(cost.misfit(torch.zeros_like(f)))
    found = pid_forcing(cost, 5.0, 2.0, 0.05)
    assert found.shape == (20, 16)
    assert float(cost.misfit(found[None])) < 0.1 * none
    assert not pid_forcing(cost, 0.0).any()
    # The loop is closed: the next window's forcing follows from the state that this one led to.
    with torch.no_grad():
        states = setting.solver(1)(u, pid_forcing(cost, 5.0)[None])[0]
    torch.testing.assert_close(pid_forcing(cost, 5.0), 5.0 * (target - states[:-1]), rtol=1e-6, atol=1e-6)
    masked = pid_forcing(BurgersCost(setting.solver(1), u[0], target, controlled=half), 5.0)
    assert not masked[:, 8:].any()
    with pytest.raises(InputError, match="plant"):
        pid_forcing(BurgersCost(PriorSolver(small_prior()[1]), u[0], target), 1.0)


def test_what_does_not_fit():
    setting, prior = small_prior()
    u, f = burgers_cases(setting, range(2), seed=1)
    for levels in ((), (1.0, 1.0), (30.0,), (1.0, 0.001)):
        with pytest.raises(InputError, match="fall within"):
            PriorSolver(prior, levels=levels)
    with pytest.raises(InputError, match="At least one"):
        PriorSolver(prior, draws=0)
    with pytest.raises(ShapeError, match="6 windows of 16 points"):
        PriorSolver(prior)(u, f[:, :5])
    with pytest.raises(ShapeError, match="state"):
        PriorSolver(GaussianPrior(torch.zeros(4, dtype=F64), torch.eye(4, dtype=F64)))
    known = prior.condition({"initial": u})
    with pytest.raises(ShapeError, match="row each"):
        known.denoise(torch.zeros(3, *prior.shape, dtype=F64), 1.0)
    with pytest.raises(ShapeError, match="as many for every"):
        prior.condition({"initial": u, "forcing": f[:1].expand(3, -1, -1)})
