"""Pixelwise measurements in Triton: one read and one write, and one sum a block of pixels."""

from math import isfinite

import torch
import triton
import triton.language as tl
from torch import Tensor

from invdiff.kernels.pixelwise.curve import Curve

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _gather(out, x, index, d, m, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = k < m
    j = tl.load(index + k, mask=there, other=0)
    tl.store(out + row * m + k, tl.load(x + row * d + j, mask=there), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _spread(out, y, place, d, m, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = j < d
    p = tl.load(place + j, mask=there, other=-1)
    tl.store(out + row * d + j, tl.load(y + row * m + p, mask=p >= 0, other=0.0), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _misfit(  # type: ignore[no-untyped-def]
    out, sums, x, y, std, place, problems, d, m,
    GAIN: tl.constexpr, OFFSET: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    CLIPPED: tl.constexpr, MASKED: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    there = j < d
    kind = sums.dtype.element_ty
    gain, offset = tl.full((BLOCK,), GAIN, kind), tl.full((BLOCK,), OFFSET, kind)  # bare numbers would be float32
    u = gain * tl.load(x + row * d + j, mask=there, other=0.0).to(kind) - offset
    if MASKED:  # noqa: SIM108  decided when it is compiled
        p = tl.load(place + j, mask=there, other=-1)
    else:
        p = tl.where(there, j, -1)
    seen = p >= 0
    measured = tl.load(y + (row % problems) * m + p, mask=seen, other=0.0).to(kind)
    if DIAGONAL:
        deviation = tl.load(std + p, mask=seen, other=1.0).to(kind)
    else:
        deviation = tl.zeros((BLOCK,), kind) + tl.load(std).to(kind)
    if CLIPPED:
        low, high = tl.full((BLOCK,), LOW, kind), tl.full((BLOCK,), HIGH, kind)
        gain = tl.where((u >= low) & (u <= high), gain, 0.0)
        u = tl.where(u < low, low, tl.where(u > high, high, u))
    w = tl.where(seen, (measured - u) / deviation, 0.0)
    tl.store(out + row * d + j, (w / deviation * gain).to(out.dtype.element_ty), mask=there)
    tl.store(sums + row * tl.num_programs(1) + block, tl.sum(w * w, 0))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the seen entries: (n, d) -> (n, m)."""
    out = torch.empty(len(x), len(index), dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            grid = (len(x), triton.cdiv(len(index), _BLOCK))
            _gather[grid](out, x.contiguous(), index, x.shape[1], len(index), BLOCK=_BLOCK)
    return out


def spread(y: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Return zeros with the seen entries in their places: (n, m) -> (n, d)."""
    out = torch.empty(len(y), len(place), dtype=y.dtype, device=y.device)
    if out.numel():
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            grid = (len(y), triton.cdiv(len(place), _BLOCK))
            _spread[grid](out, y.contiguous(), place, len(place), len(index), BLOCK=_BLOCK)
    return out


def misfit(
    x: Tensor,
    y: Tensor,
    std: Tensor,
    index: Tensor | None,  # noqa: ARG001  one signature
    place: Tensor | None,
    curve: Curve,
) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, d) of the log-density; see `invdiff.kernels.pixelwise.misfit`."""
    n, d = x.shape
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = triton.cdiv(d, _BLOCK)
    out, sums = torch.empty_like(x), torch.empty(n, blocks, dtype=kind, device=x.device)
    if n:
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _misfit[(n, blocks)](
                out, sums, x, y.contiguous(), std.contiguous(), x if place is None else place,
                len(y), d, y.shape[1], curve.gain, curve.offset, curve.low, curve.high,
                CLIPPED=isfinite(curve.low) or isfinite(curve.high), MASKED=place is not None,
                DIAGONAL=std.numel() > 1, BLOCK=_BLOCK,
            )  # fmt: skip
    return sums.sum(1).to(x.dtype), out
