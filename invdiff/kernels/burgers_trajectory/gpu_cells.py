"""Eight neighbouring cells in a lane: what the Triton versions of Burgers' trajectories are made of.

Lane l holds the averages of the cells 8 l to 8 l + 7 in eight tensors x0 to x7. Neighbours within a lane are other
variables; two cells on either side (a2, a1 and b0, b1) come from the lanes beside it, which one warp does by shuffles.
The last lane, N // 8 or one less, holds R of its cells, 1 to 8; its other cells and the lanes after it are dead: what
they hold is finite where the solution is, and nothing alive reads it.
"""

import triton
import triton.language as tl

CELLS = 8
"""Cells of a lane."""


@triton.jit  # type: ignore[untyped-decorator]
def load(pointer, lane, N: tl.constexpr, REPEAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of a lane's cells, zero for dead ones; each value in memory is that of REPEAT neighbouring cells."""
    i = 8 * lane
    x0 = tl.load(pointer + i // REPEAT, mask=i < N, other=0.0)
    x1 = tl.load(pointer + (i + 1) // REPEAT, mask=i + 1 < N, other=0.0)
    x2 = tl.load(pointer + (i + 2) // REPEAT, mask=i + 2 < N, other=0.0)
    x3 = tl.load(pointer + (i + 3) // REPEAT, mask=i + 3 < N, other=0.0)
    x4 = tl.load(pointer + (i + 4) // REPEAT, mask=i + 4 < N, other=0.0)
    x5 = tl.load(pointer + (i + 5) // REPEAT, mask=i + 5 < N, other=0.0)
    x6 = tl.load(pointer + (i + 6) // REPEAT, mask=i + 6 < N, other=0.0)
    x7 = tl.load(pointer + (i + 7) // REPEAT, mask=i + 7 < N, other=0.0)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit  # type: ignore[untyped-decorator]
def store(pointer, lane, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write living cells in their order."""
    i = 8 * lane
    tl.store(pointer + i, x0, mask=i < N)
    tl.store(pointer + i + 1, x1, mask=i + 1 < N)
    tl.store(pointer + i + 2, x2, mask=i + 2 < N)
    tl.store(pointer + i + 3, x3, mask=i + 3 < N)
    tl.store(pointer + i + 4, x4, mask=i + 4 < N)
    tl.store(pointer + i + 5, x5, mask=i + 5 < N)
    tl.store(pointer + i + 6, x6, mask=i + 6 < N)
    tl.store(pointer + i + 7, x7, mask=i + 7 < N)


@triton.jit  # type: ignore[untyped-decorator]
def living(lane, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Set dead cells to zero."""
    i = 8 * lane
    x0 = tl.where(i < N, x0, 0.0)
    x1 = tl.where(i + 1 < N, x1, 0.0)
    x2 = tl.where(i + 2 < N, x2, 0.0)
    x3 = tl.where(i + 3 < N, x3, 0.0)
    x4 = tl.where(i + 4 < N, x4, 0.0)
    x5 = tl.where(i + 5 < N, x5, 0.0)
    x6 = tl.where(i + 6 < N, x6, 0.0)
    x7 = tl.where(i + 7 < N, x7, 0.0)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def add(x0, x1, x2, x3, x4, x5, x6, x7, s, y0, y1, y2, y3, y4, y5, y6, y7):  # type: ignore[no-untyped-def]
    """Return x + s y."""
    return x0 + s * y0, x1 + s * y1, x2 + s * y2, x3 + s * y3, x4 + s * y4, x5 + s * y5, x6 + s * y6, x7 + s * y7


@triton.jit
def _fastest(x):  # type: ignore[no-untyped-def]
    x = tl.abs(x)
    return tl.where(x == x, x, 0.0)  # NaN counts as nothing


@triton.jit  # type: ignore[untyped-decorator]
def largest(lane, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Largest size of a living cell's value, in float64."""
    x0, x1, x2, x3, x4, x5, x6, x7 = living(lane, x0, x1, x2, x3, x4, x5, x6, x7, N)
    low = tl.maximum(tl.maximum(_fastest(x0), _fastest(x1)), tl.maximum(_fastest(x2), _fastest(x3)))
    high = tl.maximum(tl.maximum(_fastest(x4), _fastest(x5)), tl.maximum(_fastest(x6), _fastest(x7)))
    return tl.max(tl.maximum(low, high), axis=0).to(tl.float64)


@triton.jit  # type: ignore[untyped-decorator]
def pick(x0, x1, x2, x3, x4, x5, x6, x7, x8, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """One of nine by its number."""
    x = x0
    if K == 1:
        x = x1
    if K == 2:
        x = x2
    if K == 3:
        x = x3
    if K == 4:
        x = x4
    if K == 5:
        x = x5
    if K == 6:
        x = x6
    if K == 7:
        x = x7
    if K == 8:
        x = x8
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _beyond(x, last, g0, g1, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """Put the first ghost (K = 0), the second (K = 1) or nothing (K > 1) into a variable of the last lane."""
    if K == 0:
        x = tl.where(last, g0, x)
    if K == 1:
        x = tl.where(last, g1, x)
    if K > 1:
        x = tl.where(last, 0.0, x)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def beside(lane, N: tl.constexpr, PERIODIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Lanes to the left and to the right: a dead lane's is itself, so that zeros stay zeros there."""
    LAST: tl.constexpr = (N - 1) // 8
    left, right = lane - 1, lane + 1
    if PERIODIC:
        left, right = tl.where(lane == 0, LAST, left), tl.where(lane == LAST, 0, right)
    else:
        left, right = tl.maximum(left, 0), tl.where(lane == LAST, LAST, right)
    return tl.where(lane > LAST, lane, left), tl.where(lane > LAST, lane, right)


@triton.jit  # type: ignore[untyped-decorator]
def surrounded(lane, x0, x1, x2, x3, x4, x5, x6, x7, N: tl.constexpr, PERIODIC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cells with two more on either side; ghosts hold the odd or the periodic continuation."""
    LAST: tl.constexpr = (N - 1) // 8
    R: tl.constexpr = N - 8 * LAST
    left, right = beside(lane, N, PERIODIC)
    a2, a1 = tl.gather(x6, left, 0), tl.gather(x7, left, 0)
    first, last = lane == 0, lane == LAST
    # Cells N - 1 and N - 2 in the last lane, which for R = 1 are its first and its neighbour's last.
    t1 = pick(x0, x1, x2, x3, x4, x5, x6, x7, x7, R - 1)
    t2 = a1
    if R > 1:
        t2 = pick(x0, x1, x2, x3, x4, x5, x6, x7, x7, R - 2)
    g0, g1 = -t1, -t2
    if PERIODIC:
        if R < 8:  # else the lanes beside do
            begin, end = tl.zeros_like(lane), tl.full(lane.shape, LAST, lane.dtype)
            g0, g1 = tl.gather(x0, begin, 0), tl.gather(x1, begin, 0)
            a1, a2 = tl.where(first, tl.gather(t1, end, 0), a1), tl.where(first, tl.gather(t2, end, 0), a2)
    else:
        a1, a2 = tl.where(first, -x0, a1), tl.where(first, -x1, a2)
    if R < 8:
        if R < 2:
            x1 = _beyond(x1, last, g0, g1, 1 - R)
        if R < 3:
            x2 = _beyond(x2, last, g0, g1, 2 - R)
        if R < 4:
            x3 = _beyond(x3, last, g0, g1, 3 - R)
        if R < 5:
            x4 = _beyond(x4, last, g0, g1, 4 - R)
        if R < 6:
            x5 = _beyond(x5, last, g0, g1, 5 - R)
        if R < 7:
            x6 = _beyond(x6, last, g0, g1, 6 - R)
        x7 = _beyond(x7, last, g0, g1, 7 - R)
    # Now, because for R = 1 the lane before the last sees a ghost.
    b0, b1 = tl.gather(x0, right, 0), tl.gather(x1, right, 0)
    if R < 8 or not PERIODIC:  # else the lanes beside do
        b0, b1 = _beyond(b0, last, g0, g1, 8 - R), _beyond(b1, last, g0, g1, 9 - R)
    return a2, a1, x0, x1, x2, x3, x4, x5, x6, x7, b0, b1


@triton.jit
def _flux(a, b, c, d, bend, spread):  # type: ignore[no-untyped-def]
    """Flux over the width at the face between b and c: bend (12 v)^2 - spread (12 h g)."""
    v = 7.0 * (b + c) - (a + d)
    return v * v * bend - spread * (15.0 * (c - b) - (d - a))


@triton.jit  # type: ignore[untyped-decorator]
def slope(  # type: ignore[no-untyped-def]
    lane, x0, x1, x2, x3, x4, x5, x6, x7, f0, f1, f2, f3, f4, f5, f6, f7, bend, spread,
    N: tl.constexpr, PERIODIC: tl.constexpr,
):  # fmt: skip
    """Right-hand side of the scheme."""
    a2, a1, x0, x1, x2, x3, x4, x5, x6, x7, b0, b1 = surrounded(lane, x0, x1, x2, x3, x4, x5, x6, x7, N, PERIODIC)
    q0, q1 = _flux(a2, a1, x0, x1, bend, spread), _flux(a1, x0, x1, x2, bend, spread)
    q2, q3 = _flux(x0, x1, x2, x3, bend, spread), _flux(x1, x2, x3, x4, bend, spread)
    q4, q5 = _flux(x2, x3, x4, x5, bend, spread), _flux(x3, x4, x5, x6, bend, spread)
    q6, q7 = _flux(x4, x5, x6, x7, bend, spread), _flux(x5, x6, x7, b0, bend, spread)
    q8 = _flux(x6, x7, b0, b1, bend, spread)
    return (
        f0 - (q1 - q0),
        f1 - (q2 - q1),
        f2 - (q3 - q2),
        f3 - (q4 - q3),
        f4 - (q5 - q4),
        f5 - (q6 - q5),
        f6 - (q7 - q6),
        f7 - (q8 - q7),
    )


@triton.jit  # type: ignore[untyped-decorator]
def step(  # type: ignore[no-untyped-def]
    lane, u0, u1, u2, u3, u4, u5, u6, u7, f0, f1, f2, f3, f4, f5, f6, f7, dt, bend, spread,
    N: tl.constexpr, PERIODIC: tl.constexpr,
):  # fmt: skip
    """One step of the classical Runge-Kutta method."""
    x0, x1, x2, x3, x4, x5, x6, x7 = u0, u1, u2, u3, u4, u5, u6, u7
    s0, s1, s2, s3, s4, s5, s6, s7 = u0, u1, u2, u3, u4, u5, u6, u7
    for stage in tl.static_range(4):
        k0, k1, k2, k3, k4, k5, k6, k7 = slope(
            lane, x0, x1, x2, x3, x4, x5, x6, x7, f0, f1, f2, f3, f4, f5, f6, f7, bend, spread, N, PERIODIC
        )
        weight, ahead = dt / 6.0, dt * 0.5
        if stage == 1 or stage == 2:  # Triton has no "in"
            weight = dt / 3.0
        if stage == 2:
            ahead = dt
        s0, s1, s2, s3, s4, s5, s6, s7 = add(
            s0, s1, s2, s3, s4, s5, s6, s7, weight, k0, k1, k2, k3, k4, k5, k6, k7
        )  # fmt: skip
        if stage < 3:
            x0, x1, x2, x3, x4, x5, x6, x7 = add(
                u0, u1, u2, u3, u4, u5, u6, u7, ahead, k0, k1, k2, k3, k4, k5, k6, k7
            )  # fmt: skip
    return s0, s1, s2, s3, s4, s5, s6, s7
