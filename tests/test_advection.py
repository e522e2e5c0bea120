"""Advection against exact shifts; orders, mass, adjoint and gradient, new extrema, data, and clear errors."""

from math import pi

import pytest
import torch

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.pde import Advection, AdvectionSetting, advection_cases

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def averages(points: int, wave: int, shift: float = 0.0) -> torch.Tensor:
    """Averages of sin(2 pi wave (x - shift)) in cells of (0, 1)."""
    k = 2 * pi * wave
    return -torch.cos(k * (torch.linspace(0, 1, points + 1, dtype=F64) - shift)).diff() * (points / k)


@pytest.mark.parametrize("scheme", ["spectral", "conservative"])
@pytest.mark.parametrize("points", [11, 12])
@pytest.mark.parametrize("speed", [1.0, -2.0])
def test_whole_cells_shift_to_rounding(scheme, points, speed):
    u = normal(2, points)
    # A cell, or two backwards, between two outputs; in all more than the whole interval.
    found = Advection(points, 31, 30 / points, speed=speed, scheme=scheme)(u)
    expected = torch.stack([u.roll(int(speed) * k, 1) for k in range(31)], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_resolved_waves_are_exact():
    solver = Advection(32, 5, 2.0, speed=0.37, length=2.0)
    times = torch.linspace(0, 2, 5).tolist()
    u = averages(32, 3) + 0.5 * averages(32, 15)
    exact = torch.stack([averages(32, 3, 0.37 * t / 2) + 0.5 * averages(32, 15, 0.37 * t / 2) for t in times])
    torch.testing.assert_close(solver(u[None])[0], exact, rtol=0, atol=1e-13)


def test_lines_are_of_second_order():
    errors = []
    for points in (64, 128, 256):
        found = Advection(points, 2, 1.3, speed=0.777, scheme="conservative")(averages(points, 1)[None])[0, 1]
        errors.append(float((found - averages(points, 1, 1.3 * 0.777)).abs().mean()))
    # 4 at second order; the limiter cuts the extrema's cells, whose share of the mean error falls as fast.
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.3


def test_errors_do_not_grow_with_time():
    # Times that differ by the time of one round: the same shift of the same lines.
    u = normal(1, 40)
    found = Advection(40, 11, 10.3, scheme="conservative", speed=1.0 / 1.03)(u)[0]
    torch.testing.assert_close(found[10], u[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("scheme", ["spectral", "conservative"])
def test_mass_stays(scheme):
    u = normal(3, 33)
    found = Advection(33, 7, 1.0, speed=1.234, scheme=scheme)(u)
    torch.testing.assert_close(found.sum(-1), u.sum(-1)[:, None].expand(3, 7), rtol=0, atol=1e-12)


def test_a_jump_rings_in_one_scheme_and_not_in_the_other():
    u = (torch.arange(64) < 20).to(F64)[None]
    sharp = Advection(64, 50, 1.0, speed=0.97, scheme="conservative")(u)
    smooth = Advection(64, 50, 1.0, speed=0.97)(u)
    assert float(sharp.min()) >= -1e-15
    assert float(sharp.max()) <= 1 + 1e-15
    variation = (sharp - sharp.roll(1, -1)).abs().sum(-1)
    assert float(variation.max()) <= 2 + 1e-12
    assert float(smooth.max()) > 1.05


@pytest.mark.parametrize("points", [9, 10])
def test_adjoint(points):
    solver = Advection(points, 6, 1.0, speed=0.321)
    u, y = normal(2, points), normal(2, 6, points, seed=1)
    assert float((solver(u) * y).sum()) == pytest.approx(float((u * solver.adjoint(y)).sum()), rel=1e-13)
    v = u.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(solver(v), v, y)[0], solver.adjoint(y), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_limited_scheme():
    solver = Advection(12, 4, 0.3, speed=0.77, scheme="conservative")
    assert torch.autograd.gradcheck(solver, normal(2, 12).requires_grad_())


@pytest.mark.parametrize("scheme", ["spectral", "conservative"])
def test_single_precision(scheme):
    solver, u = Advection(64, 5, 3.0, speed=0.7, scheme=scheme), normal(2, 64)
    found = solver(u.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), solver(u), rtol=0, atol=5e-6)


def test_cases_are_averages_of_their_waves():
    fine = advection_cases(AdvectionSetting(points=6400), range(4), seed=1)
    coarse = advection_cases(AdvectionSetting(points=64), range(4), seed=1)
    torch.testing.assert_close(fine.unflatten(1, (64, 100)).mean(-1), coarse, rtol=0, atol=1e-13)
    setting = AdvectionSetting(points=64, states=9, speed=0.4)
    shifted = setting.solver()(coarse)[:, 5]  # 0.4 * 1.25 is half of the interval
    torch.testing.assert_close(shifted, coarse.roll(32, 1), rtol=0, atol=1e-12)


def test_a_case_depends_on_its_number_alone():
    setting = AdvectionSetting()
    many, few = advection_cases(setting, range(6), seed=3), advection_cases(setting, range(4, 6), seed=3)
    assert torch.equal(many[4:], few)
    assert not torch.equal(advection_cases(setting, range(4, 6), seed=4), few)


def test_cases_follow_their_law():
    u = advection_cases(AdvectionSetting(points=64), range(2000))
    power = torch.fft.rfft(u).abs() / 32
    assert float(power[:, 9:].abs().max()) < 1e-12, "no wave above the highest"
    assert float(power[:, 0].abs().max()) < 1e-12
    # Power sums to sum A_i^2 but where both waves share a number (1 / 8, mixed with a random phase, mean unchanged):
    # E = 2 / 3, standard deviation of a case below 1, so 4 standard errors of 2000 are below 0.09.
    assert float((power**2).sum(1).mean()) == pytest.approx(2 / 3, abs=0.09)
    # Each number holds an eighth of it (sinc changes it by 3 % at most), 4 standard errors below 0.04.
    assert (power**2).mean(0)[1:9].tolist() == pytest.approx([1 / 12] * 8, abs=0.04)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Advection(2, 3, 1.0), InputError, "at least 3 points"),
        (lambda: Advection(8, 1, 1.0), InputError, "2 states"),
        (lambda: Advection(8, 2, 0.0), InputError, "positive"),
        (lambda: Advection(8, 2, 1.0, speed=float("nan")), InputError, "speed is finite"),
        (lambda: Advection(8, 2, 1.0, scheme="upwind"), InputError, "got 'upwind'"),
        (lambda: Advection(8, 2, 1.0)(normal(1, 9)), ShapeError, r"states \(n, 8\)"),
        (lambda: Advection(8, 2, 1.0)(normal(1, 8).half()), InputError, "float16"),
        (lambda: Advection(8, 2, 1.0).adjoint(normal(1, 3, 8)), ShapeError, r"takes \(n, 2, 8\)"),
        (lambda: Advection(8, 2, 1.0, scheme="conservative").adjoint(normal(1, 2, 8)), CapabilityError, "not linear"),
        (lambda: AdvectionSetting(points=16), InputError, "points=16"),
        (lambda: AdvectionSetting(waves=0), InputError, "waves=0"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


def test_the_event_is_the_trajectory_on_its_grid():
    setting = AdvectionSetting(points=20, states=5, duration=0.8)
    (state,) = setting.event
    assert state.shape == tuple(setting.solver()(advection_cases(setting, range(1)))[0].shape)
    assert (state.name, state.dims, state.units) == ("state", ("time", "x"), "1")
    assert state.coords["time"] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert state.coords["x"][:2] == pytest.approx([0.025, 0.075])
