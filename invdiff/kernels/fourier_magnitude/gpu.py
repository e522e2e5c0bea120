"""Fourier magnitudes and their residuals in Triton: a program takes a block of a half spectrum and both its images.

Frequency (a, b) of the half lies at ((a + h // 2) mod h, (b + w // 2) mod w) of the whole plane, and -(a, b) at
((h // 2 - a) mod h, w // 2 - b). The columns b = 0, and b = w / 2 of an even width, are their own images: they are
counted once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 512


@triton.jit
def _places(e, h, w, k):  # type: ignore[no-untyped-def]
    """Places in the plane of the frequencies e of the half and of their negatives, and whether those are other ones."""
    a, b = e // k, e % k
    row, image_row = (a + h // 2) % h, (h + h // 2 - a) % h
    return row * w + (b + w // 2) % w, image_row * w + w // 2 - b, (b > 0) & (2 * b < w)


@triton.jit
def _polar(half, e, there, scale):  # type: ignore[no-untyped-def]
    """Cosine and sine of the phases, zero where there is none, and magnitudes; safe from under- and overflow."""
    re, im = tl.load(half + 2 * e, mask=there, other=0.0), tl.load(half + 2 * e + 1, mask=there, other=0.0)
    unit = tl.maximum(tl.abs(re), tl.abs(im))
    unit = tl.where(unit > 0, unit, 1.0)
    re, im = re / unit, im / unit
    r = tl.sqrt(re * re + im * im)
    safe = tl.where(r == 0, 1.0, r)
    return re / safe, im / safe, r * unit * scale


@triton.jit  # type: ignore[untyped-decorator]
def _magnitudes(out, half, h, w, k, blocks, SCALE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    plane, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    there = e < h * k
    scale = tl.full((BLOCK,), SCALE, out.dtype.element_ty)  # a bare number would be float32
    _, _, magnitude = _polar(half + plane * (2 * h * k), e, there, scale)
    place, image, other = _places(e, h, w, k)
    tl.store(out + plane * h * w + place, magnitude, mask=there)
    tl.store(out + plane * h * w + image, magnitude, mask=there & other)


@triton.jit  # type: ignore[untyped-decorator]
def _misfit(  # type: ignore[no-untyped-def]
    half, sums, y, std, c, measured, h, w, k, blocks, SCALE: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr
):
    plane, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    e = block * BLOCK + tl.arange(0, BLOCK)
    there = e < h * k
    kind = sums.dtype.element_ty
    scale = tl.full((BLOCK,), SCALE, kind)  # a bare number would be float32
    spectrum = half + plane * (2 * h * k)
    cosine, sine, magnitude = _polar(spectrum, e, there, scale)
    place, image, other = _places(e, h, w, k)
    y += (plane // c % measured * c + plane % c) * h * w
    if DIAGONAL:
        std += plane % c * h * w
        s, image_s = tl.load(std + place, mask=there, other=1.0), tl.load(std + image, mask=there, other=1.0)
    else:
        s = tl.zeros((BLOCK,), kind) + tl.load(std)
        image_s = s
    v = tl.where(there, (tl.load(y + place, mask=there, other=0.0) - magnitude) / s, 0.0)
    image_v = tl.where(there, (tl.load(y + image, mask=there, other=0.0) - magnitude) / image_s, 0.0)
    c_even = 0.5 * (v / s + image_v / image_s) * scale
    tl.store(spectrum + 2 * e, c_even * cosine, mask=there)
    tl.store(spectrum + 2 * e + 1, c_even * sine, mask=there)
    tl.store(sums + plane * blocks + block, tl.sum(v * v + tl.where(other, image_v * image_v, 0.0), 0))


def magnitudes(half: Tensor, width: int) -> Tensor:
    """Magnitudes (n, c, h, w); see `invdiff.kernels.fourier_magnitude.magnitudes`."""
    n, c, h, k = half.shape
    out = torch.empty(n, c, h, width, dtype=half.real.dtype, device=half.device)
    blocks = triton.cdiv(h * k, _BLOCK)
    if out.numel():
        with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _magnitudes[(n * c * blocks,)](
                out, torch.view_as_real(half), h, width, k, blocks, SCALE=(h * width) ** -0.5, BLOCK=_BLOCK
            )
    return out


def misfit(half: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and spectrum of the gradient; see `invdiff.kernels.fourier_magnitude.misfit`."""
    n, c, h, k = half.shape
    blocks = triton.cdiv(h * k, _BLOCK)
    sums = torch.empty(n, c * blocks, dtype=y.dtype, device=half.device)
    if sums.numel():
        with torch.cuda.device_of(half):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _misfit[(n * c * blocks,)](
                torch.view_as_real(half), sums, y.contiguous(), std.contiguous(), c, len(y), h, y.shape[-1], k, blocks,
                SCALE=(h * y.shape[-1]) ** -0.5, DIAGONAL=std.ndim > 0, BLOCK=_BLOCK,
            )  # fmt: skip
    return sums.sum(1), half
