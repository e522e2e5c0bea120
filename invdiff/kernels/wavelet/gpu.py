"""Filter banks in Triton: a program makes a block of outputs in the order of memory, each a gather of its taps.

Neighbouring outputs read neighbouring or overlapping inputs, which the caches hold, so that memory is read about once.
Sums are in float32 for half types, else in the signals' own type.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    out, x, index, weights, count, total, planes, length, m, inner, K, SPLIT: tl.constexpr, B: tl.constexpr
):
    e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = e < total
    lane, rest = e % inner, e // inner
    if SPLIT:  # out (o, 2, planes, m, inner)
        q, rest = rest % m, rest // m
        plane, rest = rest % planes, rest // planes
        row, o = (rest % 2) * m + q, rest // 2
    else:  # out (o, planes, length, inner)
        row, rest = rest % length, rest // length
        plane, o = rest % planes, rest // planes
    n = tl.load(count + row, mask=inside, other=0)
    sums = tl.zeros((B,), weights.dtype.element_ty)
    for k in range(K):
        live = inside & (k < n)
        r = tl.load(index + row * K + k, mask=live, other=0)
        w = tl.load(weights + row * K + k, mask=live, other=0.0)
        at = (o * planes + plane) * length + r if SPLIT else ((o * 2 + r // m) * planes + plane) * m + r % m
        value = tl.load(x + at * inner + lane, mask=live, other=0.0)
        sums += w * value.to(sums.dtype)
    tl.store(out + e, sums.to(out.dtype.element_ty), mask=inside)


def _apply(x: Tensor, out: Tensor, tables: list[Tensor], sizes: tuple[int, int, int, int], *, split: bool) -> Tensor:
    index, weights, count = tables[:3]
    if x.dtype != torch.float64:
        weights = weights.float()
    total = out.numel()
    if total:
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernel[(-(-total // BLOCK),)](
                out,
                x.contiguous(),
                index,
                weights,
                count,
                total,
                *sizes,
                index.shape[1],
                SPLIT=split,
                B=BLOCK,
                num_warps=4,
            )
    return out


def split(x: Tensor, tables: list[Tensor], m: int) -> Tensor:
    """Both bands of signals: (o, d, N, i) -> (o, 2, d, m, i); see `invdiff.kernels.wavelet`."""
    o, d, length, inner = x.shape
    out = torch.empty(o, 2, d, m, inner, dtype=x.dtype, device=x.device)
    return _apply(x, out, tables, (d, length, m, inner), split=True)


def merge(c: Tensor, tables: list[Tensor], length: int) -> Tensor:
    """Signals of both bands: (o, 2, d, m, i) -> (o, d, N, i); see `invdiff.kernels.wavelet`."""
    o, _, d, m, inner = c.shape
    out = torch.empty(o, d, length, inner, dtype=c.dtype, device=c.device)
    return _apply(c, out, tables, (d, length, m, inner), split=False)
