"""Checks that a part keeps its contract: for the parts that ship, and for those that users write."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from invdiff.diagnostics.exactness import ExactProblem, SamplerReport, check_sampler
from invdiff.diagnostics.prior_checks import PriorReport, check_prior
from invdiff.operators.base import SVD, LinearOperator, Operator

__all__ = [
    "ExactProblem",
    "OperatorReport",
    "PriorReport",
    "SamplerReport",
    "check_operator",
    "check_prior",
    "check_sampler",
]

_DENSE = 1024  # Largest number of inputs for which the operator's matrix is written out.


@dataclass(frozen=True)
class OperatorReport:
    """Relative errors found by `check_operator`; None where the operator has no such part.

    Parameters
    ----------
    linearity
        Of A(a x + b z) against a A x + b A z.
    adjointness
        Of <A x, y> against <x, A^T y>, relative to |A x| |y| + |x| |A^T y|.
    gradient
        Of the vector-Jacobian product by autograd against A^T y; for an operator that is not linear, against central
        differences in a random direction.
    norm
        Of ``norm()`` against the operator's matrix, or against power iteration where that is large.
    svd
        Worst of U S V^H x against A x, V S U^H y against A^T y, and V V^H x, U U^H y against x, y.
    functions
        Worst of ``gram`` and ``outer`` against A^T A x, A A^T y and, with f = 1, x and y.
    prox
        Norm of the proximal step's gradient at its result, relative to its terms.
    """

    linearity: float | None
    adjointness: float | None
    gradient: float
    norm: float | None
    svd: float | None
    functions: float | None
    prox: float | None


def check_operator(
    operator: Operator, *, dtype: torch.dtype = torch.float64, seed: int = 0, rtol: float = 1e-10
) -> OperatorReport:
    """Check an operator against its contract, on random inputs of its own device.

    Parameters
    ----------
    operator
        The operator. One that is not linear is checked for shapes and for its gradient alone; its inputs are uniform in
        [0, 1].
    dtype
        float64, or float32 with an rtol of about 1e-5.
    seed
        Seed of the random inputs.
    rtol
        Largest relative error. The norm may be 2e-3 off where it is an iteration's, the proximal step 100 rtol where it
        is conjugate gradients', and differences of an operator that is not linear 1e-5 (float64 only).

    Returns
    -------
    OperatorReport
        What was measured.

    Raises
    ------
    AssertionError
        If a part fails; the message holds the figures.
    """
    tensors = [*operator.parameters(), *operator.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)

    def draw(like: tuple[int, ...], n: int = 2) -> Tensor:
        return torch.randn(n, *like, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)

    if not isinstance(operator, LinearOperator):
        x = torch.rand(2, *operator.in_shape, generator=generator, dtype=torch.float64).to(device=device, dtype=dtype)
        d = draw(operator.in_shape)
        _shapes(operator, operator(x), None, dtype)
        leaf = x.clone().requires_grad_()
        out = operator(leaf)
        y = draw(operator.out_shape).to(out.dtype)
        (vjp,) = torch.autograd.grad(out, leaf, y)
        h = 1e-6 if dtype == torch.float64 else 1e-3
        with torch.no_grad():
            slope = (operator(x + h * d) - operator(x - h * d)) / (2 * h)
        inner = (_dot(slope, y) - _dot(vjp, d)).abs() / (_rows(slope) * _rows(y)).clamp_min(1e-300)
        report = OperatorReport(None, None, float(inner.max()), None, None, None, None)
        return _judge(operator, report, {"gradient": max(rtol, 1e-5 if dtype == torch.float64 else 1e-2)})

    A = operator
    x, z = draw(A.in_shape), draw(A.in_shape)
    with torch.no_grad():
        ax, az = A(x), A(z)
        y = draw(A.out_shape)
        if ax.is_complex():
            y = torch.complex(y, draw(A.out_shape))
        aty = A.adjoint(y)
    _shapes(A, ax, aty, dtype)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(A(leaf), leaf, y)
    with torch.no_grad():
        inner = _dot(ax, y) - _dot(x, aty)
        scale = _rows(ax) * _rows(y) + _rows(x) * _rows(aty)
        svd = A.svd
        norm, norm_tolerance = _norm_error(A, x, rtol)
        w = 0.7 / max(A.norm(), 1e-300) ** 2
        p = A.prox(x, ax + y, w)
        terms = (w * A.adjoint(A(p)), -w * A.adjoint(ax + y), p, -x)
        report = OperatorReport(
            linearity=_relative(A(1.7 * x - 0.3 * z), 1.7 * ax - 0.3 * az),
            adjointness=float((inner.abs() / scale.clamp_min(1e-300)).max()),
            gradient=_relative(gradient, aty),
            norm=norm,
            svd=None if svd is None else _svd_error(svd, x, y, ax, aty),
            functions=None if svd is None else _function_error(svd, x, y, A.adjoint(ax), A(aty)),
            prox=float(sum(terms, torch.zeros_like(x)).norm() / sum(float(t.norm()) for t in terms)),
        )
    return _judge(A, report, {"norm": norm_tolerance, "prox": rtol if svd is not None else 100 * rtol}, rtol)


def _judge(
    operator: Operator, report: OperatorReport, tolerances: dict[str, float], rtol: float = 0.0
) -> OperatorReport:
    figures = {name: value for name, value in vars(report).items() if value is not None}
    # Written so that a NaN fails.
    bad = [name for name, value in figures.items() if not value <= tolerances.get(name, rtol)]
    if bad:
        listing = ", ".join(f"{k}={v:.2e} (at most {tolerances.get(k, rtol):.0e})" for k, v in figures.items())
        raise AssertionError(f"{type(operator).__name__} fails in {', '.join(bad)}: {listing}.")
    return report


def _shapes(operator: Operator, y: Tensor, x: Tensor | None, dtype: torch.dtype) -> None:
    for name, t, shape in (("forward", y, operator.out_shape), ("adjoint", x, operator.in_shape)):
        if t is not None and (tuple(t.shape[1:]) != tuple(shape) or (t.real if t.is_complex() else t).dtype != dtype):
            raise AssertionError(
                f"{type(operator).__name__}.{name} gives {tuple(t.shape)} in {t.dtype}; "
                f"needed are {(2, *shape)} in {dtype}."
            )


def _rows(t: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(t.flatten(1), dim=1)
    return norms


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.conj()).real.flatten(1).sum(1) if b.is_complex() else (a * b).flatten(1).sum(1)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def _norm_error(A: LinearOperator, x: Tensor, rtol: float) -> tuple[float, float]:
    value, size = A.norm(), prod(A.in_shape)
    if size <= _DENSE:
        rows = A(torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *A.in_shape)).flatten(1)
        # An iteration stops at 1e-6 between two steps, and then is a little farther from its limit.
        exact = float(torch.linalg.matrix_norm(rows, ord=2))
        return abs(value - exact) / max(exact, 1e-300), 10 * rtol if A.svd is not None else 2e-3
    v = x[:1]
    for _ in range(200):
        v = A.adjoint(A(v / v.norm()))
    power = float(v.norm()) ** 0.5
    # Power iteration approaches from below, slowly where singular values crowd.
    return abs(value - power) / max(power, 1e-300), 2e-2


def _svd_error(svd: SVD, x: Tensor, y: Tensor, ax: Tensor, aty: Tensor) -> float:
    cx, cy = svd.v_adjoint(x), svd.u_adjoint(y)
    s = svd.singular_values.to(device=cx.device, dtype=cx.dtype.to_real())
    pairs = ((svd.u(s * cx), ax), (svd.v(s * cy), aty), (svd.v(cx), x), (svd.u(cy), y))
    return max(_relative(a, b) for a, b in pairs)


def _function_error(svd: SVD, x: Tensor, y: Tensor, atax: Tensor, aaty: Tensor) -> float:
    pairs = (
        (svd.gram(lambda s2: s2, x), atax),
        (svd.outer(lambda s2: s2, y), aaty),
        (svd.gram(lambda s2: 1.0 + 0.0 * s2, x), x),
        (svd.outer(lambda s2: 1.0 + 0.0 * s2, y), y),
        (svd.gram(lambda s2: 2.0 + s2, x), 2.0 * x + atax),
        (svd.outer(lambda s2: 2.0 + s2, y), 2.0 * y + aaty),
    )
    return max(_relative(a, b) for a, b in pairs)
