"""Batched conjugate gradients (Hestenes & Stiefel 1952): every row of a batch is a system of its own."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    start: Tensor | None = None,
    rtol: float | None = None,
    max_iterations: int = 500,
) -> Tensor:
    """Solve ``M x = b`` for a symmetric positive definite M, each row of the leading axis to its own tolerance.

    Parameters
    ----------
    matvec
        x -> M x on batches (n, ...), acting on every row alone.
    b
        Right-hand sides (n, ...).
    start
        First guess; zero if None.
    rtol
        Relative residual |b - M x| / |b| at which a row stops; 1e-6 in float32 and 1e-12 in float64 if None.
    max_iterations
        Bound on the iterations; the best iterate is returned when it is reached.
    """
    rtol = (1e-12 if b.dtype == torch.float64 else 1e-6) if rtol is None else rtol

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.ndim - 1))

    x = torch.zeros_like(b) if start is None else start
    r = b - matvec(x) if start is not None else b
    p, rr = r, dot(r, r)
    stop = rtol**2 * dot(b, b)
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(max_iterations):
        live = rr > stop
        if not bool(live.any()):
            break
        mp = matvec(p)
        # A row that has converged stands still, so that its result does not depend on its neighbours in the batch.
        curvature = dot(p, mp)
        # Nor does one whose matrix turns out not to be positive, as a trained denoiser's Jacobian may not be.
        live = live & (curvature > 0)
        alpha = torch.where(live, rr / curvature.clamp_min(tiny), torch.zeros_like(rr))
        x, r = x + alpha * p, r - alpha * mp
        new = dot(r, r)
        beta = torch.where(live, new / rr.clamp_min(tiny), torch.zeros_like(rr))
        p, rr = torch.where(live, r + beta * p, p), torch.where(live, new, torch.zeros_like(rr))
    return x
