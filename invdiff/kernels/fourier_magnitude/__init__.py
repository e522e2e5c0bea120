r"""What surrounds the transform in phase retrieval: magnitudes of a real picture's spectrum, and their residuals.

A real picture of h x w samples has |F(-k)| = |F(k)|, so the half H of its transform (h, w // 2 + 1) holds all. With
t = 1 / sqrt(h w), for the orthonormal transform, the measured magnitudes are ``t |H|`` at k and at -k, frequency zero
in the centre. For measurements y with noise s the log-density's gradient with respect to the picture is the inverse
transform, without a factor, of

    G(k) = t / 2 (c(k) + c(-k)) H(k) / |H(k)|,    c = (y - t |H|) / s^2,

and 0 where a magnitude is 0. Both are one pass over H and y. Autograd does not follow them.
"""

from types import ModuleType

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.fourier_magnitude import reference
from invdiff.kernels.fourier_magnitude.reference import whole

__all__ = ["fused", "magnitudes", "misfit", "whole"]

_LEAST = 2**14
"""Values of a picture's batch from which the compiled version is faster than PyTorch's operations on a CPU."""


def fused(x: Tensor) -> bool:
    """Whether a version other than the reference serves the spectra of pictures (n, c, h, w) such as x."""
    return x.dtype in (torch.float32, torch.float64) and plain(x) and _version(x) is not reference


def _version(t: Tensor) -> ModuleType:
    name = version("fourier_magnitude", t)
    if name == "gpu":
        from invdiff.kernels.fourier_magnitude import gpu

        return gpu
    if name == "cpu" and t.numel() >= _LEAST:
        from invdiff.kernels.fourier_magnitude import cpu

        return cpu
    return reference


def magnitudes(half: Complex[Tensor, "n c h k"], width: int) -> Float[Tensor, "n c h w"]:
    """Return the orthonormal transform's magnitudes, frequency zero in the centre.

    Parameters
    ----------
    half
        ``torch.fft.rfft2`` of real pictures of that width, without a factor; any unit.
    width
        w, of which k = w // 2 + 1.

    Raises
    ------
    ShapeError
        If the half is not that of the width.
    """
    _check(half, width)
    result: Tensor = _version(half).magnitudes(half.contiguous(), width)
    return result


def misfit(
    half: Complex[Tensor, "n c h k"], y: Float[Tensor, "b c h w"], std: Float[Tensor, "*s"]
) -> tuple[Float[Tensor, " n"], Complex[Tensor, "n c h k"]]:
    """Chi-square of the magnitudes' residuals, and G, whose inverse transform is the gradient of -1/2 of it.

    ``torch.fft.irfft2(G, s=(h, w), norm="forward")`` is that gradient with respect to the picture.

    Parameters
    ----------
    half
        As in `magnitudes`. Its memory may be overwritten: G is made in place.
    y
        One measurement, or one a picture, frequency zero in the centre.
    std
        Noise in units of y: a scalar, or (c, h, w).

    Raises
    ------
    ShapeError
        If the measurements are neither one nor as many as the pictures, or do not fit them.
    InputError
        If types or devices differ.
    """
    _check(half, y.shape[-1])
    if y.shape[1:3] != half.shape[1:3] or len(y) not in (1, len(half)) or (std.ndim and std.shape != y.shape[1:]):
        raise ShapeError(
            f"Measurements of spectra {tuple(half.shape)} are (1 or {len(half)}, c, h, w) with a scalar noise or one "
            f"of (c, h, w), got {tuple(y.shape)} and {tuple(std.shape)}."
        )
    if {y.dtype, std.dtype} != {half.real.dtype} or {y.device, std.device} != {half.device}:
        raise InputError(
            f"Spectra are {half.dtype} on {half.device}, measurements {y.dtype} on {y.device}, their noise {std.dtype} "
            f"on {std.device}; bring them together."
        )
    result: tuple[Tensor, Tensor] = _version(half).misfit(half.contiguous(), y, std)
    return result


def _check(half: Tensor, width: int) -> None:
    if half.ndim != 4 or half.shape[-1] != width // 2 + 1:
        raise ShapeError(f"Half spectra of width {width} are (n, c, h, {width // 2 + 1}), got {tuple(half.shape)}.")
