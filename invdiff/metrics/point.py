"""Scores of one estimate against a truth."""

from math import inf, log10

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import ShapeError


def psnr(x: Float[Tensor, "*event"], truth: Float[Tensor, "*event"], data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio, dB; neither is clipped. Infinite for equal ones.

    Parameters
    ----------
    x, truth
        Of one shape.
    data_range
        Span of the values, 1 for pictures in [0, 1].

    Raises
    ------
    ShapeError
        If they differ in shape.
    """
    if x.shape != truth.shape:
        raise ShapeError(f"PSNR compares values of one shape, got {tuple(x.shape)} and {tuple(truth.shape)}.")
    error = float((x.double() - truth.double()).square().mean())
    return inf if error == 0.0 else 20.0 * log10(data_range) - 10.0 * log10(error)


def ssim(x: Float[Tensor, "c h w"], truth: Float[Tensor, "c h w"], data_range: float = 1.0) -> float:
    """Structural similarity (Wang et al. 2004), Gaussian window, mean over pixels and channels.

    The window has a standard deviation of 1.5 pixels and 11 x 11 taps and population moments; the mean is over the
    pixels whose window lies inside the picture, five from each border, so no rule for the border enters.

    Parameters
    ----------
    x, truth
        Pictures (c, h, w) with sides of at least 11.
    data_range
        Span of the values, 1 for pictures in [0, 1].

    Raises
    ------
    ShapeError
        If they are not two pictures of one such shape.
    """
    if x.shape != truth.shape or x.ndim != 3 or min(x.shape[1:]) < 11:
        raise ShapeError(
            "SSIM needs two pictures (c, h, w) of one shape with sides of at least 11, "
            f"got {tuple(x.shape)} and {tuple(truth.shape)}."
        )
    a, b = x.double()[:, None], truth.double()[:, None]
    t = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    w = torch.exp(-0.5 * (t / 1.5) ** 2)
    w = w / w.sum()

    def blur(p: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(p, w.reshape(1, 1, -1, 1)), w.reshape(1, 1, 1, -1))

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())
