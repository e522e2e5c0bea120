"""Scores of one estimate against a truth."""

import torch
import torch.nn.functional as F
from torch import Tensor

from invdiff.errors import ShapeError


def psnr(x: Tensor, truth: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio, dB; neither is clipped. Infinite for equal ones."""
    error = float((x.double() - truth.double()).square().mean())
    return float("inf") if error == 0.0 else float(10.0 * torch.log10(torch.tensor(data_range**2 / error, dtype=torch.float64)))


def ssim(x: Tensor, truth: Tensor, data_range: float = 1.0) -> float:
    """Structural similarity (Wang et al. 2004), Gaussian window of standard deviation 1.5, mean over pixels and channels.

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
        raise ShapeError(f"SSIM needs two pictures (c, h, w) of one shape with sides of at least 11, got {x.shape}, {truth.shape}.")
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
