"""Burgers trajectories in Triton: a program solves one whole trajectory, its state in registers, forward and back.

The layout of cells is that of `gpu_cells`; up to 256 cells are one warp's, which needs no barrier. Backwards, a window
is run again from its stored start with the state of every step kept in memory, and the steps are undone one by one: the
exact adjoint of the discrete scheme, as in `cpu`.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from invdiff.kernels.burgers_trajectory.gpu_cells import (
    CELLS,
    add,
    beside,
    largest,
    living,
    load,
    pick,
    slope,
    step,
    store,
    surrounded,
)
from invdiff.kernels.burgers_trajectory.scheme import IMAGINARY, MARGIN, REAL

SCRATCH = 2**29
"""Bytes that the adjoint may take for the steps of a window."""


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    out, counts, u, f, numbers, windows,
    N: tl.constexpr, REPEAT: tl.constexpr, PERIODIC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    bend, spread = tl.load(numbers).to(u.dtype.element_ty), tl.load(numbers + 1).to(u.dtype.element_ty)
    window, real, imaginary = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    margin, given = tl.load(numbers + 5), tl.load(numbers + 6)
    u0, u1, u2, u3, u4, u5, u6, u7 = load(u + n * N, lane, N, 1)
    to = out + n * (windows + 1) * N
    store(to, lane, u0, u1, u2, u3, u4, u5, u6, u7, N)
    for t in range(windows):
        f0, f1, f2, f3, f4, f5, f6, f7 = load(f + (n * windows + t) * (N // REPEAT), lane, N, REPEAT)
        speed = largest(lane, u0, u1, u2, u3, u4, u5, u6, u7, N)
        speed += window * largest(lane, f0, f1, f2, f3, f4, f5, f6, f7, N)
        wave = imaginary * tl.minimum(speed, 1e6)
        needed = tl.maximum(tl.ceil(window * tl.sqrt(real * real + wave * wave) / margin), 1.0)
        needed = tl.where(given > 0.0, given, needed)
        dt = (window / needed).to(u.dtype.element_ty)
        count = needed.to(tl.int64)
        tl.store(counts + n * windows + t, count)
        for _ in range(count):
            u0, u1, u2, u3, u4, u5, u6, u7 = step(
                lane, u0, u1, u2, u3, u4, u5, u6, u7, f0, f1, f2, f3, f4, f5, f6, f7, dt, bend, spread, N, PERIODIC
            )
        to += N
        store(to, lane, u0, u1, u2, u3, u4, u5, u6, u7, N)


@triton.jit  # type: ignore[untyped-decorator]
def _keep(pointer, lane, x0, x1, x2, x3, x4, x5, x6, x7, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write all cells, dead ones too, as the scratch has them: lanes side by side."""
    tl.store(pointer + lane, x0)
    tl.store(pointer + LANES + lane, x1)
    tl.store(pointer + 2 * LANES + lane, x2)
    tl.store(pointer + 3 * LANES + lane, x3)
    tl.store(pointer + 4 * LANES + lane, x4)
    tl.store(pointer + 5 * LANES + lane, x5)
    tl.store(pointer + 6 * LANES + lane, x6)
    tl.store(pointer + 7 * LANES + lane, x7)


@triton.jit  # type: ignore[untyped-decorator]
def _kept(pointer, lane, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read what `_keep` wrote."""
    x0, x1 = tl.load(pointer + lane), tl.load(pointer + LANES + lane)
    x2, x3 = tl.load(pointer + 2 * LANES + lane), tl.load(pointer + 3 * LANES + lane)
    x4, x5 = tl.load(pointer + 4 * LANES + lane), tl.load(pointer + 5 * LANES + lane)
    x6, x7 = tl.load(pointer + 6 * LANES + lane), tl.load(pointer + 7 * LANES + lane)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _face(a, b, c, d, bar, bend, spread):  # type: ignore[no-untyped-def]
    """Shares of the cells a, b, c and d in a face's flux, times its cotangent."""
    s = (2.0 * bend) * (7.0 * (b + c) - (a + d)) * bar
    g = -spread * bar
    return g - s, 7.0 * s - 15.0 * g, 7.0 * s + 15.0 * g, -s - g


@triton.jit  # type: ignore[untyped-decorator]
def _mirror(z, last, e1, e2, K: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add e1 to cell N - 1 and e2 to cell N - 2 where the last lane's variable K is one of them."""
    if K == R - 1:
        z = tl.where(last, z + e1, z)
    if K == R - 2:
        z = tl.where(last, z + e2, z)
    return z


@triton.jit  # type: ignore[untyped-decorator]
def _back(  # type: ignore[no-untyped-def]
    lane, y0, y1, y2, y3, y4, y5, y6, y7, w0, w1, w2, w3, w4, w5, w6, w7, bend, spread,
    N: tl.constexpr, PERIODIC: tl.constexpr,
):  # fmt: skip
    """J(y)^T w for the slope at y; dead cells of w are zero, and so are those of the result."""
    LAST: tl.constexpr = (N - 1) // 8
    R: tl.constexpr = N - 8 * LAST
    p2, p1, x0, x1, x2, x3, x4, x5, x6, x7, x8, x9 = surrounded(lane, y0, y1, y2, y3, y4, y5, y6, y7, N, PERIODIC)
    left, right = beside(lane, N, False)  # noqa: FBT003
    first, last = lane == 0, lane == LAST
    before, after = tl.where(first, 0.0, tl.gather(w7, left, 0)), tl.where(last, 0.0, tl.gather(w0, right, 0))
    # Face k lies before cell k; of faces in both of two lanes each lane counts its own cells' shares.
    a0, b0, c0, d0 = _face(p2, p1, x0, x1, w0 - before, bend, spread)
    a1, b1, c1, d1 = _face(p1, x0, x1, x2, w1 - w0, bend, spread)
    a2, b2, c2, d2 = _face(x0, x1, x2, x3, w2 - w1, bend, spread)
    a3, b3, c3, d3 = _face(x1, x2, x3, x4, w3 - w2, bend, spread)
    a4, b4, c4, d4 = _face(x2, x3, x4, x5, w4 - w3, bend, spread)
    a5, b5, c5, d5 = _face(x3, x4, x5, x6, w5 - w4, bend, spread)
    a6, b6, c6, d6 = _face(x4, x5, x6, x7, w6 - w5, bend, spread)
    a7, b7, c7, d7 = _face(x5, x6, x7, x8, w7 - w6, bend, spread)
    a8, b8, c8, d8 = _face(x6, x7, x8, x9, after - w7, bend, spread)
    d = tl.where(first, 0.0, tl.gather(d7, left, 0))
    a9 = tl.where(last, 0.0, tl.gather(a1, right, 0))
    z0, z1, z2, z3 = d + c0 + b1 + a2, d0 + c1 + b2 + a3, d1 + c2 + b3 + a4, d2 + c3 + b4 + a5
    z4, z5, z6, z7 = d3 + c4 + b5 + a6, d4 + c5 + b6 + a7, d5 + c6 + b7 + a8, d6 + c7 + b8 + a9
    # What the ghosts got goes to the cells that they continue: -1 and -2, then N and N + 1.
    low1, low2 = b0 + a1, a0
    high1 = pick(d0, d0, d1, d2, d3, d4, d5, d6, d7, R) + pick(c0, c1, c2, c3, c4, c5, c6, c7, c8, R)
    high2 = pick(d0, d1, d2, d3, d4, d5, d6, d7, d8, R)
    if PERIODIC:
        begin, end = tl.zeros_like(lane), tl.full(lane.shape, LAST, lane.dtype)
        e1, e2 = tl.gather(low1, begin, 0), tl.gather(low2, begin, 0)
        s0, s1 = tl.gather(high1, end, 0), tl.gather(high2, end, 0)
    else:
        e1, e2, s0, s1 = -high1, -high2, -low1, -low2
    z0, z1 = tl.where(first, z0 + s0, z0), tl.where(first, z1 + s1, z1)
    z0, z1 = _mirror(z0, last, e1, e2, 0, R), _mirror(z1, last, e1, e2, 1, R)
    z2, z3 = _mirror(z2, last, e1, e2, 2, R), _mirror(z3, last, e1, e2, 3, R)
    z4, z5 = _mirror(z4, last, e1, e2, 4, R), _mirror(z5, last, e1, e2, 5, R)
    z6, z7 = _mirror(z6, last, e1, e2, 6, R), _mirror(z7, last, e1, e2, 7, R)
    if R == 1:  # cell N - 2 is in the lane before
        z7 = tl.where(lane == LAST - 1, z7 + tl.gather(e2, right, 0), z7)
    if R < 8:
        z0, z1, z2, z3, z4, z5, z6, z7 = living(lane, z0, z1, z2, z3, z4, z5, z6, z7, N)
    return z0, z1, z2, z3, z4, z5, z6, z7


@triton.jit  # type: ignore[untyped-decorator]
def _stage(  # type: ignore[no-untyped-def]
    lane, y0, y1, y2, y3, y4, y5, y6, y7, g0, g1, g2, g3, g4, g5, g6, g7, z0, z1, z2, z3, z4, z5, z6, z7,
    r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7, weight, carry, bend, spread,
    N: tl.constexpr, PERIODIC: tl.constexpr,
):  # fmt: skip
    """Undo a stage at y: with w = weight g + carry z and z its J(y)^T w, w joins s and z joins r."""
    w0, w1, w2 = weight * g0 + carry * z0, weight * g1 + carry * z1, weight * g2 + carry * z2
    w3, w4, w5 = weight * g3 + carry * z3, weight * g4 + carry * z4, weight * g5 + carry * z5
    w6, w7 = weight * g6 + carry * z6, weight * g7 + carry * z7
    z0, z1, z2, z3, z4, z5, z6, z7 = _back(
        lane, y0, y1, y2, y3, y4, y5, y6, y7, w0, w1, w2, w3, w4, w5, w6, w7, bend, spread, N, PERIODIC
    )
    r0, r1, r2, r3, r4, r5, r6, r7 = r0 + z0, r1 + z1, r2 + z2, r3 + z3, r4 + z4, r5 + z5, r6 + z6, r7 + z7
    s0, s1, s2, s3, s4, s5, s6, s7 = s0 + w0, s1 + w1, s2 + w2, s3 + w3, s4 + w4, s5 + w5, s6 + w6, s7 + w7
    return (
        z0, z1, z2, z3, z4, z5, z6, z7, r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _backward(  # type: ignore[no-untyped-def]
    u_bar, cells_bar, scratch, states, f, counts, bar, numbers, windows, most,
    N: tl.constexpr, REPEAT: tl.constexpr, PERIODIC: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    n, lane = tl.program_id(0).to(tl.int64), tl.arange(0, LANES)
    bend, spread = tl.load(numbers).to(states.dtype.element_ty), tl.load(numbers + 1).to(states.dtype.element_ty)
    window = tl.load(numbers + 2)
    own = scratch + n * most * (8 * LANES)
    row = n * (windows + 1) * N
    g0, g1, g2, g3, g4, g5, g6, g7 = load(bar + row + windows * N, lane, N, 1)
    for back in range(windows):
        t = windows - 1 - back
        count = tl.load(counts + n * windows + t)
        dt = (window / count.to(tl.float64)).to(states.dtype.element_ty)
        f0, f1, f2, f3, f4, f5, f6, f7 = load(f + (n * windows + t) * (N // REPEAT), lane, N, REPEAT)
        u0, u1, u2, u3, u4, u5, u6, u7 = load(states + row + t * N, lane, N, 1)
        _keep(own, lane, u0, u1, u2, u3, u4, u5, u6, u7, LANES)
        for m in range(1, count):
            u0, u1, u2, u3, u4, u5, u6, u7 = step(
                lane, u0, u1, u2, u3, u4, u5, u6, u7, f0, f1, f2, f3, f4, f5, f6, f7, dt, bend, spread, N, PERIODIC
            )
            _keep(own + m * (8 * LANES), lane, u0, u1, u2, u3, u4, u5, u6, u7, LANES)
        tl.debug_barrier()  # what is read below was written above
        s0, s1, s2, s3 = tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0)
        s4, s5, s6, s7 = tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0)
        for undone in range(count):
            kept = own + (count - 1 - undone) * (8 * LANES)
            u0, u1, u2, u3, u4, u5, u6, u7 = _kept(kept, lane, LANES)
            k0, k1, k2, k3, k4, k5, k6, k7 = slope(
                lane, u0, u1, u2, u3, u4, u5, u6, u7, f0, f1, f2, f3, f4, f5, f6, f7, bend, spread, N, PERIODIC
            )
            x0, x1, x2, x3, x4, x5, x6, x7 = add(
                u0, u1, u2, u3, u4, u5, u6, u7, 0.5 * dt, k0, k1, k2, k3, k4, k5, k6, k7
            )  # fmt: skip
            k0, k1, k2, k3, k4, k5, k6, k7 = slope(
                lane, x0, x1, x2, x3, x4, x5, x6, x7, f0, f1, f2, f3, f4, f5, f6, f7, bend, spread, N, PERIODIC
            )
            y0, y1, y2, y3, y4, y5, y6, y7 = add(
                u0, u1, u2, u3, u4, u5, u6, u7, 0.5 * dt, k0, k1, k2, k3, k4, k5, k6, k7
            )  # fmt: skip
            k0, k1, k2, k3, k4, k5, k6, k7 = slope(
                lane, y0, y1, y2, y3, y4, y5, y6, y7, f0, f1, f2, f3, f4, f5, f6, f7, bend, spread, N, PERIODIC
            )
            v0, v1, v2, v3, v4, v5, v6, v7 = add(
                u0, u1, u2, u3, u4, u5, u6, u7, dt, k0, k1, k2, k3, k4, k5, k6, k7
            )  # fmt: skip
            r0, r1, r2, r3, r4, r5, r6, r7 = g0, g1, g2, g3, g4, g5, g6, g7
            z0, z1, z2, z3 = tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0)
            z4, z5, z6, z7 = tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0), tl.zeros_like(g0)
            z0, z1, z2, z3, z4, z5, z6, z7, r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7 = _stage(
                lane, v0, v1, v2, v3, v4, v5, v6, v7, g0, g1, g2, g3, g4, g5, g6, g7, z0, z1, z2, z3, z4, z5, z6, z7,
                r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7, dt / 6.0, 0.5 * dt, bend, spread,
                N, PERIODIC,
            )  # fmt: skip
            z0, z1, z2, z3, z4, z5, z6, z7, r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7 = _stage(
                lane, y0, y1, y2, y3, y4, y5, y6, y7, g0, g1, g2, g3, g4, g5, g6, g7, z0, z1, z2, z3, z4, z5, z6, z7,
                r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7, dt / 3.0, dt, bend, spread,
                N, PERIODIC,
            )  # fmt: skip
            z0, z1, z2, z3, z4, z5, z6, z7, r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7 = _stage(
                lane, x0, x1, x2, x3, x4, x5, x6, x7, g0, g1, g2, g3, g4, g5, g6, g7, z0, z1, z2, z3, z4, z5, z6, z7,
                r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7, dt / 3.0, 0.5 * dt, bend, spread,
                N, PERIODIC,
            )  # fmt: skip
            z0, z1, z2, z3, z4, z5, z6, z7, r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7 = _stage(
                lane, u0, u1, u2, u3, u4, u5, u6, u7, g0, g1, g2, g3, g4, g5, g6, g7, z0, z1, z2, z3, z4, z5, z6, z7,
                r0, r1, r2, r3, r4, r5, r6, r7, s0, s1, s2, s3, s4, s5, s6, s7, dt / 6.0, 0.5 * dt, bend, spread,
                N, PERIODIC,
            )  # fmt: skip
            g0, g1, g2, g3, g4, g5, g6, g7 = r0, r1, r2, r3, r4, r5, r6, r7
        store(cells_bar + (n * windows + t) * N, lane, s0, s1, s2, s3, s4, s5, s6, s7, N)
        r0, r1, r2, r3, r4, r5, r6, r7 = load(bar + row + t * N, lane, N, 1)
        g0, g1, g2, g3, g4, g5, g6, g7 = add(g0, g1, g2, g3, g4, g5, g6, g7, 1.0, r0, r1, r2, r3, r4, r5, r6, r7)
        tl.debug_barrier()  # before the next window writes what was read
    store(u_bar + n * N, lane, g0, g1, g2, g3, g4, g5, g6, g7, N)


@lru_cache(maxsize=64)
def _numbers(h: float, nu: float, window: float, steps: int, device: torch.device) -> Tensor:
    """Bend and spread of a face's flux, window, what the steps' number takes; in float64, which no argument has."""
    numbers = [1 / (288 * h), nu / (12 * h * h), window, REAL * nu / (h * h), IMAGINARY / h, MARGIN, float(steps)]
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _lanes(N: int) -> tuple[int, int]:
    """Lanes of a program, a power of 2, and its warps."""
    lanes = max(32, triton.next_power_of_2(-(-N // CELLS)))
    return lanes, min(32, lanes // 32)


def burgers_trajectory(
    u: Tensor, f: Tensor, h: float, nu: float, window: float, steps: int, periodic: bool
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, N) and steps of each window (n, windows); see `kernels.burgers_trajectory`."""
    (n, N), (windows, points) = u.shape, f.shape[1:]
    out = torch.empty(n, windows + 1, N, dtype=u.dtype, device=u.device)
    counts = torch.empty(n, windows, dtype=torch.int64, device=u.device)
    if n:
        lanes, warps = _lanes(N)
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _forward[(n,)](
                out,
                counts,
                u.contiguous(),
                f.contiguous(),
                _numbers(h, nu, window, steps, u.device),
                windows,
                N=N,
                REPEAT=N // points,
                PERIODIC=periodic,
                LANES=lanes,
                num_warps=warps,
            )
    return out, counts


def adjoint(
    states: Tensor, f: Tensor, counts: Tensor, bar: Tensor, h: float, nu: float, window: float, periodic: bool
) -> tuple[Tensor, Tensor]:
    """Gradients by the initial averages (n, N) and the forcing (n, windows, points), of `bar` by all states.

    Waits for the device once, to know how many steps a window has at most.
    """
    n, _, N = states.shape
    windows, points = f.shape[1:]
    u_bar = torch.empty(n, N, dtype=states.dtype, device=states.device)
    f_bar = torch.empty(n, windows, points, dtype=states.dtype, device=states.device)
    if not n:
        return u_bar, f_bar
    lanes, warps = _lanes(N)
    most = int(counts.max()) if windows else 0
    together = max(1, SCRATCH // (states.element_size() * (most * CELLS * lanes + windows * N + 1)))
    states, f, bar = states.contiguous(), f.contiguous(), bar.contiguous()
    for i in range(0, n, together):
        part = slice(i, min(n, i + together))
        size = part.stop - i
        scratch = torch.empty(size, most, CELLS, lanes, dtype=states.dtype, device=states.device)
        cells_bar = torch.empty(size, windows, N, dtype=states.dtype, device=states.device)
        with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _backward[(size,)](
                u_bar[part],
                cells_bar,
                scratch,
                states[part],
                f[part],
                counts[part],
                bar[part],
                _numbers(h, nu, window, 0, states.device),
                windows,
                most,
                N=N,
                REPEAT=N // points,
                PERIODIC=periodic,
                LANES=lanes,
                num_warps=warps,
            )
        torch.sum(cells_bar.view(size, windows, points, N // points), -1, out=f_bar[part])
    return u_bar, f_bar
