"""Bands along rows and columns in one pass of Triton: a program makes one tile of outputs from its window of inputs.

Both sums are small matrix products of the window with the tile's rows of the two matrices, so that boundaries, strides
and zero insertion are all in the tables, and the tensor cores do the sums. Float32 goes through them as three products
in TF32 ("tf32x3"), which keeps float32's accuracy, and half types with float32 weights and sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 32
"""Inputs a step of the sums; windows are multiples of it."""


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    out, x, lf, lw, rf, rw, c, h, w, p, q, lc, rc, KL: tl.constexpr, KR: tl.constexpr, B: tl.constexpr, S: tl.constexpr
):
    right_block, left_block, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    channel = (plane % c).to(tl.int32)
    top, begin = tl.load(lf + left_block).to(tl.int32), tl.load(rf + right_block).to(tl.int32)
    i, k = tl.arange(0, B), tl.arange(0, S)
    # Tables hold the blocks of the first channel, then of the second; one channel's serve all where there is one.
    left = lw + ((channel % lc) * tl.num_programs(1) + left_block).to(tl.int64) * (B * KL)
    right = rw + ((channel % rc) * tl.num_programs(0) + right_block).to(tl.int64) * (B * KR)
    picture = x + plane * h * w
    total = tl.zeros((B, B), tl.float32)
    for kr in range(0, KR, S):
        columns = begin + kr + k
        columns = tl.where(columns >= w, columns - w, columns)
        rows_done = tl.zeros((B, S), tl.float32)
        for kl in range(0, KL, S):
            rows = top + kl + k
            rows = tl.where(rows >= h, rows - h, rows)
            # A window longer than the picture has zeros there, but 0 times what lies outside need not be 0.
            inside = (rows < h)[:, None] & (columns < w)[None, :]
            tile = tl.load(picture + rows.to(tl.int64)[:, None] * w + columns[None, :], mask=inside, other=0.0)
            weights = tl.load(left + i[:, None] * KL + (kl + k)[None, :])
            rows_done = tl.dot(weights, tile.to(tl.float32), rows_done, input_precision="tf32x3")
        weights = tl.load(right + i[None, :] * KR + (kr + k)[:, None])
        total = tl.dot(rows_done, weights, total, input_precision="tf32x3")
    y, z = left_block * B + i, right_block * B + i
    to = out + plane * p * q + y.to(tl.int64)[:, None] * q + z[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(y < p)[:, None] & (z < q)[None, :])


def separable_stencil(x: Tensor, tables: list[Tensor], rows: int, columns: int) -> Tensor:
    """Apply the bands: (n, c, h, w) -> (n, c, rows, columns); see `invdiff.kernels.separable_stencil`."""
    left_first, left_weights, right_first, right_weights = tables
    n, c, h, w = x.shape
    out = torch.empty(n, c, rows, columns, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    most = 65535 // c * c  # of the grid's third axis, in whole pictures
    for start in range(0, n * c if out.numel() else 0, max(most, c)):
        planes = min(most, n * c - start)
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernel[(len(right_first), len(left_first), planes)](
                out.view(-1, rows, columns)[start:],
                x.view(-1, h, w)[start:],
                left_first,
                left_weights,
                right_first,
                right_weights,
                c,
                h,
                w,
                rows,
                columns,
                len(left_weights),
                len(right_weights),
                KL=left_weights.shape[-1],
                KR=right_weights.shape[-1],
                B=left_weights.shape[-2],
                S=STEP,
                num_warps=4,
            )
    return out
