"""Compressible flow against exact solutions; orders, conservation, contacts, adjoints, data, and clear errors."""

from math import pi, sqrt

import pytest
import torch
from processes import check_alone, has_gpu, has_triton

from invdiff import kernels
from invdiff.errors import InputError, ShapeError, SolverError
from invdiff.kernels.flow_trajectory import cpu, flow_trajectory, reference
from invdiff.pde import CompressibleFlow, ShockTubeSetting, flow_cases, riemann_solution, shock_tubes
from invdiff.pde.flow import conserved, primitive

F64 = torch.float64
BOUNDARIES = ("outflow", "periodic", "wall")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rough(n: int, points: int, seed: int = 0) -> torch.Tensor:
    """Random density, velocity and pressure, with jumps of every sign in every cell, faster from case to case."""
    u = normal(n, 3, points, seed=seed)
    scale = 0.6 * torch.arange(1, n + 1)[:, None]
    return torch.stack(((0.4 * u[:, 0]).exp(), scale * u[:, 1], (0.4 * u[:, 2]).exp()), 1)


def tube(left, right, points: int, at: float = 0.5) -> torch.Tensor:
    x = (torch.arange(points, dtype=F64) + 0.5) / points
    left, right = (torch.tensor(s, dtype=F64)[None, :, None] for s in (left, right))
    return torch.where(x < at, left, right)


def torn(points: int) -> torch.Tensor:
    """Cold gas whose neighbours move apart at some ten times the speed of sound: no scheme of second order survives."""
    one = torch.ones(points, dtype=F64)
    return torch.stack((one, torch.arange(points) - 3.0 * one, 0.01 * one))[None]


SOD = ((1.0, 0.0, 1.0), (0.125, 0.0, 0.1))


def exact_averages(left, right, points: int, time: float, gamma: float, at: float = 0.5) -> torch.Tensor:
    fine = (torch.arange(points * 40, dtype=F64) + 0.5) / (points * 40)
    states = (torch.tensor(s, dtype=F64)[None] for s in (left, right))
    whole = riemann_solution(*states, (fine - at) / time, gamma=gamma)
    return primitive(conserved(whole, gamma).unflatten(-1, (points, 40)).mean(-1), gamma)


def test_sod_to_the_first_order():
    errors = []
    for points in (100, 200, 400):
        solver = CompressibleFlow(points, 3, 0.2, gamma=1.4)
        found = solver(tube(*SOD, points))
        errors.append((found[0, -1] - exact_averages(*SOD, points, 0.2, 1.4)[0]).abs().mean(-1))
    coarse, middle, fine = errors
    assert float(fine[0]) < 2.5e-3
    # 2 at first order; contacts converge at 2 / 3 of it with a scheme of second order (1.59), and carry density alone.
    for one, two in ((coarse, middle), (middle, fine)):
        assert float((one / two)[0]) > 1.55
        assert bool(((one / two)[1:] > 1.8).all())


@pytest.mark.parametrize(
    ("left", "right", "time", "at", "bound"),
    [
        ((1.0, -2.0, 0.4), (1.0, 2.0, 0.4), 0.15, 0.5, 0.04),
        ((1.0, 0.0, 1000.0), (1.0, 0.0, 0.01), 0.012, 0.5, 0.09),
        ((5.99924, 19.5975, 460.894), (5.99242, -6.19633, 46.0950), 0.035, 0.4, 0.03),
    ],
)
def test_toros_harder_tubes(left, right, time, at, bound):
    # Two rarefactions that leave a near vacuum, a pressure ratio of 1e5, and two shocks that collide.
    found = CompressibleFlow(200, 2, time, gamma=1.4)(tube(left, right, 200, at))[0, -1]
    exact = exact_averages(left, right, 200, time, 1.4, at)[0]
    assert float(((found - exact).abs().mean(-1) / exact.abs().mean(-1)).max()) < bound


def test_entropy_wave_to_the_second_order():
    errors = []
    for points in (32, 64, 128):
        edges = torch.linspace(0, 1, points + 1, dtype=F64)
        rho = 1 - 0.2 * torch.cos(2 * pi * edges).diff() * points / (2 * pi)
        start = torch.stack((rho, torch.ones_like(rho), torch.ones_like(rho)))[None]
        found = CompressibleFlow(points, 2, 1.0, boundary="periodic", eta=0.0, zeta=0.0)(start)
        torch.testing.assert_close(found[:, -1, 1:], start[:, 1:], rtol=0, atol=1e-12)
        errors.append(float((found[0, -1, 0] - rho).abs().mean()))
    assert errors[0] / errors[1] > 3.3
    assert errors[1] / errors[2] > 3.6


def test_sound_is_of_second_order_and_of_the_right_speed():
    # A simple wave of Euler's equations: u = 2 (c - c_0) / (gamma - 1), constant along dx/dt = u + c, isentropic.
    gamma, time, errors = 1.4, 0.3, []
    for points in (64, 128, 256):
        fine = (torch.arange(points * 16, dtype=F64) + 0.5) / (points * 16)

        def wave(foot):
            u = 0.1 * torch.sin(2 * pi * foot)
            c = sqrt(gamma) + 0.5 * (gamma - 1) * u
            rho = (c * c / gamma) ** (1 / (gamma - 1))
            return torch.stack((rho, u, rho**gamma)), u + c

        def grid(whole, points=points):
            return primitive(conserved(whole, gamma).unflatten(-1, (points, 16)).mean(-1), gamma)

        foot = fine.clone()
        for _ in range(60):  # a contraction by 0.3 * 1.2 * 0.2 pi
            foot = fine - time * wave(foot)[1]
        found = CompressibleFlow(points, 2, time, gamma=gamma, boundary="periodic", eta=0.0, zeta=0.0)(
            grid(wave(fine)[0])[None]
        )
        errors.append((found[0, -1] - grid(wave(foot)[0])).abs().mean(-1))
    assert bool((errors[0] / errors[1] > 3.2).all())
    assert bool((errors[1] / errors[2] > 3.4).all())


def test_viscosity_damps_a_shear_free_wave_at_its_rate():
    # Linear: s'' + nu k^2 s' + c^2 k^2 s = 0 for a standing wave's density; nu = (zeta + 4 eta / 3) / rho.
    points, gamma, k, size = 128, 1.4, 2 * pi, 1e-5
    eta, zeta = 0.03, 0.02
    nu, c2 = zeta + 4 * eta / 3, gamma
    edges = torch.linspace(0, 1, points + 1, dtype=F64)
    wave = size * torch.sin(k * edges).diff() * points / k
    one = torch.ones_like(wave)
    solver = CompressibleFlow(points, 2, 0.7, gamma=gamma, boundary="periodic", eta=eta, zeta=zeta)
    start = torch.stack((one + wave, 0 * one, one + gamma * wave))[None]
    found = float(((solver(start)[0, -1, 0] - 1) * wave).sum() / (wave * wave).sum())
    rate, omega = nu * k * k / 2, sqrt(c2 * k * k - (nu * k * k / 2) ** 2)
    expected = 2.718281828459045 ** (-rate * 0.7) * (
        torch.cos(torch.tensor(omega * 0.7)) + rate / omega * torch.sin(torch.tensor(omega * 0.7))
    )
    assert found == pytest.approx(float(expected), abs=2e-3)


def test_mass_momentum_and_energy_stay():
    start = rough(3, 50)
    solver = CompressibleFlow(50, 4, 0.1, boundary="periodic", eta=1e-3, zeta=1e-3)
    total = conserved(solver(start), solver.gamma).sum(-1)
    torch.testing.assert_close(total, total[:, :1].expand_as(total), rtol=1e-13, atol=1e-12)
    walls = CompressibleFlow(50, 4, 0.1, boundary="wall", eta=1e-3, zeta=1e-3)(start)
    total = conserved(walls, solver.gamma).sum(-1)[..., [0, 2]]
    torch.testing.assert_close(total, total[:, :1].expand_as(total), rtol=1e-13, atol=1e-12)


def test_a_contact_at_rest_stays_exactly():
    start = torch.stack((rough(1, 40)[0, 0], torch.zeros(40, dtype=F64), torch.full((40,), 0.7, dtype=F64)))[None]
    U = conserved(start, 1.4)
    for boundary in BOUNDARIES:
        for choice in ("auto", "reference"):
            with kernels.use(choice):
                states, _ = flow_trajectory(U, 0.1, 0.2, 3, gamma=1.4, boundary=boundary)
            assert torch.equal(states, U[:, None].expand_as(states))


def test_walls_mirror():
    # A tube between walls is half of the periodic one that holds its mirror image.
    half = rough(1, 20)
    mirrored = torch.cat((half, torch.tensor([1.0, -1.0, 1.0], dtype=F64)[:, None] * half.flip(-1)), -1)
    walls = CompressibleFlow(20, 3, 0.1, boundary="wall", eta=1e-3)(half)
    both = CompressibleFlow(40, 3, 0.1, length=2.0, boundary="periodic", eta=1e-3)(mirrored)
    torch.testing.assert_close(walls, both[..., :20], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_compiled_is_the_reference(boundary):
    U, bar = conserved(rough(3, 24), 1.4), normal(3, 4, 3, 24, seed=2)

    def run(dtype, choice):
        start = U.to(dtype).requires_grad_()
        with kernels.use(choice):
            states, counts = flow_trajectory(start, 1 / 24, 0.02, 3, gamma=1.4, mu=0.02, boundary=boundary)
            return states.detach(), counts, torch.autograd.grad((states * bar.to(dtype)).sum(), start)[0]

    expected = run(F64, "reference")
    assert len(expected[1].unique()) > 1, "trajectories have steps of their own"
    for dtype, tolerance in ((F64, 1e-12), (torch.float32, 2e-5)):
        got = run(dtype, "auto")
        assert torch.equal(got[1], expected[1])
        for g, e in zip(got[::2], expected[::2], strict=True):
            assert float((g.double() - e).abs().max() / e.abs().max()) < tolerance
    alone = flow_trajectory(U[1:2], 1 / 24, 0.02, 3, gamma=1.4, mu=0.02, boundary=boundary)[0]
    assert torch.equal(alone[0], run(F64, "auto")[0][1]), "no trajectory depends on its batch"
    back = reference.adjoint(expected[0], expected[1], bar, 1 / 24, 1.4, 0.02, 0.02, boundary)
    torch.testing.assert_close(back, expected[2], rtol=1e-12, atol=1e-12)


def test_a_faster_signal_inside_of_a_window_gets_its_steps():
    # A gas at rest beside thin gas: the expansion is faster than any signal of the start.
    U = conserved(tube((1.0, 0.0, 1.0), (1e-4, 0.0, 1e-5), 50), 1.4)
    auto, counts = flow_trajectory(U, 0.02, 0.1, 2, gamma=1.4)
    first = reference.first_counts(U, 0.02, 1.4, 0.0, 0.1)[0]
    assert int(counts[0, 0]) > 1.3 * first
    with kernels.use("reference"):
        again = flow_trajectory(U, 0.02, 0.1, 2, gamma=1.4)
    assert torch.equal(counts, again[1])
    torch.testing.assert_close(auto, again[0], rtol=1e-12, atol=1e-12)


def test_threads_and_empty_batches():
    U = conserved(rough(5, 16), 1.4)
    expected = reference.flow_trajectory(U, 1 / 16, 1.4, 0.0, 0.02, 2, 0, "wall")[0]
    torch.set_num_threads(2)
    try:
        strided = U.transpose(1, 2).contiguous().transpose(1, 2)
        found = cpu.flow_trajectory(strided, 1 / 16, 1.4, 0.0, 0.02, 2, 0, "wall")[0]
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for choice in ("auto", "reference"):
        with kernels.use(choice):
            assert flow_trajectory(U[:0], 1 / 16, 0.1, 2, gamma=1.4)[0].shape == (0, 3, 3, 16)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_adjoint_against_finite_differences(boundary):
    solver = CompressibleFlow(12, 3, 0.08, gamma=1.4, eta=0.01, boundary=boundary)
    start, bar = rough(2, 12, seed=5).requires_grad_(), normal(2, 3, 3, 12, seed=2)
    (gradient,) = torch.autograd.grad((solver(start) * bar).sum(), start)
    way, eps = normal(2, 3, 12, seed=3), 1e-6
    with torch.no_grad():
        high, low = ((solver(start + s * way) * bar).sum() for s in (eps, -eps))
    assert float((gradient * way).sum()) == pytest.approx(float((high - low) / (2 * eps)), rel=1e-5)


def test_gradcheck_and_registration():
    U = conserved(rough(2, 6, seed=1), 1.4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: flow_trajectory(a, 1 / 6, 0.05, 2, gamma=1.4, mu=0.01)[0], U)
    arguments = (U, 1 / 6, 1.4, 0.01, 0.05, 2, 0, "wall")
    torch.library.opcheck(torch.ops.invdiff.flow_trajectory.default, arguments, test_utils="test_faketensor")


def test_cases_follow_their_law_and_their_exact_solutions():
    setting = ShockTubeSetting(points=256, states=3)
    left, right, position = shock_tubes(setting, range(400))
    both = torch.cat((left, right)).mean(0)
    # Standard error of 800 draws of a uniform law: width / sqrt(12 * 800).
    for mean, expected, width in zip(both.tolist(), (1.1, 0.0, 2.75), (1.8, 2.0, 4.5), strict=True):
        assert mean == pytest.approx(expected, abs=4 * width / sqrt(9600))
    assert float(position.abs().max()) < 0.5
    start = flow_cases(setting, range(4))
    total = conserved(start, setting.gamma).mean(-1)
    share = (position[:4, None] + 1) / 2
    ends = [conserved(s[:4, :, None], setting.gamma)[..., 0] for s in (left, right)]
    torch.testing.assert_close(total, share * ends[0] + (1 - share) * ends[1], rtol=1e-12, atol=1e-12)
    found, x = setting.solver()(start), (torch.arange(256, dtype=F64) + 0.5) / 128 - 1
    for k in range(4):
        # Until a wave reaches an end: signals stay below 5.
        rays = (x - position[k]) / 0.2
        exact = riemann_solution(left[k : k + 1], right[k : k + 1], rays, gamma=setting.gamma)[0]
        assert float(((found[k, 1] - exact).abs().mean(-1) / exact.abs().mean(-1)).max()) < 0.05


def test_a_case_depends_on_its_number_alone():
    setting = ShockTubeSetting(points=20)
    many, few = flow_cases(setting, range(6), seed=3), flow_cases(setting, range(4, 6), seed=3)
    assert torch.equal(many[4:], few)
    assert not torch.equal(flow_cases(setting, range(4, 6), seed=4), few)


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_vacuum_says_when_and_where(choice):
    start = torch.cat((tube(*SOD, 40), torn(40)))
    with (
        kernels.use(choice),
        pytest.raises(SolverError, match=r"trajectory 1 .* before time 0\.01, first at x = 0\.\d"),
    ):
        CompressibleFlow(40, 3, 0.02, gamma=1.4)(start)
    with kernels.use(choice):
        states, _ = flow_trajectory(conserved(start, 1.4), 1 / 40, 0.01, 2, gamma=1.4)
    lost = torch.isnan(states).any(2)
    assert not bool(lost[0].any())
    assert 0 < int(lost[1, 1].sum()) < 40
    assert bool(lost[1, 2].all())


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_signal_without_bound_is_given_up(choice):
    with kernels.use(choice):
        states, _ = flow_trajectory(conserved(tube((1.0, 0.0, 1e20), SOD[1], 8), 1.4), 0.1, 1.0, 1, gamma=1.4)
    assert bool(torch.isnan(states[0, 1]).all())


def test_steps_that_are_too_few_name_enough():
    start = tube(*SOD, 100)
    with pytest.raises(InputError, match=r"steps=3 makes steps of 0\.0333.* take steps=(\d+) or more") as raised:
        CompressibleFlow(100, 2, 0.1, steps=3)(start)
    enough = int(str(raised.value).split("take steps=")[1].split()[0])
    assert bool(torch.isfinite(CompressibleFlow(100, 2, 0.1, steps=enough)(start)).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CompressibleFlow(1, 3, 1.0), InputError, "at least 2 points"),
        (lambda: CompressibleFlow(8, 1, 1.0), InputError, "at least 2 states"),
        (lambda: CompressibleFlow(8, 2, 1.0, gamma=1.0), InputError, "gamma is above 1"),
        (lambda: CompressibleFlow(8, 2, 1.0, eta=-1.0), InputError, "at least 0"),
        (lambda: CompressibleFlow(8, 2, 1.0, boundary="open"), InputError, "got 'open'"),
        (lambda: CompressibleFlow(8, 2, 1.0)(rough(1, 9)), ShapeError, r"states \(n, 3, 8\)"),
        (lambda: CompressibleFlow(8, 2, 1.0)(-rough(1, 8)), InputError, r"trajectory 0 has density -.* at x = 0\.0625"),
        (lambda: flow_trajectory(normal(1, 2, 9), 0.1, 0.1, 1, gamma=1.4), ShapeError, r"\(n, 3, cells\)"),
        (lambda: flow_trajectory(normal(1, 3, 9), 0.0, 0.1, 1, gamma=1.4), InputError, "positive"),
        (lambda: flow_trajectory(normal(1, 3, 9).half(), 0.1, 0.1, 1, gamma=1.4), InputError, "float16"),
        (lambda: flow_trajectory(normal(1, 3, 9), 0.1, 0.1, 1, gamma=1.4, boundary="x"), InputError, "got 'x'"),
        (lambda: ShockTubeSetting(density=(0.0, 1.0)), InputError, "are positive"),
        (lambda: ShockTubeSetting(velocity=(-3.0, 3.0)), InputError, "may open a vacuum"),
        (lambda: ShockTubeSetting(pressure=(2.0, 1.0)), InputError, r"\(low, high\)"),
    ],
)
def test_bad_input(call, error, message, unchecked):
    with pytest.raises(error, match=message):
        call()


def check_triton(device: str, *grids: tuple[int, str]) -> None:
    """The Triton kernel against the reference in float64: states, steps, and where a trajectory ends."""
    from invdiff.kernels.flow_trajectory import gpu

    for points, boundary in grids:
        U, settings = conserved(rough(2, points), 1.4), (1 / points, 1.4, 0.02, 0.08 / points, 2, 0, boundary)
        expected, steps = reference.flow_trajectory(U, *settings)
        for dtype, tolerance in ((F64, 1e-12), (torch.float32, 2e-5)):
            states, counts = gpu.flow_trajectory(U.to(device, dtype), *settings)
            assert states.dtype == dtype
            assert torch.equal(counts.cpu(), steps)
            assert float((states.cpu().double() - expected).abs().max() / expected.abs().max()) < tolerance
    several = torch.cat((rough(1, 8), torn(8), tube((1.0, 0.0, 1e20), SOD[1], 8)))
    several = conserved(several, 1.4)
    settings = (0.1, 1.4, 0.0, 0.03, 2, 0, "outflow")
    expected, steps = reference.flow_trajectory(several, *settings)
    states, counts = gpu.flow_trajectory(several.to(device), *settings)
    assert torch.isnan(expected).any(3).any(2).tolist() == [[False] * 3, [False, True, True], [False, True, True]]
    assert torch.equal(torch.isnan(states).cpu(), torch.isnan(expected))
    assert torch.equal(counts.cpu(), steps)
    given = (0.01, 1.4, 0.0, 0.001, 1, 1, "wall")
    one = gpu.flow_trajectory(several[:1].to(device), *given)[0]
    torch.testing.assert_close(one.cpu(), reference.flow_trajectory(several[:1], *given)[0])
    assert gpu.flow_trajectory(several[:0].to(device), *given)[0].shape == (0, 2, 3, 8)


def check_gradient_on_a_gpu() -> None:
    """The gradient after the Triton kernel against the one compiled for a CPU."""
    kernels.ON_GPU |= {"flow_trajectory"}
    U, bar = conserved(rough(2, 100), 1.4), normal(2, 3, 3, 100)
    found = []
    for device in ("cpu", "cuda"):
        start = U.to(device).requires_grad_()
        states, _ = flow_trajectory(start, 0.01, 0.005, 2, gamma=1.4, mu=0.01)
        found.append(torch.autograd.grad(states, start, bar.to(device))[0].cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


@has_triton
def test_triton_in_the_interpreter():
    check_alone(
        "import warnings\nwarnings.simplefilter('ignore')\n"  # numpy's, where a trajectory ends
        # Without a spare lane, with one for the last face, and with many.
        "from test_flow import check_triton\ncheck_triton('cpu', (32, 'periodic'), (31, 'wall'), (20, 'outflow'))",
        interpret=True,
    )


@pytest.mark.gpu
@has_gpu
def test_triton_on_the_gpu():
    script = """
from test_flow import BOUNDARIES, check_gradient_on_a_gpu, check_triton
check_triton("cuda", *((points, boundary) for points in (31, 100, 128, 1024) for boundary in BOUNDARIES))
check_gradient_on_a_gpu()
"""
    check_alone(script, interpret=False)
