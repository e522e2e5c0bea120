"""Compressible flow compiled for a CPU: a trajectory's state stays in the first-level cache, forward and back.

Backwards, a window is run again from its stored start with the state of every step kept, and the steps are undone one
by one: the exact adjoint of the discrete scheme.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from invdiff.kernels.flow_trajectory.scheme import BOUNDARIES, LIMIT, MOST, START
from invdiff.kernels.threads import share


@cache
def _compiled() -> tuple[Callable[..., None], Callable[..., None]]:
    import numba
    import numpy as np

    from invdiff.kernels.flow_trajectory import cpu_adjoint

    fast = {"contract", "nsz"}

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def primitive(U: Any, W: Any, signal: Any, numbers: Any, N: int, boundary: int) -> Any:
        """Set padded W (3, N + 4) from U (3, N); return the fastest signal's speed, infinite if a cell is bad.

        signal (at least N) is scratch: the cells' own speeds, infinite where density or pressure is not positive.
        """
        half, gamma, gamma1, mu2_h, limit = numbers[1], numbers[2], numbers[3], numbers[5], numbers[7]
        r, u, p = W[0, 2 : N + 2], W[1, 2 : N + 2], W[2, 2 : N + 2]
        rho, m, E = U[0], U[1], U[2]
        for i in range(N):
            v = m[i] / rho[i]
            pressure = gamma1 * (E[i] - half * m[i] * v)
            r[i], u[i], p[i] = rho[i], v, pressure
            speed = abs(v) + np.sqrt(gamma * pressure / rho[i]) + mu2_h / rho[i]
            signal[i] = speed if (rho[i] > 0) & (pressure > 0) & (speed < limit) else limit
        # A loop of its own: the one above becomes vector code, a maximum does not.
        fastest = signal[0]
        for i in range(1, N):
            fastest = signal[i] if signal[i] > fastest else fastest
        for c in range(3):
            P = W[c]
            if boundary == 0:
                P[0] = P[1] = P[2]
                P[N + 2] = P[N + 3] = P[N + 1]
            elif boundary == 1:
                P[0], P[1], P[N + 2], P[N + 3] = P[N], P[N + 1], P[2], P[3]
            else:
                P[0], P[1], P[N + 2], P[N + 3] = P[3], P[2], P[N + 1], P[N]
        if boundary == 2:
            W[1, 0], W[1, 1], W[1, N + 2], W[1, N + 3] = -W[1, 0], -W[1, 1], -W[1, N + 2], -W[1, N + 3]
        return fastest

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def slopes(W: Any, s: Any, numbers: Any, N: int) -> None:
        """Set half slopes s (3, N + 2) of the cells from -1 to N."""
        one = numbers[0]
        zero = one - one
        for c in range(3):
            low, here, high, out = W[c, : N + 2], W[c, 1 : N + 3], W[c, 2 : N + 4], s[c]
            for i in range(N + 2):
                a, b = here[i] - low[i], high[i] - here[i]
                ab = a * b
                out[i] = ab / (a + b if ab > zero else one) if ab > zero else zero

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def fluxes(W: Any, s: Any, F: Any, numbers: Any, N: int) -> None:
        """Set fluxes F (3, N + 1) through the faces."""
        one, half, gamma, gamma1, mu_h = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        zero = one - one
        k, per1 = half * gamma1, one / gamma1
        rL, uL, pL = W[0, 1 : N + 2], W[1, 1 : N + 2], W[2, 1 : N + 2]
        rR, uR, pR = W[0, 2 : N + 3], W[1, 2 : N + 3], W[2, 2 : N + 3]
        srL, suL, spL = s[0, : N + 1], s[1, : N + 1], s[2, : N + 1]
        srR, suR, spR = s[0, 1 : N + 2], s[1, 1 : N + 2], s[2, 1 : N + 2]
        F0, F1, F2 = F[0], F[1], F[2]
        for i in range(N + 1):
            rl, ul, pl = rL[i] + srL[i], uL[i] + suL[i], pL[i] + spL[i]
            rr, ur, pr = rR[i] - srR[i], uR[i] - suR[i], pR[i] - spR[i]
            al, ar = gamma * pl / rl, gamma * pr / rr
            w, z = np.sqrt(rl), np.sqrt(rr)
            q = one / (w + z)
            roe, jump = (w * ul + z * ur) * q, q * (ur - ul)
            c = np.sqrt((w * al + z * ar) * q + k * w * z * jump * jump)
            low, high, own_low, own_high = roe - c, roe + c, ul - np.sqrt(al), ur + np.sqrt(ar)
            low, high = own_low if own_low <= low else low, own_high if own_high >= high else high
            ml, mr = rl * (low - ul), rr * (high - ur)
            star = (pr - pl + ml * ul - mr * ur) / (ml - mr)
            left = star >= zero
            r, u, p = rl if left else rr, ul if left else ur, pl if left else pr
            S = (low if low < zero else zero) if left else (high if high > zero else zero)
            m, E = r * (S - u), p * per1 + half * r * u * u
            at_star, v = p + m * (star - u), star / (S - star)
            mass = m * v
            tau = mu_h * (uR[i] - uL[i])
            F0[i] = mass
            F1[i] = mass * star + at_star - tau
            F2[i] = v * ((S - u) * E - p * u + at_star * S) - half * tau * (uL[i] + uR[i])

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def stage(U: Any, out: Any, W: Any, s: Any, F: Any, dt_h: Any, numbers: Any, N: int) -> None:
        """Set out = U + dt L(U), with W of U."""
        slopes(W, s, numbers, N)
        fluxes(W, s, F, numbers, N)
        for c in range(3):
            here, there, low, high = U[c], out[c], F[c, :N], F[c, 1 : N + 1]
            for i in range(N):
                there[i] = here[i] - dt_h * (high[i] - low[i])

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def run(
        U: Any, V: Any, W: Any, s: Any, F: Any, numbers: Any, h: float, window: float, count: int, limit: float,
        boundary: int,
    ) -> Any:  # fmt: skip
        """Make the steps of a window of U in place; return as `reference.run_window`. V is scratch."""
        N = U.shape[1]
        half, dt_h = numbers[1], U.dtype.type(window / count) * U.dtype.type(1 / h)
        for _ in range(count):
            for second in range(2):
                speed = primitive(V if second else U, W, F[0], numbers, N, boundary)
                if speed == np.inf:
                    for i in range(N):
                        if F[0, i] == np.inf:
                            U[:, i] = np.nan
                    return np.inf
                rate = np.float64(speed) / h
                if rate * window > limit * count:
                    return rate
                stage(V if second else U, V, W, s, F, dt_h, numbers, N)
            for c in range(3):
                here, there = U[c], V[c]
                for i in range(N):
                    here[i] = half * (here[i] + there[i])
        return 0.0

    @numba.njit(nogil=True)
    def copy(to: Any, source: Any) -> None:
        # An assignment of arrays compiles a check of shapes and its message, for seconds.
        for c in range(3):
            for i in range(to.shape[1]):
                to[c, i] = source[c, i]

    @numba.njit(nogil=True, error_model="numpy")
    def forward(
        states: Any, counts: Any, numbers: Any, h: float, window: float, steps: int, boundary: int, start: int,
        stop: int,
    ) -> None:  # fmt: skip
        windows, N, kind = counts.shape[1], states.shape[3], states.dtype
        V, W, s, F = (
            np.empty((3, N), kind),
            np.empty((3, N + 4), kind),
            np.empty((3, N + 2), kind),
            np.empty((3, N + 1), kind),
        )
        for n in range(start, stop):
            over = False
            for t in range(windows):
                U = states[n, t + 1]
                copy(U, states[n, t])
                wanted = window * (np.float64(primitive(U, W, F[0], numbers, N, boundary)) / h) / START
                count = steps
                if steps == 0:
                    count = max(1, int(np.ceil(wanted))) if wanted < MOST else 1
                rate = run(U, V, W, s, F, numbers, h, window, count, LIMIT if steps == 0 else np.inf, boundary)
                while 0 < rate < np.inf:
                    wanted = window * rate / START
                    if wanted >= MOST:
                        rate = np.inf
                        U[:] = np.nan
                        break
                    count = max(1, int(np.ceil(wanted)))
                    copy(U, states[n, t])
                    rate = run(U, V, W, s, F, numbers, h, window, count, LIMIT, boundary)
                counts[n, t] = count
                if over:
                    U[:] = np.nan
                over = over or rate > 0

    return forward, cpu_adjoint.compiled(primitive, slopes, stage, copy)


def _numbers(h: float, gamma: float, mu: float, dtype: torch.dtype) -> Any:
    """1, 1 / 2, gamma, gamma - 1, mu / h, 2 mu / h, 1 / h and infinity in the state's precision."""
    return (
        torch.tensor([1, 0.5, gamma, gamma - 1, mu / h, 2 * mu / h, 1 / h, torch.inf], dtype=torch.float64)
        .to(dtype)
        .numpy()
    )


def flow_trajectory(
    U: Tensor, h: float, gamma: float, mu: float, window: float, windows: int, steps: int, boundary: str
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, 3, N) and steps of each window (n, windows); see `kernels.flow_trajectory`."""
    states = torch.empty(len(U), windows + 1, *U.shape[1:], dtype=U.dtype)
    counts = torch.empty(len(U), windows, dtype=torch.int64)
    states[:, 0] = U
    end = BOUNDARIES.index(boundary)
    numbers = _numbers(h, gamma, mu, U.dtype)
    share(_compiled()[0], len(U), states.numpy(), counts.numpy(), numbers, float(h), float(window), steps, end)
    return states, counts


def adjoint(
    states: Tensor, counts: Tensor, bar: Tensor, h: float, gamma: float, mu: float, window: float, boundary: str
) -> Tensor:
    """Gradient by the initial state (n, 3, N) of `bar` by all states."""
    U_bar = torch.empty_like(states[:, 0]).contiguous()
    arrays = (states.contiguous().numpy(), counts.numpy(), bar.contiguous().numpy(), U_bar.numpy())
    end = BOUNDARIES.index(boundary)
    numbers = _numbers(h, gamma, mu, states.dtype)
    share(_compiled()[1], len(states), *arrays, numbers, float(h), float(window), end)
    return U_bar
