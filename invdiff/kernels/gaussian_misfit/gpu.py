"""Gaussian residuals in Triton: one read, at most one write, and one sum a block of a row.

Without atomics, so that results repeat bitwise, and whatever the rows beside one are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _quotient(a, b):  # type: ignore[no-untyped-def]
    # Triton's "/" is rounded exactly for float64 only. With this the gradient is bitwise that of the reference.
    if a.dtype == tl.float32:  # noqa: SIM108  decided when it is compiled
        result = tl.div_rn(a, b)
    else:
        result = a / b
    return result


@triton.jit  # type: ignore[untyped-decorator]
def _residuals(  # type: ignore[no-untyped-def]
    out, sums, p, y, std, k, m, blocks,
    EACH: tl.constexpr, DIAGONAL: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    row, block = (program // blocks).to(tl.int64), program % blocks
    j = block * BLOCK + tl.arange(0, BLOCK)
    there = j < m
    kind = sums.dtype.element_ty
    predicted = tl.load(p + row * m + j, mask=there, other=0.0).to(kind)
    measured = tl.load(y + (row % k) * m + j, mask=there, other=0.0).to(kind)
    if DIAGONAL:
        s = tl.load(std + j // EACH, mask=there, other=1.0).to(kind)
    else:
        s = tl.zeros((BLOCK,), kind) + tl.load(std).to(kind)
    w = _quotient(measured - predicted, s)
    if GRADIENT:
        tl.store(out + row * m + j, _quotient(w, s).to(out.dtype.element_ty), mask=there)
    tl.store(sums + row * blocks + block, tl.sum(w * w, 0))


def _run(p: Tensor, y: Tensor, std: Tensor, out: Tensor, *, gradient: bool) -> Tensor:
    n, m = p.shape
    kind = torch.float64 if p.dtype == torch.float64 else torch.float32
    blocks = triton.cdiv(m, _BLOCK)
    sums = torch.empty(n, blocks, dtype=kind, device=p.device)
    if sums.numel():
        with torch.cuda.device_of(p):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _residuals[(n * blocks,)](
                out, sums, p.contiguous(), y.contiguous(), std.contiguous(), len(y), m, blocks,
                EACH=1 if len(std) in (1, m) else 2, DIAGONAL=len(std) > 1, GRADIENT=gradient, BLOCK=_BLOCK,
            )  # fmt: skip
    return sums.sum(1).to(p.dtype)


def misfit(p: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, m) of the log-density; see `invdiff.kernels.gaussian_misfit.misfit`."""
    out = torch.empty(p.shape, dtype=p.dtype, device=p.device)
    return _run(p, y, std, out, gradient=True), out


def chi_square(p: Tensor, y: Tensor, std: Tensor) -> Tensor:
    """Chi-square (n,); see `invdiff.kernels.gaussian_misfit.chi_square`."""
    return _run(p, y, std, p, gradient=False)
