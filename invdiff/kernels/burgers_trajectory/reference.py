"""Burgers trajectories in plain PyTorch; differentiable by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.kernels.burgers_trajectory.scheme import steps_of_window


def _slope(u: Tensor, f: Tensor, h: float, nu: float, *, periodic: bool) -> Tensor:
    """Right-hand side for averages (n, N)."""
    if periodic:
        p = F.pad(u[:, None], (2, 2), mode="circular")[:, 0]
    else:
        p = torch.cat((-u[:, :2].flip(1), u, -u[:, -2:].flip(1)), 1)
    a, b, c, d = p[:, :-3], p[:, 1:-2], p[:, 2:-1], p[:, 3:]
    v = (7.0 * (b + c) - (a + d)) / 12.0
    g = (15.0 * (c - b) - (d - a)) / (12.0 * h)
    q = 0.5 * v * v - nu * g
    return f - (q[:, 1:] - q[:, :-1]) / h


def burgers_trajectory(
    u: Tensor, f: Tensor, h: float, nu: float, window: float, steps: int, periodic: bool
) -> tuple[Tensor, Tensor]:
    """States (n, windows + 1, N) and steps of each window (n, windows), int64; see `kernels.burgers_trajectory`."""
    n, windows, points = f.shape
    repeat = u.shape[1] // points
    states, counts = [u], []
    for w in range(windows):
        forcing = f[:, w].repeat_interleave(repeat, 1)
        if steps:
            count = [steps] * n
        else:
            speed = (u.detach().abs().amax(1) + window * f[:, w].detach().abs().amax(1)).nan_to_num(nan=0.0).tolist()
            count = [steps_of_window(min(s, 1e6), h, nu, window) for s in speed]
        counts.append(torch.tensor(count, device=u.device))
        for k in range(max(count, default=0)):
            # A trajectory that has made its steps waits for the others.
            dt = torch.tensor([window / c if k < c else 0.0 for c in count], dtype=u.dtype, device=u.device)[:, None]
            k1 = _slope(u, forcing, h, nu, periodic=periodic)
            k2 = _slope(u + 0.5 * dt * k1, forcing, h, nu, periodic=periodic)
            k3 = _slope(u + 0.5 * dt * k2, forcing, h, nu, periodic=periodic)
            k4 = _slope(u + dt * k3, forcing, h, nu, periodic=periodic)
            u = u + dt / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        states.append(u)
    every = torch.stack(counts, 1) if counts else torch.zeros(n, 0, dtype=torch.int64, device=u.device)
    return torch.stack(states, 1), every
