"""Compressible flow in Triton: a program makes a whole trajectory, its state on the chip from the first step on.

A lane holds a cell and the face to its left; where ends are not joined, one lane more holds the last face. Neighbours
are gathered between lanes. Steps, and the choice of their number, are as in `reference`, made inside of the kernel, so
that nothing waits for the host.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from invdiff.kernels.flow_trajectory.scheme import BOUNDARIES, LIMIT, MOST, START

_PERIODIC, _WALL = tl.constexpr(BOUNDARIES.index("periodic")), tl.constexpr(BOUNDARIES.index("wall"))


@triton.jit
def _half_slope(low, here, high):  # type: ignore[no-untyped-def]
    a, b = here - low, high - here
    ab = a * b
    alike = ab > 0
    return tl.where(alike, ab / tl.where(alike, a + b, 1.0), 0.0)


@triton.jit
def _hllc(rl, ul, pl, rr, ur, pr, gamma, gamma1):  # type: ignore[no-untyped-def]
    al, ar = gamma * pl / rl, gamma * pr / rr
    w, z = tl.sqrt(rl), tl.sqrt(rr)
    q = 1.0 / (w + z)
    roe, jump = (w * ul + z * ur) * q, q * (ur - ul)
    c = tl.sqrt((w * al + z * ar) * q + 0.5 * gamma1 * w * z * jump * jump)
    low, high = tl.minimum(ul - tl.sqrt(al), roe - c), tl.maximum(ur + tl.sqrt(ar), roe + c)
    ml, mr = rl * (low - ul), rr * (high - ur)
    star = (pr - pl + ml * ul - mr * ur) / (ml - mr)
    left = star >= 0
    r, u, p = tl.where(left, rl, rr), tl.where(left, ul, ur), tl.where(left, pl, pr)
    S = tl.where(left, tl.minimum(low, 0.0), tl.maximum(high, 0.0))
    m, E = r * (S - u), p / gamma1 + 0.5 * r * u * u
    at_star, v = p + m * (star - u), star / (S - star)
    mass = m * v
    return mass, mass * star + at_star, v * ((S - u) * E - p * u + at_star * S)


@triton.jit
def _primitive(r, m, E, gamma, gamma1, mu2_h, cell):  # type: ignore[no-untyped-def]
    """Return velocity, pressure, the fastest signal's speed, infinite if a cell is bad, and 1 for bad cells."""
    u = m / r
    p = gamma1 * (E - 0.5 * m * u)
    speed = tl.abs(u) + tl.sqrt(gamma * p / r) + mu2_h / r
    good = (r > 0) & (p > 0) & (speed < float("inf"))
    speed = tl.where(cell, tl.where(good, speed, float("inf")), 0.0)
    return u, p, tl.max(speed, 0).to(tl.float64), (cell & (good == 0)).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _stage(r, u, p, i, N, gamma, gamma1, mu_h, per_h, BOUNDARY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the time derivative of density, momentum and energy."""
    if BOUNDARY == _PERIODIC:
        before, after = tl.where(i == 0, N - 1, i - 1), tl.where(i < N - 1, i + 1, 0)
        face = after
    else:
        before = tl.where(i == 0, 0, i - 1)
        after = tl.where(i < N - 1, i + 1, tl.where(i < N, N - 1, i))
        face = tl.where(i < N, i + 1, i)
    first, beyond = i == 0, i == N
    r_low, u_low, p_low = tl.gather(r, before, 0), tl.gather(u, before, 0), tl.gather(p, before, 0)
    r_high, u_high, p_high = tl.gather(r, after, 0), tl.gather(u, after, 0), tl.gather(p, after, 0)
    if BOUNDARY == _WALL:
        u_high = tl.where(i == N - 1, -u_high, u_high)
        u_right = tl.where(beyond, -u_low, u)
        u_low = tl.where(first, -u_low, u_low)
    elif BOUNDARY == _PERIODIC:
        u_right = u
    else:
        u_right = tl.where(beyond, u_low, u)
    sr, su, sp = _half_slope(r_low, r, r_high), _half_slope(u_low, u, u_high), _half_slope(p_low, p, p_high)
    rr, ur, pr = r - sr, u - su, p - sp
    rl, ul, pl = tl.gather(r + sr, before, 0), tl.gather(u + su, before, 0), tl.gather(p + sp, before, 0)
    if BOUNDARY == _WALL:
        rl, ul, pl = tl.where(first, rr, rl), tl.where(first, -ur, ul), tl.where(first, pr, pl)
        rr, ur, pr = tl.where(beyond, rl, rr), tl.where(beyond, -ul, ur), tl.where(beyond, pl, pr)
    elif BOUNDARY != _PERIODIC:
        rl, ul, pl = tl.where(first, r, rl), tl.where(first, u, ul), tl.where(first, p, pl)
        rr, ur, pr = tl.where(beyond, r_low, rr), tl.where(beyond, u_low, ur), tl.where(beyond, p_low, pr)
    mass, momentum, energy = _hllc(rl, ul, pl, rr, ur, pr, gamma, gamma1)
    tau = mu_h * (u_right - u_low)
    momentum, energy = momentum - tau, energy - 0.5 * tau * (u_low + u_right)
    return (
        (mass - tl.gather(mass, face, 0)) * per_h,
        (momentum - tl.gather(momentum, face, 0)) * per_h,
        (energy - tl.gather(energy, face, 0)) * per_h,
    )


@triton.jit(do_not_specialize=["windows", "steps"])  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    states, counts, numbers, windows, N, steps, BOUNDARY: tl.constexpr, B: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, B)
    cell = i < N
    kind = states.dtype.element_ty
    h, window, limit = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    start_at, most = tl.load(numbers + 3), tl.load(numbers + 4)
    gamma, gamma1 = tl.load(numbers + 5).to(kind), tl.load(numbers + 6).to(kind)
    mu_h, mu2_h, per_h = tl.load(numbers + 7).to(kind), tl.load(numbers + 8).to(kind), tl.load(numbers + 9).to(kind)
    here = states + n * (windows + 1) * 3 * N
    # Lanes without a cell hold a gas at rest.
    r = tl.load(here + i, mask=cell, other=1.0)
    m = tl.load(here + N + i, mask=cell, other=0.0)
    E = tl.load(here + 2 * N + i, mask=cell, other=1.0)
    over = tl.full((), 0.0, tl.float64)
    for t in range(windows):
        r0, m0, E0 = r, m, E
        _, _, speed, _ = _primitive(r, m, E, gamma, gamma1, mu2_h, cell)
        wanted = window * (speed / h) / start_at
        count = tl.where(wanted < most, -tl.floor(-tl.minimum(wanted, most)), 1.0).to(tl.int64)
        count = tl.where(steps > 0, steps, tl.maximum(count, 1)).to(tl.int64)
        seen = tl.full((), 0.0, tl.float64)
        lost = tl.zeros((B,), tl.int32)
        again = count > 0
        while again:
            r, m, E = r0, m0, E0
            seen = tl.full((), 0.0, tl.float64)
            lost = tl.zeros((B,), tl.int32)
            dt = (window / count.to(tl.float64)).to(kind)
            k = count - count
            while (k < count) & (seen == 0):
                u, p, speed, bad = _primitive(r, m, E, gamma, gamma1, mu2_h, cell)
                rate = speed / h
                ends = (rate * window > limit * count.to(tl.float64)) | (rate == float("inf"))
                seen = tl.where(ends, rate, seen)
                lost += bad * ends.to(tl.int32)
                dr, dm, dE = _stage(r, u, p, i, N, gamma, gamma1, mu_h, per_h, BOUNDARY)
                r1 = tl.where(cell, r + dt * dr, 1.0)
                m1 = tl.where(cell, m + dt * dm, 0.0)
                E1 = tl.where(cell, E + dt * dE, 1.0)
                u, p, speed, bad = _primitive(r1, m1, E1, gamma, gamma1, mu2_h, cell)
                rate = speed / h
                ends = (rate * window > limit * count.to(tl.float64)) | (rate == float("inf"))
                ends = ends & (seen == 0)
                seen = tl.where(ends, rate, seen)
                lost += bad * ends.to(tl.int32)
                dr, dm, dE = _stage(r1, u, p, i, N, gamma, gamma1, mu_h, per_h, BOUNDARY)
                going = tl.where(cell, seen, 1.0) == 0
                r = tl.where(going, 0.5 * (r + (r1 + dt * dr)), r)
                m = tl.where(going, 0.5 * (m + (m1 + dt * dm)), m)
                E = tl.where(going, 0.5 * (E + (E1 + dt * dE)), E)
                k += 1
            wanted = window * seen / start_at
            again = (seen > 0) & (wanted < most)
            count = tl.where(again, -tl.floor(-tl.minimum(wanted, most)).to(tl.int64), count)
        hopeless = (seen > 0) & (seen < float("inf"))
        gone = lost + tl.where(hopeless | (over > 0), 1, 0) > 0
        r, m, E = tl.where(gone, float("nan"), r), tl.where(gone, float("nan"), m), tl.where(gone, float("nan"), E)
        over = over + tl.where(seen > 0, 1.0, 0.0)
        tl.store(counts + n * windows + t, count)
        here += 3 * N
        tl.store(here + i, r, mask=cell)
        tl.store(here + N + i, m, mask=cell)
        tl.store(here + 2 * N + i, E, mask=cell)


def flow_trajectory(
    U: Tensor, h: float, gamma: float, mu: float, window: float, windows: int, steps: int, boundary: str
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, 3, N) and steps of each window (n, windows); see `kernels.flow_trajectory`."""
    n, _, N = U.shape
    states = torch.empty(n, windows + 1, 3, N, dtype=U.dtype, device=U.device)
    counts = torch.empty(n, windows, dtype=torch.int64, device=U.device)
    states[:, 0] = U
    if not n:
        return states, counts
    limit = torch.inf if steps else LIMIT
    numbers = [h, window, limit, START, MOST, gamma, gamma - 1.0, mu / h, 2.0 * mu / h, 1.0 / h]
    block = max(32, triton.next_power_of_2(N if boundary == "periodic" else N + 1))
    with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        _kernel[(n,)](
            states,
            counts,
            torch.tensor(numbers, dtype=torch.float64, device=U.device),
            windows,
            N,
            steps,
            BOUNDARY=BOUNDARIES.index(boundary),
            B=block,
            # Two warps or more: within one, a gather is made of shuffles, as many as the square of a lane's cells.
            num_warps=min(16, max(2, block // 128)),
        )
    return states, counts
