"""Burgers trajectories compiled for a CPU: a trajectory's state stays in the first-level cache, forward and back.

Backwards, a window is run again from its stored start with the state of every step kept, and the steps are undone one
by one: the exact adjoint of the discrete scheme.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from invdiff.kernels.burgers_trajectory.scheme import IMAGINARY, MARGIN, REAL
from invdiff.kernels.threads import share


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    import numba
    import numpy as np

    fast = {"contract", "nsz"}

    @numba.njit(nogil=True, fastmath=fast, inline="always")
    def ends(p: Any, N: int, periodic: bool) -> None:
        if periodic:
            p[0], p[1] = p[N], p[N + 1]
            p[N + 2], p[N + 3] = p[2], p[3]
        else:
            p[0], p[1] = -p[3], -p[2]
            p[N + 2], p[N + 3] = -p[N + 1], -p[N]

    @numba.njit(nogil=True, fastmath=fast)
    def slope(p: Any, f: Any, q: Any, k: Any, numbers: Any, N: int, periodic: bool) -> None:
        """K (N) from padded averages p (N + 4); q (N + 1) is scratch."""
        ends(p, N, periodic)
        twelfth, per_12h, nu, per_h, half = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        seven, fifteen = numbers[5], numbers[6]
        # Views, whose indices need no check for negative ones, so that the loops become vector code.
        pa, pb, pc, pd = p[: N + 1], p[1 : N + 2], p[2 : N + 3], p[3 : N + 4]
        for i in range(N + 1):
            a, b, c, d = pa[i], pb[i], pc[i], pd[i]
            v = (seven * (b + c) - (a + d)) * twelfth
            q[i] = half * v * v - nu * ((fifteen * (c - b) - (d - a)) * per_12h)
        low, high = q[:N], q[1 : N + 1]
        for i in range(N):
            k[i] = f[i] - (high[i] - low[i]) * per_h

    @numba.njit(nogil=True, fastmath=fast)
    def back(p: Any, a: Any, s: Any, g: Any, out: Any, numbers: Any, N: int, periodic: bool) -> None:
        """Set out (N) to J(p)^T a for the slope at padded averages p, whose ends are set.

        a is (N + 2) with zeros at its ends. s and g (N + 7) are scratch: what the faces' fluxes say of the values v and
        the gradients at the faces, shifted by 3, zero beyond.
        """
        twelfth, per_12h, nu, per_h = numbers[0], numbers[1], numbers[2], numbers[3]
        seven, fifteen = numbers[5], numbers[6]
        s[:3] = s[N + 4 :] = g[:3] = g[N + 4 :] = 0
        pa, pb, pc, pd = p[: N + 1], p[1 : N + 2], p[2 : N + 3], p[3 : N + 4]
        low, high, sv, gv = a[: N + 1], a[1 : N + 2], s[3 : N + 4], g[3 : N + 4]
        for i in range(N + 1):
            bar = (high[i] - low[i]) * per_h
            v = (seven * (pb[i] + pc[i]) - (pa[i] + pd[i])) * twelfth
            sv[i], gv[i] = v * bar * twelfth, -nu * bar * per_12h
        # A padded value j enters the faces j - 3 (as d), j - 2 (c), j - 1 (b) and j (a).
        sd, sc, sb, sa = s[2 : N + 2], s[3 : N + 3], s[4 : N + 4], s[5 : N + 5]
        gd, gc, gb, ga = g[2 : N + 2], g[3 : N + 3], g[4 : N + 4], g[5 : N + 5]
        for i in range(N):
            out[i] = seven * (sc[i] + sb[i]) - (sd[i] + sa[i]) + fifteen * (gc[i] - gb[i]) - (gd[i] - ga[i])
        pad0 = -s[3] + g[3]
        pad1 = seven * s[3] - s[4] - fifteen * g[3] + g[4]
        top1 = -s[N + 3] - g[N + 3]
        top0 = seven * s[N + 3] - s[N + 2] + fifteen * g[N + 3] - g[N + 2]
        if periodic:
            out[N - 2] += pad0
            out[N - 1] += pad1
            out[0] += top0
            out[1] += top1
        else:
            out[1] -= pad0
            out[0] -= pad1
            out[N - 1] -= top0
            out[N - 2] -= top1

    @numba.njit(nogil=True, fastmath=fast)
    def step(p: Any, w: Any, f: Any, q: Any, k: Any, total: Any, dt: Any, numbers: Any, N: int, periodic: bool) -> None:
        """One step of the padded averages p in place; w, q, k and total are scratch."""
        half, two, sixth = numbers[4] * dt, 4 * numbers[4], dt / 6
        inner, shifted = p[2 : N + 2], w[2 : N + 2]
        slope(p, f, q, k, numbers, N, periodic)
        for i in range(N):
            total[i] = k[i]
            shifted[i] = inner[i] + half * k[i]
        slope(w, f, q, k, numbers, N, periodic)
        for i in range(N):
            total[i] += two * k[i]
            shifted[i] = inner[i] + half * k[i]
        slope(w, f, q, k, numbers, N, periodic)
        for i in range(N):
            total[i] += two * k[i]
            shifted[i] = inner[i] + dt * k[i]
        slope(w, f, q, k, numbers, N, periodic)
        for i in range(N):
            inner[i] += sixth * (total[i] + k[i])

    @numba.njit(nogil=True)
    def forward(
        u: Any, f: Any, out: Any, counts: Any, numbers: Any, h: Any, window: Any, steps: int, periodic: bool,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        N, windows, points = u.shape[1], f.shape[1], f.shape[2]
        repeat = N // points
        p, w, q, k = np.empty(N + 4, u.dtype), np.empty(N + 4, u.dtype), np.empty(N + 1, u.dtype), np.empty(N, u.dtype)
        total, fine = np.empty(N, u.dtype), np.empty(N, u.dtype)
        nu = np.float64(numbers[2])
        for n in range(start, stop):
            p[2 : N + 2] = u[n]
            out[n, 0] = u[n]
            for t in range(windows):
                speed, push = np.float64(0), np.float64(0)
                for i in range(N):
                    speed = max(speed, abs(np.float64(p[i + 2])))
                    fine[i] = f[n, t, i // repeat]
                    push = max(push, abs(np.float64(fine[i])))
                speed = min(speed + window * push, 1e6)
                count = steps
                if steps == 0:
                    rate = np.hypot(REAL * nu / (h * h), IMAGINARY * speed / h)
                    count = max(1, int(np.ceil(window * rate / MARGIN)))
                counts[n, t] = count
                dt = u.dtype.type(window / count)
                for _ in range(count):
                    step(p, w, fine, q, k, total, dt, numbers, N, periodic)
                out[n, t + 1] = p[2 : N + 2]

    @numba.njit(nogil=True)
    def backward(
        states: Any, f: Any, counts: Any, bar: Any, u_bar: Any, f_bar: Any, numbers: Any, window: Any, periodic: bool,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        N, windows, points = states.shape[2], f.shape[1], f.shape[2]
        repeat, kind = N // points, states.dtype
        w, q, total = np.empty(N + 4, kind), np.empty(N + 1, kind), np.empty(N, kind)
        y = np.empty((4, N + 4), kind)
        k, fine, g, z, fs = (
            np.empty(N, kind),
            np.empty(N, kind),
            np.empty(N, kind),
            np.empty(N, kind),
            np.empty(N, kind),
        )
        padded, s, r = np.zeros(N + 2, kind), np.empty(N + 7, kind), np.empty(N + 7, kind)
        a = padded[1 : N + 1]
        y1, y2, y3 = y[1, 2 : N + 2], y[2, 2 : N + 2], y[3, 2 : N + 2]
        for n in range(start, stop):
            g[:] = bar[n, windows]
            for t in range(windows - 1, -1, -1):
                count = counts[n, t]
                dt = states.dtype.type(window / count)
                half, third, sixth = dt / 2, dt / 3, dt / 6
                kept = np.empty((count, N + 4), kind)
                kept[0, 2 : N + 2] = states[n, t]
                fs[:] = 0
                for i in range(N):
                    fine[i] = f[n, t, i // repeat]
                for m in range(count - 1):
                    kept[m + 1] = kept[m]
                    step(kept[m + 1], w, fine, q, k, total, dt, numbers, N, periodic)
                for m in range(count - 1, -1, -1):
                    y[0] = kept[m]
                    y0 = kept[m, 2 : N + 2]
                    slope(y[0], fine, q, k, numbers, N, periodic)
                    for i in range(N):
                        y1[i] = y0[i] + half * k[i]
                    slope(y[1], fine, q, k, numbers, N, periodic)
                    for i in range(N):
                        y2[i] = y0[i] + half * k[i]
                    slope(y[2], fine, q, k, numbers, N, periodic)
                    for i in range(N):
                        y3[i] = y0[i] + dt * k[i]
                    ends(y[3], N, periodic)
                    # w_4 = J_4^T a_4 with a_4 = dt/6 g, then a_3 = dt/3 g + dt w_4, a_2 = dt/3 g + dt/2 w_3, ...
                    total[:] = g
                    z[:] = 0
                    for stage in range(3, -1, -1):
                        weight = sixth if stage == 0 or stage == 3 else third
                        carry = dt if stage == 2 else half
                        for i in range(N):
                            a[i] = weight * g[i] + carry * z[i]
                            fs[i] += a[i]
                        back(y[stage], padded, s, r, z, numbers, N, periodic)
                        for i in range(N):
                            total[i] += z[i]
                    g[:] = total
                for j in range(points):
                    found = fs[j * repeat]
                    for i in range(1, repeat):
                        found += fs[j * repeat + i]
                    f_bar[n, t, j] = found
                g += bar[n, t]
            u_bar[n] = g

    return forward, backward


def _numbers(h: float, nu: float, dtype: torch.dtype) -> Any:
    """1 / 12, 1 / (12 h), nu, 1 / h, 1 / 2, 7 and 15 in the state's precision."""
    return torch.tensor([1 / 12, 1 / (12 * h), nu, 1 / h, 0.5, 7.0, 15.0], dtype=torch.float64).to(dtype).numpy()


def burgers_trajectory(
    u: Tensor, f: Tensor, h: float, nu: float, window: float, steps: int, periodic: bool
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, N) and steps of each window (n, windows); see `kernels.burgers_trajectory`."""
    (n, N), windows = u.shape, f.shape[1]
    out = torch.empty(n, windows + 1, N, dtype=u.dtype)
    counts = torch.empty(n, windows, dtype=torch.int64)
    arrays = (u.contiguous().numpy(), f.contiguous().numpy(), out.numpy(), counts.numpy(), _numbers(h, nu, u.dtype))
    share(_compiled()[0], n, *arrays, float(h), float(window), steps, periodic)
    return out, counts


def adjoint(
    states: Tensor, f: Tensor, counts: Tensor, bar: Tensor, h: float, nu: float, window: float, periodic: bool
) -> tuple[Tensor, Tensor]:
    """Gradients by the initial averages (n, N) and the forcing (n, windows, points), of `bar` by all states."""
    u_bar, f_bar = torch.empty_like(states[:, 0]).contiguous(), torch.empty_like(f).contiguous()
    arrays = (states.contiguous().numpy(), f.contiguous().numpy(), counts.numpy(), bar.contiguous().numpy())
    results = (u_bar.numpy(), f_bar.numpy(), _numbers(h, nu, states.dtype))
    share(_compiled()[1], len(states), *arrays, *results, float(window), periodic)
    return u_bar, f_bar
