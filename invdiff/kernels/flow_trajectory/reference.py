"""Compressible flow in plain PyTorch; differentiable by autograd."""

import torch
from torch import Tensor

from invdiff.kernels.flow_trajectory.scheme import LIMIT, MOST, START, Boundary, steps_of_window


def _primitive(U: Tensor, gamma: float) -> Tensor:
    rho, m, E = U.unbind(1)
    u = m / rho
    return torch.stack((rho, u, (gamma - 1.0) * (E - 0.5 * m * u)), 1)


def _padded(W: Tensor, boundary: Boundary) -> Tensor:
    """Two cells more at each end."""
    if boundary == "periodic":
        return torch.cat((W[..., -2:], W, W[..., :2]), -1)
    if boundary == "outflow":
        return torch.cat((W[..., :1], W[..., :1], W, W[..., -1:], W[..., -1:]), -1)
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=W.dtype, device=W.device)[:, None]
    return torch.cat((sign * W[..., :2].flip(-1), W, sign * W[..., -2:].flip(-1)), -1)


def _hllc(left: Tensor, right: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Fluxes from primitive states (n, 3, faces) at both sides of the faces."""
    (rl, ul, pl), (rr, ur, pr) = left.unbind(1), right.unbind(1)
    al, ar = gamma * pl / rl, gamma * pr / rr
    w, z = rl.sqrt(), rr.sqrt()
    q = 1.0 / (w + z)
    roe = (w * ul + z * ur) * q
    c = ((w * al + z * ar) * q + 0.5 * (gamma - 1.0) * w * z * (q * (ur - ul)) ** 2).sqrt()
    low, high = torch.minimum(ul - al.sqrt(), roe - c), torch.maximum(ur + ar.sqrt(), roe + c)
    ml, mr = rl * (low - ul), rr * (high - ur)
    star = (pr - pl + ml * ul - mr * ur) / (ml - mr)
    side = star >= 0.0
    r, u, p = torch.where(side, rl, rr), torch.where(side, ul, ur), torch.where(side, pl, pr)
    S = torch.where(side, low.clamp(max=0.0), high.clamp(min=0.0))
    m, E = r * (S - u), p / (gamma - 1.0) + 0.5 * r * u * u
    at_star, v = p + m * (star - u), star / (S - star)
    mass = m * v
    return mass, mass * star + at_star, v * ((S - u) * E - p * u + at_star * S)


def _slope(W: Tensor, h: float, gamma: float, mu: float, boundary: Boundary) -> Tensor:
    """dU/dt for primitive states (n, 3, N)."""
    P = _padded(W, boundary)
    d = P.diff(dim=-1)
    a, b = d[..., :-1], d[..., 1:]
    alike = a * b > 0.0
    half = torch.where(alike, a * b / torch.where(alike, a + b, 1.0), 0.0)
    inner = P[..., 1:-1]
    mass, momentum, energy = _hllc((inner + half)[..., :-1], (inner - half)[..., 1:], gamma)
    u = inner[:, 1]
    tau = (mu / h) * u.diff(dim=-1)
    flux = torch.stack((mass, momentum - tau, energy - 0.5 * tau * (u[:, :-1] + u[:, 1:])), 1)
    return -flux.diff(dim=-1) / h


def _signals(W: Tensor, h: float, gamma: float, mu: float) -> tuple[Tensor, Tensor]:
    """Fastest rate of each trajectory (n,), infinite if a cell is bad: density or pressure not positive (n, N)."""
    rho, u, p = W.detach().unbind(1)
    speed = u.abs() + (gamma * p / rho).sqrt() + 2.0 * mu / (h * rho)
    bad = ~((rho > 0.0) & (p > 0.0) & torch.isfinite(speed))
    return torch.where(bad, torch.inf, speed).amax(1).double() / h, bad


def first_counts(U: Tensor, h: float, gamma: float, mu: float, window: float) -> list[int]:
    """Return the steps that the state at a window's start asks for."""
    rates, _ = _signals(_primitive(U, gamma), h, gamma, mu)
    return [steps_of_window(rate, window) for rate in rates.tolist()]


def run_window(
    U: Tensor, counts: list[int], h: float, gamma: float, mu: float, window: float, boundary: Boundary, limit: float
) -> tuple[Tensor, Tensor]:
    """Make each trajectory's number of equal steps from U (n, 3, N).

    Also returns rates (n,): 0 where all steps were made, else that of the stage which ended the trajectory, above the
    `limit`, or infinite where density or pressure was not positive; those cells are NaN.
    """
    count = torch.tensor(counts, dtype=torch.int64, device=U.device)
    seen = torch.zeros(len(U), dtype=torch.float64, device=U.device)
    lost = torch.zeros_like(U[:, 0], dtype=torch.bool)
    dt = (window / count.double()).to(U.dtype)[:, None, None]
    for k in range(max(counts, default=0)):
        stages = [U]
        for _ in range(2):
            W = _primitive(stages[-1], gamma)
            rate, bad = _signals(W, h, gamma, mu)
            ends = (k < count) & (seen == 0.0) & ((rate * window > limit * count) | torch.isinf(rate))
            seen, lost = torch.where(ends, rate, seen), lost | (bad & ends[:, None])
            # A trajectory that has made its steps, or has ended, waits for the others.
            going = ((k < count) & (seen == 0.0))[:, None, None]
            slope = _slope(W, h, gamma, mu, boundary)
            stages.append(stages[-1] + dt * slope)
        U = torch.where(going, 0.5 * (U + stages[2]), U)
    return torch.where(lost[:, None], torch.nan, U), seen


def flow_trajectory(
    U: Tensor, h: float, gamma: float, mu: float, window: float, windows: int, steps: int, boundary: Boundary
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, 3, N) and steps of each window (n, windows); see `kernels.flow_trajectory`."""
    states, every = [U], []
    for _ in range(windows):
        limit = torch.inf if steps else LIMIT
        counts = [steps] * len(U) if steps else first_counts(U, h, gamma, mu, window)
        end, seen = run_window(U, counts, h, gamma, mu, window, boundary, limit)
        while bool(((seen > 0.0) & (seen < torch.inf)).any()):
            again = [0.0 < r * window / START < MOST for r in seen.tolist()]
            counts = [
                steps_of_window(r, window) if a else c for a, c, r in zip(again, counts, seen.tolist(), strict=True)
            ]
            end, seen = run_window(U, counts, h, gamma, mu, window, boundary, limit)
            hopeless = ((seen * window / START >= MOST) & (seen < torch.inf))[:, None, None]
            end, seen = torch.where(hopeless, torch.nan, end), torch.where(hopeless[:, 0, 0], torch.inf, seen)
        # The cells where a trajectory ended are NaN at the first output after it, and all cells later.
        over = torch.isnan(U).any((1, 2)) if len(states) > 1 else torch.zeros(len(U), dtype=torch.bool, device=U.device)
        U = torch.where(over[:, None, None], torch.nan, end)
        states.append(U)
        every.append(torch.tensor(counts, dtype=torch.int64, device=U.device))
    counts_of = torch.stack(every, 1) if every else torch.zeros(len(U), 0, dtype=torch.int64, device=U.device)
    return torch.stack(states, 1), counts_of


def adjoint(
    states: Tensor, counts: Tensor, bar: Tensor, h: float, gamma: float, mu: float, window: float, boundary: Boundary
) -> Tensor:
    """Gradient by the initial state (n, 3, N) of `bar` by all states: each window again from its stored start."""
    g = bar[:, -1]
    for w in range(counts.shape[1] - 1, -1, -1):
        with torch.enable_grad():
            U = states[:, w].detach().requires_grad_()
            end, _ = run_window(U, counts[:, w].tolist(), h, gamma, mu, window, boundary, torch.inf)
            (back,) = torch.autograd.grad(end, U, g) if len(U) else (g,)
        g = bar[:, w] + back
    return g
