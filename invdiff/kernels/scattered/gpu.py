"""Weighted sums of gathered entries in Triton: a program sums a block of outputs, in order and without atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(out, x, starts, index, weights, inputs, outputs, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = r < outputs
    e = tl.load(starts + r, mask=there, other=0)
    end = tl.load(starts + r + 1, mask=there, other=0)
    if WIDE:  # noqa: SIM108  decided when it is compiled
        total = tl.zeros((BLOCK,), tl.float64)
    else:
        total = tl.zeros((BLOCK,), tl.float32)
    longest = tl.max(end - e, 0)
    for step in range(longest):
        more = e + step < end
        at = tl.load(index + e + step, mask=more, other=0)
        value = tl.load(x + row * inputs + at, mask=more, other=0.0)
        total += tl.load(weights + e + step, mask=more, other=0.0).to(total.dtype) * value.to(total.dtype)
    tl.store(out + row * outputs + r, total.to(out.dtype.element_ty), mask=there)


def gather_sum(x: Tensor, starts: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return (n, outputs) from (n, inputs); see `invdiff.kernels.scattered`."""
    outputs = len(starts) - 1
    out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
    if out.numel():
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernel[(len(x), triton.cdiv(outputs, _BLOCK))](
                out, x.contiguous(), starts, index, weights, x.shape[1], outputs,
                BLOCK=_BLOCK, WIDE=x.dtype == torch.float64,
            )  # fmt: skip
    return out
