r"""A Gaussian likelihood's residuals in one pass: their chi-square, and what the operator's adjoint takes.

For a prediction p = A(x), a measurement y and independent noise of standard deviation s,

    chi2 = sum |(y - p) / s|^2,    g = (y - p) / s^2,

the log-density is -chi2 / 2 and a constant, and its gradient A'(x)^T g. PyTorch's own operations read and write the
measured values some ten times for it; the faster versions read p and y once and write g once, or nothing where g is not
asked for. What torch.compile, torch.func or forward-mode differentiation follow takes the reference.
"""

from types import ModuleType
from typing import Any, final

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.gaussian_misfit import reference

__all__ = ["chi_square", "misfit"]

_LEAST = 2**16
"""Real values from which the compiled version is faster than PyTorch's operations on a CPU."""


def misfit(
    p: Inexact[Tensor, "n m"], y: Inexact[Tensor, "k m"], std: Float[Tensor, " s"]
) -> tuple[Float[Tensor, " n"], Inexact[Tensor, "n m"]]:
    """Chi-square of the residuals, and the gradient (y - p) / std^2 of -1/2 of it with respect to p.

    Both are differentiable any number of times with respect to p. Sums are in float32 for half types, in p's type else,
    or better.

    Parameters
    ----------
    p
        Predictions, real or complex, any strides.
    y
        One measurement, or one a prediction, of p's dtype.
    std
        Positive, in units of y, in any floating type: one value, or one a measured value. For complex values, of each
        of the real and the imaginary part.

    Returns
    -------
    tuple
        Chi-squares in the real type of p, and gradients in p's type.

    Raises
    ------
    ShapeError
        If the measurements are neither one nor as many as the predictions, or sizes do not fit.
    InputError
        If types or devices differ.
    """
    _check(p, y, std)
    module = _version(p, y, std)
    if module is reference:
        return reference.misfit(p, y, std)
    run = _Misfit.apply if p.requires_grad and torch.is_grad_enabled() else module.misfit
    chi2, gradient = run(_real(p), _real(y), std)
    return chi2, torch.view_as_complex(gradient.unflatten(1, (-1, 2))) if p.is_complex() else gradient


def chi_square(p: Inexact[Tensor, "n m"], y: Inexact[Tensor, "k m"], std: Float[Tensor, " s"]) -> Float[Tensor, " n"]:
    """Chi-square of the residuals alone, differentiable any number of times; arguments and errors are `misfit`'s.

    Parameters
    ----------
    p, y, std
        As in `misfit`.
    """
    _check(p, y, std)
    module = _version(p, y, std)
    if module is reference:
        return reference.chi_square(p, y, std)
    if p.requires_grad and torch.is_grad_enabled():
        differentiable: Tensor = _Misfit.apply(_real(p), _real(y), std)[0]
        return differentiable
    result: Tensor = module.chi_square(_real(p), _real(y), std)
    return result


@final
class _Misfit(torch.autograd.Function):
    """`misfit` of real values for autograd: the forward pass has what the backward pass needs."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        chi2, gradient = _version(p.detach(), y, std).misfit(p.detach(), y, std)
        ctx.save_for_backward(gradient, std)
        ctx.set_materialize_grads(False)
        return chi2, gradient

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, None, None]:
        gradient, std = ctx.saved_tensors
        of_chi2, of_gradient = outer
        parts = []
        if of_chi2 is not None:
            parts.append((-2.0 * of_chi2)[:, None] * gradient)
        if of_gradient is not None:
            s = reference.spread(std.to(of_gradient.dtype), of_gradient.shape[1])
            parts.append(-(of_gradient / s / s))
        return sum(parts[1:], parts[0]) if parts else None, None, None


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()).flatten(1) if t.is_complex() else t


def _version(p: Tensor, y: Tensor, std: Tensor) -> ModuleType:
    tracked = p.requires_grad and torch.is_grad_enabled()
    if not (plain(p.detach() if tracked else p) and plain(y) and plain(std)):
        return reference
    name, kind = version("gaussian_misfit", p), p.dtype.to_real()
    if name == "gpu" and kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        from invdiff.kernels.gaussian_misfit import gpu

        return gpu
    if name == "cpu" and p.numel() * (1 + p.is_complex()) >= _LEAST and kind in (torch.float64, torch.float32):
        from invdiff.kernels.gaussian_misfit import cpu

        return cpu
    return reference


def _check(p: Tensor, y: Tensor, std: Tensor) -> None:
    if p.ndim != 2 or y.ndim != 2 or y.shape[1] != p.shape[1] or len(y) not in (1, len(p)):
        raise ShapeError(
            f"Predictions are (n, m) and measurements (1 or n, m), got {tuple(p.shape)} and {tuple(y.shape)}."
        )
    if std.ndim != 1 or len(std) not in (1, p.shape[1]):
        raise ShapeError(f"The noise has 1 or {p.shape[1]} values along one axis, got {tuple(std.shape)}.")
    if p.dtype != y.dtype or {y.device, std.device} != {p.device}:
        raise InputError(
            f"Predictions are {p.dtype} on {p.device}, measurements {y.dtype} on {y.device}, the noise is on "
            f"{std.device}; bring them together."
        )
