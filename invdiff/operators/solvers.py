"""Batched conjugate gradients (Hestenes & Stiefel 1952): every row of a batch is a system of its own."""

from collections.abc import Callable, Hashable
from typing import final

import torch
from torch import Tensor

LOOK = 4
"""Iterations between two looks, on a GPU, at whether all rows have converged: a look waits for the device."""
State = tuple[Tensor, Tensor, Tensor, Tensor]
"""Iterate x, residual r, direction p, and rho = r^T P r by row."""


def dot(u: Tensor, v: Tensor, multiplicity: Tensor) -> Tensor:
    """Real inner product of each row, shape (n, 1, ..., 1), of real or complex coefficients, each counted so often."""
    axes = u.ndim - 1
    if u.is_complex():
        u, v, multiplicity = torch.view_as_real(u), torch.view_as_real(v), multiplicity[..., None]
    w = (u * v * multiplicity).flatten(1).sum(1)
    return w.reshape(-1, *[1] * axes)


def conjugate_gradient(
    matvec: Callable[..., Tensor],
    b: Tensor,
    *tables: Tensor,
    start: Tensor | None = None,
    precondition: Callable[..., Tensor] | None = None,
    multiplicity: Tensor | None = None,
    rtol: float | None = None,
    atol: float = 0.0,
    max_iterations: int = 500,
    graphs: "Graphs | None" = None,
) -> Tensor:
    """Solve ``M x = b`` for a symmetric positive definite M, each row of the leading axis to its own tolerance.

    Parameters
    ----------
    matvec
        (x, *tables) -> M x on batches (n, ...), acting on every row alone.
    b
        Right-hand sides (n, ...), real, or complex coefficients of real vectors.
    tables
        The tensors that M and P are made of, but for those that outlive ``graphs``.
    start
        First guess; zero if None.
    precondition
        (r, *tables) -> P r with P about the inverse of M, symmetric positive definite; the identity if None.
    multiplicity
        How often each value counts in inner products, broadcasting against one row; once if None.
    rtol
        Residual in the norm of P, sqrt(r^T P r), relative to that of b, at which a row stops; 1e-6 in float32 and 1e-12
        in float64 if None.
    atol
        The same, absolute. For P near M's inverse it is the length of the error, each direction in units of the
        standard deviation that M is the precision of.
    max_iterations
        Bound on the iterations; the best iterate is returned when it is reached. A graph runs up to three more.
    graphs
        Where to keep the iteration as a CUDA graph, for callers that solve again with the same M but for the tables.
    """
    rtol = (1e-12 if b.dtype in (torch.float64, torch.complex128) else 1e-6) if rtol is None else rtol
    tiny = torch.finfo(b.dtype).tiny
    often = torch.ones((), dtype=b.real.dtype, device=b.device) if multiplicity is None else multiplicity

    def conditioned(r: Tensor, *tables: Tensor) -> Tensor:
        return r if precondition is None else precondition(r, *tables)

    def iterate(x: Tensor, r: Tensor, p: Tensor, rho: Tensor, stop: Tensor, often: Tensor, *tables: Tensor) -> State:
        mp = matvec(p, *tables)
        curvature = dot(p, mp, often)
        # A row that has converged stands still, so that its result does not depend on its neighbours in the batch; nor
        # does one go on whose matrix turns out not to be positive, as a trained denoiser's Jacobian may not be.
        live = (rho > stop) & (curvature > 0)
        alpha = torch.where(live, rho / curvature.clamp_min(tiny), 0.0)
        x, r = x + alpha * p, r - alpha * mp
        z = conditioned(r, *tables)
        new = dot(r, z, often)
        beta = torch.where(live, new / rho.clamp_min(tiny), 0.0)
        return x, r, z + beta * p, torch.where(live, new, 0.0)

    x = torch.zeros_like(b) if start is None else start
    r = b if start is None else b - matvec(x, *tables)
    p = conditioned(r, *tables)
    rho = dot(r, p, often)
    scale = rho if start is None else dot(b, conditioned(b, *tables), often)
    stop = torch.clamp_min(rtol**2 * scale, atol**2)
    state: State = (x, r, p, rho)
    graph = None if graphs is None or b.requires_grad else graphs.find(iterate, state, (stop, often, *tables))
    stride = LOOK if b.is_cuda else 1
    for done in range(0, max_iterations, stride):
        if not bool((state[3] > stop).any()):
            break
        if graph is not None:
            state = graph.replay()
            continue
        for _ in range(min(stride, max_iterations - done)):
            state = iterate(*state, stop, often, *tables)
    return state[0] if graph is None else state[0].clone()


@final
class Graphs:
    """Iterations as CUDA graphs, one for each shape: a launch for all their kernels, which small batches wait for.

    An iteration is captured at the second solution of its shape: the first one fills the caches that it reads. Nothing
    is captured elsewhere than on a GPU, nor of a matrix that waits for the device, as a user's operator may.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, _Graph | None] = {}
        self._able = True

    def find(self, iterate: Callable[..., State], state: State, fixed: tuple[Tensor, ...]) -> "_Graph | None":
        """Return the graph of `LOOK` iterations, loaded with the tensors, or None where there is none yet."""
        if not self._able or not state[0].is_cuda or torch.cuda.is_current_stream_capturing():
            return None
        key = tuple((t.shape, t.dtype, t.device) for t in (*state, *fixed))
        if key not in self._found:
            self._found[key] = None
            return None
        graph = self._found[key]
        if graph is None:
            try:
                graph = self._found[key] = _Graph(iterate, state, fixed)
            except RuntimeError:
                self._able = False
                return None
        graph.load(state, fixed)
        return graph


class _Graph:
    def __init__(self, iterate: Callable[..., State], state: State, fixed: tuple[Tensor, ...]) -> None:
        self._state: State = tuple(t.clone(memory_format=torch.contiguous_format) for t in state)  # type: ignore[assignment]
        self._fixed = tuple(t.clone(memory_format=torch.contiguous_format) for t in fixed)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            new = self._state
            for _ in range(LOOK):
                new = iterate(*new, *self._fixed)
            for old, value in zip(self._state, new, strict=True):
                old.copy_(value)

    def load(self, state: State, fixed: tuple[Tensor, ...]) -> None:
        """Copy tensors to where the graph reads them."""
        for here, there in zip((*self._state, *self._fixed), (*state, *fixed), strict=True):
            here.copy_(there)

    def replay(self) -> State:
        """Run the iterations; the tensors that come back are overwritten by the next."""
        self._graph.replay()
        return self._state
