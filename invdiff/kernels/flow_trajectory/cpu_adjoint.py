"""The adjoint of compiled compressible flow: what undoes a step, operation by operation in reverse.

A name with `_b` is the gradient by what the name stands for in `reference` and `cpu`.
"""

from collections.abc import Callable
from typing import Any


def compiled(primitive: Any, slopes: Any, stage: Any, copy: Any) -> Callable[..., None]:
    """Return the compiled adjoint, made of the compiled parts of a forward step."""
    import numba
    import numpy as np

    fast = {"contract", "nsz"}

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def undo_fluxes(W: Any, s: Any, a: Any, L: Any, R: Any, W_b: Any, numbers: Any, N: int) -> None:
        """Set gradients L and R (3, N + 1) by the states left and right of each face; add the viscous part to W_b.

        a (3, N + 2) is the gradient by dU/dt with zeros at its ends.
        """
        one, half, gamma, gamma1 = numbers[0], numbers[1], numbers[2], numbers[3]
        mu_h, per_h = numbers[4], numbers[6]
        zero = one - one
        k, per1 = half * gamma1, one / gamma1
        rL, uL, pL = W[0, 1 : N + 2], W[1, 1 : N + 2], W[2, 1 : N + 2]
        rR, uR, pR = W[0, 2 : N + 3], W[1, 2 : N + 3], W[2, 2 : N + 3]
        srL, suL, spL = s[0, : N + 1], s[1, : N + 1], s[2, : N + 1]
        srR, suR, spR = s[0, 1 : N + 2], s[1, 1 : N + 2], s[2, 1 : N + 2]
        a0, b0, a1, b1 = a[0, : N + 1], a[0, 1 : N + 2], a[1, : N + 1], a[1, 1 : N + 2]
        a2, b2 = a[2, : N + 1], a[2, 1 : N + 2]
        L0, L1, L2, R0, R1, R2 = L[0], L[1], L[2], R[0], R[1], R[2]
        for i in range(N + 1):
            rl, ul, pl = rL[i] + srL[i], uL[i] + suL[i], pL[i] + spL[i]
            rr, ur, pr = rR[i] - srR[i], uR[i] - suR[i], pR[i] - spR[i]
            al, ar = gamma * pl / rl, gamma * pr / rr
            w, z = np.sqrt(rl), np.sqrt(rr)
            cl, cr = np.sqrt(al), np.sqrt(ar)
            q = one / (w + z)
            d = ur - ul
            roe, mean = (w * ul + z * ur) * q, (w * al + z * ar) * q
            curve = k * w * z * q * q
            c = np.sqrt(mean + curve * d * d)
            own_l, own_r = ul - cl <= roe - c, ur + cr >= roe + c
            low, high = ul - cl if own_l else roe - c, ur + cr if own_r else roe + c
            ml, mr = rl * (low - ul), rr * (high - ur)
            per = one / (ml - mr)
            star = (pr - pl + ml * ul - mr * ur) * per
            left = star >= zero
            r, u, p = rl if left else rr, ul if left else ur, pl if left else pr
            S = (low if low < zero else zero) if left else (high if high > zero else zero)
            m, E = r * (S - u), p * per1 + half * r * u * u
            at_star, D = p + m * (star - u), one / (S - star)
            v, mass = star * D, m * star * D
            G = (S - u) * E - p * u + at_star * S
            # The flux, in reverse.
            f0, f1, f2 = (b0[i] - a0[i]) * per_h, (b1[i] - a1[i]) * per_h, (b2[i] - a2[i]) * per_h
            mass_b, G_b = f0 + f1 * star, f2 * v
            at_star_b = f1 + G_b * S
            v_b = f2 * G + mass_b * m
            m_b = mass_b * v + at_star_b * (star - u)
            E_b = G_b * (S - u)
            star_b = f1 * mass + v_b * S * D * D + at_star_b * m
            S_b = G_b * (E + at_star) - v_b * star * D * D + m_b * r
            u_b = -G_b * (E + p) - at_star_b * m + E_b * r * u - m_b * r
            p_b = -G_b * u + at_star_b + E_b * per1
            r_b = E_b * half * u * u + m_b * (S - u)
            # The contact's speed.
            A_b = star_b * per
            B_b = -A_b * star
            ml_b, mr_b = A_b * ul + B_b, -A_b * ur - B_b
            low_b = ml_b * rl + (S_b if left and low < zero else zero)
            high_b = mr_b * rr + (zero if left or high <= zero else S_b)
            rl_b = ml_b * (low - ul) + (r_b if left else zero)
            rr_b = mr_b * (high - ur) + (zero if left else r_b)
            ul_b = A_b * ml - ml_b * rl + (u_b if left else zero)
            ur_b = -A_b * mr - mr_b * rr + (zero if left else u_b)
            pl_b, pr_b = (p_b if left else zero) - A_b, (zero if left else p_b) + A_b
            # The signals' speeds.
            ul_b += low_b if own_l else zero
            ur_b += high_b if own_r else zero
            roe_b = (zero if own_l else low_b) + (zero if own_r else high_b)
            cc_b = half * ((zero if own_r else high_b) - (zero if own_l else low_b)) / c
            al_b = -half * (low_b if own_l else zero) / cl + cc_b * w * q
            ar_b = half * (high_b if own_r else zero) / cr + cc_b * z * q
            common = cc_b * curve * d
            w_b = q * (roe_b * (ul - roe) + cc_b * (al - mean)) + common * d * (one / w - (q + q))
            z_b = q * (roe_b * (ur - roe) + cc_b * (ar - mean)) + common * d * (one / z - (q + q))
            L0[i] = rl_b - al_b * al / rl + half * w_b / w
            R0[i] = rr_b - ar_b * ar / rr + half * z_b / z
            L1[i] = ul_b + roe_b * w * q - (common + common)
            R1[i] = ur_b + roe_b * z * q + (common + common)
            L2[i] = pl_b + al_b * gamma / rl
            R2[i] = pr_b + ar_b * gamma / rr
        here, there = W_b[1, 1 : N + 2], W_b[1, 2 : N + 3]
        for i in range(N + 1):
            f1, f2 = (b1[i] - a1[i]) * per_h, (b2[i] - a2[i]) * per_h
            tau_b = -mu_h * (f1 + half * f2 * (uL[i] + uR[i]))
            both = -half * f2 * mu_h * (uR[i] - uL[i])
            here[i] += both - tau_b
            there[i] += both + tau_b

    @numba.njit(nogil=True, fastmath=fast, error_model="numpy")
    def undo(W: Any, s: Any, a: Any, L: Any, R: Any, W_b: Any, out: Any, numbers: Any, N: int, boundary: int) -> None:
        """Add J(U)^T a to out (3, N), J of dU/dt; W and its half slopes s are those of U. The rest is scratch."""
        one, half, gamma1 = numbers[0], numbers[1], numbers[3]
        zero = one - one
        W_b[:] = 0
        undo_fluxes(W, s, a, L, R, W_b, numbers, N)
        for c in range(3):
            for i in range(N + 2):
                # A cell is left of the face after it and right of the one before it.
                to_left = L[c, i] if i <= N else zero
                to_right = R[c, i - 1] if i > 0 else zero
                slope_b = to_left - to_right
                down, up = W[c, i + 1] - W[c, i], W[c, i + 2] - W[c, i + 1]
                if down * up > zero:
                    per = one / (down + up)
                    down_b, up_b = slope_b * (up * per) * (up * per), slope_b * (down * per) * (down * per)
                else:
                    down_b, up_b = zero, zero
                W_b[c, i] -= down_b
                W_b[c, i + 1] += to_left + to_right + down_b - up_b
                W_b[c, i + 2] += up_b
            P = W_b[c]
            if boundary == 0:
                P[2] += P[0] + P[1]
                P[N + 1] += P[N + 2] + P[N + 3]
            elif boundary == 1:
                P[N] += P[0]
                P[N + 1] += P[1]
                P[2] += P[N + 2]
                P[3] += P[N + 3]
            else:
                sign = -one if c == 1 else one
                P[3] += sign * P[0]
                P[2] += sign * P[1]
                P[N + 1] += sign * P[N + 2]
                P[N] += sign * P[N + 3]
        for i in range(N):
            rho, u = W[0, i + 2], W[1, i + 2]
            u_b, p_b = W_b[1, i + 2] / rho, gamma1 * W_b[2, i + 2]
            out[0, i] += W_b[0, i + 2] - u * u_b + half * u * u * p_b
            out[1, i] += u_b - u * p_b
            out[2, i] += p_b

    @numba.njit(nogil=True, error_model="numpy")
    def backward(
        states: Any, counts: Any, bar: Any, U_bar: Any, numbers: Any, h: float, window: float, boundary: int,
        start: int, stop: int,
    ) -> None:  # fmt: skip
        windows, N, kind = counts.shape[1], states.shape[3], states.dtype
        V, W, s, F = (
            np.empty((3, N), kind),
            np.empty((3, N + 4), kind),
            np.empty((3, N + 2), kind),
            np.empty((3, N + 1), kind),
        )
        X, sx, W_b = np.empty((3, N + 4), kind), np.empty((3, N + 2), kind), np.empty((3, N + 4), kind)
        L, R, a = np.empty((3, N + 1), kind), np.empty((3, N + 1), kind), np.zeros((3, N + 2), kind)
        half = numbers[1]
        for n in range(start, stop):
            g = U_bar[n]
            copy(g, bar[n, windows])
            for t in range(windows - 1, -1, -1):
                count = counts[n, t]
                dt = kind.type(window / count)
                dt_h = dt * kind.type(1 / h)
                kept = np.empty((count, 3, N), kind)
                copy(kept[0], states[n, t])
                for m in range(count - 1):
                    primitive(kept[m], W, F[0], numbers, N, boundary)
                    stage(kept[m], V, W, s, F, dt_h, numbers, N)
                    primitive(V, W, F[0], numbers, N, boundary)
                    stage(V, V, W, s, F, dt_h, numbers, N)
                    here, there = kept[m], kept[m + 1]
                    for c in range(3):
                        for i in range(N):
                            there[c, i] = half * (here[c, i] + V[c, i])
                for m in range(count - 1, -1, -1):
                    U = kept[m]
                    primitive(U, W, F[0], numbers, N, boundary)
                    stage(U, V, W, s, F, dt_h, numbers, N)
                    primitive(V, X, F[0], numbers, N, boundary)
                    slopes(X, sx, numbers, N)
                    # U' = (U + V + dt L(V)) / 2 with V = U + dt L(U).
                    for c in range(3):
                        for i in range(N):
                            g[c, i] *= half
                            V[c, i] = g[c, i]
                            a[c, i + 1] = dt * g[c, i]
                    undo(X, sx, a, L, R, W_b, V, numbers, N, boundary)
                    for c in range(3):
                        for i in range(N):
                            g[c, i] += V[c, i]
                            a[c, i + 1] = dt * V[c, i]
                    undo(W, s, a, L, R, W_b, g, numbers, N, boundary)
                for c in range(3):
                    for i in range(N):
                        g[c, i] += bar[n, t, c, i]

    result: Callable[..., None] = backward
    return result
