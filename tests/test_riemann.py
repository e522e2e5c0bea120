"""Riemann's problem against Toro's table, the jump conditions and the equations; vacuum and bad input."""

import pytest
import torch

from invdiff.errors import InputError, ShapeError
from invdiff.pde import riemann_solution, riemann_star

F64 = torch.float64

# Toro, section 4.3.3, tables 4.1 and 4.2 (gamma = 1.4): states, p* and u*.
TESTS = [
    ((1.0, 0.0, 1.0), (0.125, 0.0, 0.1), 0.30313, 0.92745),
    ((1.0, -2.0, 0.4), (1.0, 2.0, 0.4), 0.00189, 0.00000),
    ((1.0, 0.0, 1000.0), (1.0, 0.0, 0.01), 460.894, 19.5975),
    ((1.0, 0.0, 0.01), (1.0, 0.0, 100.0), 46.0950, -6.19633),
    ((5.99924, 19.5975, 460.894), (5.99242, -6.19633, 46.0950), 1691.64, 8.68975),
]
LEFT, RIGHT = (torch.tensor([t[k] for t in TESTS], dtype=F64) for k in (0, 1))


def test_toros_table():
    p, u = riemann_star(LEFT, RIGHT, gamma=1.4)
    for k, (_, _, pressure, velocity) in enumerate(TESTS):
        assert float(p[k]) == pytest.approx(pressure, rel=1e-5, abs=6e-6)
        assert float(u[k]) == pytest.approx(velocity, rel=1e-5, abs=6e-6)


def test_toros_densities_beside_the_contact():
    _, u = riemann_star(LEFT, RIGHT, gamma=1.4)
    expected = [(0.42632, 0.26557), (0.02185, 0.02185), (0.57506, 5.99924), (5.99242, 0.57511), (14.2823, 31.0426)]
    for k, (low, high) in enumerate(expected):
        near = riemann_solution(
            LEFT[k : k + 1], RIGHT[k : k + 1], u[k] + torch.tensor([-1e-9, 1e-9], dtype=F64), gamma=1.4
        )
        assert near[0, 0].tolist() == pytest.approx([low, high], rel=3e-4)


def test_the_integral_form_holds_over_the_whole_fan():
    # d/dt of the integral over [-a, a] is F(left) - F(right): mass, momentum and energy, shocks and rarefactions alike.
    gamma, n = 1.4, 200_000
    for k in range(5):
        left, right = LEFT[k : k + 1], RIGHT[k : k + 1]
        a = 60.0
        xi = (torch.arange(n, dtype=F64) + 0.5) * (2 * a / n) - a

        def energy(r, u, p):
            return p / (gamma - 1) + 0.5 * r * u * u

        r, u, p = riemann_solution(left, right, xi, gamma=gamma)[0]
        total = torch.stack((r, r * u, energy(r, u, p))).sum(1) * (2 * a / n)
        (rl, ul, pl), (rr, ur, pr) = left[0], right[0]
        ends = torch.stack((rl + rr, rl * ul + rr * ur, energy(rl, ul, pl) + energy(rr, ur, pr))) * a

        def flux(r, u, p):
            return torch.stack((r * u, r * u * u + p, u * (energy(r, u, p) + p)))

        expected = ends + flux(rl, ul, pl) - flux(rr, ur, pr)
        # Cells of 6e-4 that hold a jump are off by at most their width times it.
        jump = torch.stack((r, r * u, energy(r, u, p))).diff(dim=1).abs().sum(1)
        assert bool(((total - expected).abs() < jump * 2 * a / n + 1e-9).all())


def test_entropy_is_constant_through_a_rarefaction_and_grows_through_a_shock():
    xi = torch.linspace(-1.1, 2.0, 400, dtype=F64)
    r, u, p = riemann_solution(LEFT[:1], RIGHT[:1], xi, gamma=1.4)[0]
    entropy = p / r**1.4
    fan = xi < 0.9  # the contact moves at 0.927
    torch.testing.assert_close(entropy[fan], torch.ones_like(entropy[fan]), rtol=1e-12, atol=0)
    # u + 2 c / (gamma - 1) is constant there too.
    invariant = (u + 5 * (1.4 * p / r).sqrt())[fan]
    torch.testing.assert_close(invariant, invariant[:1].expand_as(invariant), rtol=1e-12, atol=0)
    shocked, ahead = entropy[(xi > 1.0) & (xi < 1.7)], entropy[xi > 1.8]
    assert float(shocked.min()) > 1.05 * float(ahead.max())


def test_a_mirror_and_a_moving_frame_change_nothing():
    xi = torch.linspace(-30, 30, 101, dtype=F64)
    flip = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
    one = riemann_solution(LEFT, RIGHT, xi, gamma=1.4)
    two = riemann_solution(RIGHT * flip, LEFT * flip, -xi, gamma=1.4) * flip[:, None]
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    boost = torch.tensor([0.0, 3.0, 0.0], dtype=F64)
    moved = riemann_solution(LEFT + boost, RIGHT + boost, xi + 3.0, gamma=1.4) - boost[:, None]
    torch.testing.assert_close(one, moved, rtol=1e-9, atol=1e-9)


def test_equal_states_stay():
    p, u = riemann_star(LEFT, LEFT, gamma=5 / 3)
    torch.testing.assert_close(p, LEFT[:, 2], rtol=1e-13, atol=0)
    torch.testing.assert_close(u, LEFT[:, 1], rtol=1e-13, atol=1e-13)


def test_strong_shocks_and_near_vacuum_converge():
    states = torch.tensor([[1.0, 50.0, 1e-3], [1.0, -4.99, 1.0], [1.0, 0.0, 1e6]], dtype=F64)
    others = torch.tensor([[1.0, -50.0, 1e-3], [1.0, 4.99, 1.0 / 1.0], [1e-3, 0.0, 1e-6]], dtype=F64)
    p, u = riemann_star(states, others, gamma=1.4)
    # Two cold streams: p* -> (gamma + 1) / 2 rho u^2 as the pressure ahead vanishes.
    assert float(p[0]) == pytest.approx(1.2 * 2500, rel=1e-4)
    # Two rarefactions have a closed form: (1 - u / 5 c)^7 here with c = sqrt(1.4).
    assert float(p[1]) == pytest.approx((1 - 4.99 / (5 * 1.4**0.5)) ** 7, rel=1e-9)
    assert bool(torch.isfinite(torch.stack((p, u))).all())


def test_vacuum_and_bad_input():
    with pytest.raises(InputError, match=r"case 1 move apart at 20 and a vacuum opens .* below 11\.83"):
        riemann_star(torch.tensor([[1.0, 0, 1], [1, -10, 1]]), torch.tensor([[1.0, 0, 1], [1, 10, 1]]), gamma=1.4)
    with pytest.raises(InputError, match="positive"):
        riemann_star(torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 0, 1]]))
    with pytest.raises(InputError, match="gamma is above 1, got 1"):
        riemann_star(LEFT, RIGHT, gamma=1.0)


def test_shapes(unchecked):
    with pytest.raises(ShapeError, match=r"\(n, 3\), two of one shape"):
        riemann_star(LEFT, RIGHT[:2])
