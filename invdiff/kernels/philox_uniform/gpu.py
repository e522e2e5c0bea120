"""Uniforms of Philox words in Triton: a launch in place of some two hundred, and nothing in memory but the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 256


@triton.jit(do_not_specialize=["step", "call", "size"])  # type: ignore[untyped-decorator]
def _kernel(out, keys, slots, step, call, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + tl.load(slots + row).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step.to(tl.uint32)
    c3 = tl.zeros_like(c0) + call.to(tl.uint32)
    k0 = tl.zeros_like(c0) + tl.load(keys + 2 * row).to(tl.uint32)
    k1 = tl.zeros_like(c0) + tl.load(keys + 2 * row + 1).to(tl.uint32)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    w0 = tl.full(c0.shape, 0x9E3779B9, tl.uint32)
    w1 = tl.full(c0.shape, 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        h0, l0 = tl.umulhi(c0, m0), c0 * m0
        h1, l1 = tl.umulhi(c2, m1), c2 * m1
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = k0 + w0, k1 + w1
    high = tl.full(c0.shape, 67108864.0 / 9007199254740992.0, tl.float64)  # a bare number would be a float32
    low = tl.full(c0.shape, 1.0 / 9007199254740992.0, tl.float64)
    u0 = (c0 >> 5).to(tl.float64) * high + (c1 >> 6).to(tl.float64) * low
    u1 = (c2 >> 5).to(tl.float64) * high + (c3 >> 6).to(tl.float64) * low
    at = block.to(tl.int64) * 2
    to = out + row * size + at
    tl.store(to, u0, mask=at < size)
    tl.store(to + 1, u1, mask=at + 1 < size)


def philox_uniform(keys: Tensor, slots: Tensor, step: int, call: int, size: int) -> Tensor:
    """Return uniforms of the streams, float64, shape (m, size)."""
    out = torch.empty(len(slots), size, dtype=torch.float64, device=slots.device)
    if out.numel():
        grid = (len(slots), triton.cdiv(size, 2 * _BLOCK))
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernel[grid](out, keys.contiguous(), slots.contiguous(), step, call, size, BLOCK=_BLOCK)
    return out
