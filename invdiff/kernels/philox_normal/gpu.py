"""Philox4x32-10 and Box-Muller in Triton: a launch in place of some two hundred, and nothing in memory but the result.

The logarithm and the turns are taken in float64, as in the reference, so that what is rounded to float32 is the same
but where float64 itself rounds differently.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["step", "call", "size"])  # type: ignore[untyped-decorator]
def _kernel(out, keys, slots, step, call, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k0 = tl.load(keys + 2 * row).to(tl.uint32)
    k1 = tl.load(keys + 2 * row + 1).to(tl.uint32)
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.load(slots + row).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + call.to(tl.uint32)
    k0 = tl.zeros_like(c0) + k0
    k1 = tl.zeros_like(c0) + k1
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full(c0.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, m0), c0 * m0
        h1, l1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + w0, k1 + w1
    turn = tl.full(c0.shape, 6.283185307179586 / 4294967296.0, tl.float64)  # a bare number would be a float32
    r0 = tl.sqrt(-2.0 * tl.log((c0.to(tl.float64) + 1.0) / 4294967296.0))
    r1 = tl.sqrt(-2.0 * tl.log((c2.to(tl.float64) + 1.0) / 4294967296.0))
    t0, t1 = c1.to(tl.float64) * turn, c3.to(tl.float64) * turn
    at = block.to(tl.int64) * 4
    to = out + row * size + at
    tl.store(to, (r0 * tl.cos(t0)).to(out.dtype.element_ty), mask=at < size)
    tl.store(to + 1, (r0 * tl.sin(t0)).to(out.dtype.element_ty), mask=at + 1 < size)
    tl.store(to + 2, (r1 * tl.cos(t1)).to(out.dtype.element_ty), mask=at + 2 < size)
    tl.store(to + 3, (r1 * tl.sin(t1)).to(out.dtype.element_ty), mask=at + 3 < size)


def philox_normal(keys: Tensor, slots: Tensor, step: int, call: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return normals of the streams, shape (m, size)."""
    out = torch.empty(len(slots), size, dtype=dtype, device=slots.device)
    if out.numel():
        grid = (len(slots), triton.cdiv(size, 4 * _BLOCK))
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernel[grid](out, keys.contiguous(), slots.contiguous(), step, call, size, BLOCK=_BLOCK)
    return out
