"""A circular convolution's residuals in the Fourier domain, in plain PyTorch."""

import torch
from torch import Tensor


def misfit(half: Tensor, measured: Tensor, response: Tensor, std: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and spectrum of the gradient; see `invdiff.kernels.spectral_misfit.misfit`."""
    pixels, b = half.shape[-2] * width, torch.arange(half.shape[-1], device=half.device)
    often = 1 + ((b > 0) & (2 * b < width)).to(std.dtype)  # of a column and its mirror image
    residual = measured - response * half
    chi2 = (often * torch.view_as_real(residual / std).square().sum(-1)).flatten(1).sum(1) / pixels
    return chi2, response.conj() * residual / (std * std * pixels)
