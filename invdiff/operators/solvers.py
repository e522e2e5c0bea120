"""Batched conjugate gradients (Hestenes & Stiefel 1952): every row of a batch is a system of its own."""

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
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
    precondition
        r -> P r with P about the inverse of M, symmetric positive definite; the identity if None.
    rtol
        Residual in the norm of P, sqrt(r^T P r), relative to that of b, at which a row stops; 1e-6 in float32 and 1e-12
        in float64 if None.
    atol
        The same, absolute and for the root mean square over a row's values. For P near M's inverse it is the error in
        units of the standard deviation that M is the precision of.
    max_iterations
        Bound on the iterations; the best iterate is returned when it is reached.
    """
    rtol = (1e-12 if b.dtype == torch.float64 else 1e-6) if rtol is None else rtol

    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(1).reshape(-1, *[1] * (u.ndim - 1))

    def conditioned(r: Tensor) -> Tensor:
        return r if precondition is None else precondition(r)

    x = torch.zeros_like(b) if start is None else start
    r = b if start is None else b - matvec(x)
    p = conditioned(r)
    rho = dot(r, p)
    scale = rho if start is None else dot(b, conditioned(b))
    stop = torch.clamp_min(rtol**2 * scale, atol**2 * b[0].numel())
    tiny = torch.finfo(b.dtype).tiny
    # To look whether all rows have converged waits for the device. Those that have stand still, so a GPU had better
    # look at every fourth iteration only, with the same result.
    stride = 4 if b.is_cuda else 1
    for iteration in range(max_iterations):
        live = rho > stop
        if iteration % stride == 0 and not bool(live.any()):
            break
        mp = matvec(p)
        # A row that has converged stands still, so that its result does not depend on its neighbours in the batch.
        curvature = dot(p, mp)
        # Nor does one whose matrix turns out not to be positive, as a trained denoiser's Jacobian may not be.
        live = live & (curvature > 0)
        alpha = torch.where(live, rho / curvature.clamp_min(tiny), torch.zeros_like(rho))
        x, r = x + alpha * p, r - alpha * mp
        z = conditioned(r)
        new = dot(r, z)
        beta = torch.where(live, new / rho.clamp_min(tiny), torch.zeros_like(rho))
        p, rho = torch.where(live, z + beta * p, p), torch.where(live, new, torch.zeros_like(rho))
    return x
