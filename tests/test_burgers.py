"""Burgers' equation against Cole and Hopf's solution; orders, mass, adjoints, data, and clear errors."""

from math import pi

import pytest
import torch

from invdiff import kernels
from invdiff.errors import CatalogueError, InputError, ShapeError, SolverError
from invdiff.kernels.burgers_trajectory import burgers_trajectory, cpu, reference
from invdiff.pde import Burgers, BurgersSetting, burgers_cases

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def cole_hopf(points: int, times: torch.Tensor, nu: float) -> torch.Tensor:
    """Averages of the solution from u_0 = sin(2 pi x), unforced: u = -2 nu (log phi)_x, phi of the heat equation.

    The sine is odd about 0 and 1, so that it is the solution between walls and with periodic ends alike.
    """
    n = 2048  # phi is entire: its Fourier coefficients fall faster than any power
    x = torch.arange(n, dtype=F64) / n
    start = torch.fft.rfft(torch.exp(-(1.0 - torch.cos(2 * pi * x)) / (4 * pi * nu)))
    k = 2 * pi * torch.arange(len(start), dtype=F64)
    phi = torch.fft.irfft(start * torch.exp(-nu * k**2 * times[:, None]), n)
    edges = phi[:, torch.arange(points + 1) * (n // points) % n].log()
    return -2.0 * nu * edges.diff(dim=1) * points


@pytest.mark.parametrize("boundary", ["wall", "periodic"])
def test_cole_hopf_to_the_fourth_order(boundary):
    nu, errors = 0.05, []
    for points in (32, 64, 128):
        solver = Burgers(points, 4, 0.4, viscosity=nu, boundary=boundary, refine=1)
        exact = cole_hopf(points, torch.linspace(0, 0.4, 5, dtype=F64), nu)
        found = solver(exact[:1], torch.zeros(1, 4, points, dtype=F64))[0]
        assert torch.equal(found[0], exact[0])
        errors.append(float((found - exact)[1:].abs().max()))
    assert errors[2] < 3e-5
    # 16 at fourth order, as the cells shrink.
    assert errors[0] / errors[1] > 10
    assert errors[1] / errors[2] > 13


def test_fourth_order_in_time():
    u, f = burgers_cases(BurgersSetting(points=24, windows=2, duration=0.2, viscosity=0.05), range(1))
    ends = [Burgers(24, 2, 0.2, viscosity=0.05, refine=1, steps=s)(u, f)[0, -1] for s in (8, 16, 256)]
    first, second = ((e - ends[2]).norm() for e in ends[:2])
    assert 13 < float(first / second) < 20


def test_mass_changes_by_what_is_forced():
    u, f = normal(2, 40).cumsum(1) / 8, normal(2, 3, 40, seed=1)
    found = Burgers(40, 3, 0.3, boundary="periodic")(u, f).mean(-1)
    expected = u.mean(-1, keepdim=True) + 0.1 * torch.cat((torch.zeros(2, 1), f.mean(-1).cumsum(1)), 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("periodic", [False, True])
def test_compiled_is_the_reference(periodic):
    u, f = 2 * normal(3, 24), 3 * normal(3, 3, 12, seed=1)
    bar = normal(3, 4, 24, seed=2)

    def run(dtype, choice):
        a, b = u.to(dtype).requires_grad_(), f.to(dtype).requires_grad_()
        with kernels.use(choice):
            states, counts = burgers_trajectory(a, b, 1 / 24, 0.02, 0.05, periodic=periodic)
            return states.detach(), counts, *torch.autograd.grad((states * bar.to(dtype)).sum(), (a, b))

    expected = run(F64, "reference")
    assert len(expected[1].unique()) > 1, "trajectories have steps of their own"
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 2e-5)):
        got = run(dtype, "auto")
        assert torch.equal(got[1], expected[1])
        for g, e in zip(got[::2] + got[3:], expected[::2] + expected[3:], strict=True):
            assert float((g.double() - e).abs().max() / e.abs().max()) < tolerance
    alone = burgers_trajectory(u[1:2], f[1:2], 1 / 24, 0.02, 0.05, periodic=periodic)[0]
    assert torch.equal(alone[0], run(F64, "auto")[0][1]), "no trajectory depends on its batch"


def test_threads_and_empty_batches():
    u, f = normal(5, 16), normal(5, 2, 8, seed=1)
    expected = reference.burgers_trajectory(u, f, 1 / 16, 0.02, 0.05, 0, True)[0]
    torch.set_num_threads(2)
    try:
        found = cpu.burgers_trajectory(u[:, :].clone().t().contiguous().t(), f, 1 / 16, 0.02, 0.05, 0, True)[0]
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert burgers_trajectory(u[:0], f[:0], 1 / 16, 0.02, 0.05)[0].shape == (0, 3, 16)


@pytest.mark.parametrize("boundary", ["wall", "periodic"])
def test_adjoint_against_finite_differences(boundary):
    solver = Burgers(10, 2, 0.1, boundary=boundary)
    u, f, bar = normal(1, 10).requires_grad_(), normal(1, 2, 10, seed=1).requires_grad_(), normal(1, 3, 10, seed=2)
    g_u, g_f = torch.autograd.grad((solver(u, f) * bar).sum(), (u, f))
    d_u, d_f, eps = normal(1, 10, seed=3), normal(1, 2, 10, seed=4), 1e-5
    with torch.no_grad():
        high, low = ((solver(u + s * d_u, f + s * d_f) * bar).sum() for s in (eps, -eps))
    slope = float((high - low) / (2 * eps))
    assert float((g_u * d_u).sum() + (g_f * d_f).sum()) == pytest.approx(slope, rel=1e-7)


def test_gradcheck_and_registration():
    u, f = normal(2, 6).requires_grad_(), normal(2, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: burgers_trajectory(a, b, 1 / 6, 0.05, 0.05)[0], (u, f))
    arguments = (u, f, 1 / 6, 0.05, 0.05, 0, False)
    torch.library.opcheck(torch.ops.invdiff.burgers_trajectory.default, arguments, test_utils="test_faketensor")


def test_refining_keeps_averages_and_quartics():
    solver = Burgers(12, 1, 0.1, refine=3, boundary="periodic")
    u = normal(2, 12)
    fine = solver.refined(u)
    torch.testing.assert_close(fine.unflatten(1, (12, 3)).mean(-1), u, rtol=0, atol=1e-14)
    edges = torch.linspace(0, 1, 37, dtype=F64)
    whole = edges**5 / 5  # averages of x^4 are its differences
    fine = solver.refined((whole[::3].diff() * 12)[None])[0]
    torch.testing.assert_close(fine[6:-6], (whole.diff() * 36)[6:-6], rtol=1e-12, atol=1e-13)


def test_cases_are_converged_enough_for_control():
    setting = BurgersSetting(points=120, windows=4, duration=0.8)
    u, f = burgers_cases(setting, range(3), seed=2)
    coarse, fine = (setting.solver(r)(u, f) for r in (2, 5))
    error = (coarse - fine).flatten(1).norm(dim=1) / fine.flatten(1).norm(dim=1)
    assert float(error.max()) < 1e-3


def test_a_case_depends_on_its_number_alone():
    setting = BurgersSetting.named("diffphycon")
    many, few = burgers_cases(setting, range(6), seed=3), burgers_cases(setting, range(4, 6), seed=3)
    assert torch.equal(many[0][4:], few[0])
    assert torch.equal(many[1][4:], few[1])
    assert not torch.equal(burgers_cases(setting, range(4, 6), seed=4)[0], few[0])


def test_cases_follow_their_law():
    setting = BurgersSetting(points=60, windows=20)
    u, f = burgers_cases(setting, range(400))
    # E a_1 = 1 and E a_2 = -1; where one bump has its centre the other has next to nothing. Standard error of the
    # difference of halves at most 2 / sqrt(12 * 400).
    assert float(u[:, :30].mean() + u[:, 30:].mean()) == pytest.approx(0.0, abs=4 * 0.03 * 0.35)
    # A first bump always, seven others half of the time: E b^2 = 3 / 4, so Var of the amplitudes' sum is 4.5 * 3.
    assert float(f.mean()) == pytest.approx(0.0, abs=0.25)
    finer, _ = burgers_cases(BurgersSetting(points=6000, windows=1), range(3))
    averages = finer.unflatten(1, (60, 100)).mean(-1)
    torch.testing.assert_close(burgers_cases(setting, range(3))[0], averages, rtol=1e-9, atol=1e-12)


def test_partial_settings():
    full, both = BurgersSetting.named("diffphycon"), BurgersSetting.named("diffphycon", "both")
    assert (full.scale, both.scale) == (2.0, 4.0)
    assert bool(full.controlled.all()) and bool(full.observed.all())
    assert both.controlled.sum() == both.observed.sum() == 64
    assert not bool(both.controlled[32:96].any())
    control = BurgersSetting.named("diffphycon", "control")
    assert bool(control.observed.all()) and not bool(control.controlled.all())
    _, f = burgers_cases(both, range(2))
    assert bool((f[..., 32:96] == 0).all()) and bool((f[..., :32] != 0).any())


def test_blow_up_says_when_and_where():
    solver = Burgers(10, 3, 0.3, refine=1)
    f = torch.zeros(2, 3, 10, dtype=F64)
    f[1, 1, 6] = torch.inf
    with pytest.raises(SolverError, match=r"trajectory 1 is not finite at time 0\.2, first at x = 0\.\d"):
        solver(torch.zeros(2, 10, dtype=F64), f)


def test_steps_that_are_too_few_name_enough():
    u, f = torch.ones(1, 100, dtype=F64), torch.zeros(1, 1, 100, dtype=F64)
    with pytest.raises(InputError, match=r"steps=3 makes steps of 0\.0333.* take steps=(\d+) or more") as raised:
        Burgers(100, 1, 0.1, refine=1, steps=3)(u, f)
    enough = int(str(raised.value).split("take steps=")[1].split()[0])
    assert bool(torch.isfinite(Burgers(100, 1, 0.1, refine=1, steps=enough)(u, f)).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Burgers(4, 1, 1.0), InputError, "at least 5 points"),
        (lambda: Burgers(8, 1, 0.0), InputError, "positive"),
        (lambda: Burgers(8, 1, 1.0, boundary="open"), InputError, "'wall' or 'periodic', got 'open'"),
        (lambda: Burgers(8, 2, 1.0)(normal(1, 8), normal(1, 3, 8)), ShapeError, r"forcing \(n, 2, 8\)"),
        (lambda: Burgers(8, 2, 1.0)(normal(1, 8), normal(1, 2, 8).float()), InputError, "share a device"),
        (lambda: burgers_trajectory(normal(1, 9), normal(1, 2, 4), 0.1, 0.1, 0.1), ShapeError, "multiple of the"),
        (lambda: burgers_trajectory(normal(1, 8), normal(1, 2, 4), 0.1, 0.0, 0.1), InputError, "positive"),
        (lambda: BurgersSetting.named("wdo"), CatalogueError, "did you mean 'wdno'"),
        (lambda: BurgersSetting(partial="half"), InputError, "got 'half'"),
        (lambda: BurgersSetting(scale=0.0), InputError, "positive factors"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()
