r"""A circular convolution's residuals and the gradient of their chi-square, without leaving the Fourier domain.

With the transforms X, Y of N pixels and the kernel's response H, the residual is R = Y - H X, and by Parseval

    chi2 = 1 / (s^2 N) sum |R|^2,    G = conj(H) R / (s^2 N)

for noise of one standard deviation s. The inverse transform of G, without a factor, is the gradient of -chi2 / 2. That
is one transform there and one back, where the prediction and its adjoint take two each. Autograd does not follow it.
"""

from types import ModuleType

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.spectral_misfit import reference

__all__ = ["fused", "misfit"]

_LEAST = 2**15
"""Values of a batch of pictures from which the compiled version is taken on a CPU."""


def fused(x: Tensor) -> bool:
    """Whether a version other than the reference serves the spectra of pictures (n, c, h, w) such as x."""
    return x.dtype in (torch.float32, torch.float64) and plain(x) and _version(x) is not reference


def _version(t: Tensor) -> ModuleType:
    name = version("spectral_misfit", t)
    if name == "gpu":
        from invdiff.kernels.spectral_misfit import gpu

        return gpu
    if name == "cpu" and t.numel() >= _LEAST:
        from invdiff.kernels.spectral_misfit import cpu

        return cpu
    return reference


def misfit(
    half: Complex[Tensor, "n c h k"],
    measured: Complex[Tensor, "b c h k"],
    response: Complex[Tensor, "r h k"],
    std: Float[Tensor, ""],
    width: int,
) -> tuple[Float[Tensor, " n"], Complex[Tensor, "n c h k"]]:
    """Chi-square of the residuals, and G; ``torch.fft.irfft2(G, s=(h, width), norm="forward")`` is the gradient.

    Parameters
    ----------
    half, measured
        ``torch.fft.rfft2``, without a factor, of the pictures, and of one measurement or one a picture. The memory of
        the former may be overwritten: G is made in place.
    response
        The kernel's transform; one for all channels, or one each.
    std
        Positive, in units of the measurement, in the real type of the spectra.
    width
        Pixels a row, of which k = width // 2 + 1.

    Raises
    ------
    ShapeError
        If the spectra do not fit each other or the width.
    InputError
        If types or devices differ.
    """
    if half.ndim != 4 or half.shape[-1] != width // 2 + 1:
        raise ShapeError(f"Half spectra of width {width} are (n, c, h, {width // 2 + 1}), got {tuple(half.shape)}.")
    n, c = half.shape[:2]
    fits = measured.shape[1:] == half.shape[1:] and response.shape[1:] == half.shape[2:]
    if not fits or len(measured) not in (1, n) or len(response) not in (1, c):
        raise ShapeError(
            f"Spectra {tuple(half.shape)} need measured ones (1 or {n}, c, h, k) and responses (1 or {c}, h, k), got "
            f"{tuple(measured.shape)} and {tuple(response.shape)}."
        )
    if {measured.dtype, response.dtype} != {half.dtype} or std.dtype != half.real.dtype:
        raise InputError(
            f"Spectra are {half.dtype}, {measured.dtype} and {response.dtype}, the noise {std.dtype}; give all in one "
            "precision."
        )
    if {measured.device, response.device, std.device} != {half.device}:
        raise InputError(
            f"Spectra are on {half.device}, {measured.device} and {response.device}, the noise on {std.device}; bring "
            "them together."
        )
    tensors = (half.contiguous(), measured.contiguous(), response.contiguous(), std)
    result: tuple[Tensor, Tensor] = _version(half).misfit(*tensors, width)
    return result
