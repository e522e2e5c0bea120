"""A circular convolution's residuals in the Fourier domain in Triton: one read and one write of the half spectra."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@triton.jit  # type: ignore[untyped-decorator]
def _misfit(  # type: ignore[no-untyped-def]
    half, sums, measured, response, std, c, others, kernels, size, w, k, blocks,
    INVERSE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    plane, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    there = e < size
    channel, b = plane % c, e % k
    x = half + plane * (2 * size) + 2 * e
    y = measured + (plane // c % others * c + channel) * (2 * size) + 2 * e
    h = response + channel % kernels * (2 * size) + 2 * e
    x_re, x_im = tl.load(x, mask=there, other=0.0), tl.load(x + 1, mask=there, other=0.0)
    h_re, h_im = tl.load(h, mask=there, other=0.0), tl.load(h + 1, mask=there, other=0.0)
    r_re = tl.load(y, mask=there, other=0.0) - (h_re * x_re - h_im * x_im)
    r_im = tl.load(y + 1, mask=there, other=0.0) - (h_re * x_im + h_im * x_re)
    kind = sums.dtype.element_ty
    s = tl.zeros((BLOCK,), kind) + tl.load(std)
    inverse = tl.full((BLOCK,), INVERSE, kind)  # a bare number would be float32
    r_re, r_im = r_re / s, r_im / s
    factor = inverse / s
    tl.store(x, (h_re * r_re + h_im * r_im) * factor, mask=there)
    tl.store(x + 1, (h_re * r_im - h_im * r_re) * factor, mask=there)
    often = tl.where((b > 0) & (2 * b < w), 2.0, 1.0).to(kind)  # of a column and its mirror image
    tl.store(sums + plane * blocks + block, tl.sum(often * (r_re * r_re + r_im * r_im) * inverse, 0))


def misfit(half: Tensor, measured: Tensor, response: Tensor, std: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and spectrum of the gradient; see `invdiff.kernels.spectral_misfit.misfit`."""
    n, c, h, k = half.shape
    blocks = triton.cdiv(h * k, _BLOCK)
    sums = torch.empty(n, c * blocks, dtype=std.dtype, device=half.device)
    if sums.numel():
        with torch.cuda.device_of(half):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            parts = [torch.view_as_real(t) for t in (measured, response)]
            _misfit[(n * c * blocks,)](
                torch.view_as_real(half), sums, *parts, std, c, len(measured), len(response), h * k, width, k, blocks,
                INVERSE=1.0 / (h * width), BLOCK=_BLOCK,
            )  # fmt: skip
    return sums.sum(1), half
