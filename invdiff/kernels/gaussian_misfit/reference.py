"""Gaussian residuals in plain PyTorch."""

from torch import Tensor


def misfit(p: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, m) of the log-density; see `invdiff.kernels.gaussian_misfit.misfit`."""
    s = _along(p, std)
    w = (y - p) / s
    return (w.abs() ** 2).sum(1), w / s


def chi_square(p: Tensor, y: Tensor, std: Tensor) -> Tensor:
    """Chi-square (n,); see `invdiff.kernels.gaussian_misfit.chi_square`."""
    return (((y - p) / _along(p, std)).abs() ** 2).sum(1)


def _along(p: Tensor, std: Tensor) -> Tensor:
    return std.to(p.real.dtype if p.is_complex() else p.dtype)


def spread(std: Tensor, m: int) -> Tensor:
    """Noise of each of m real values: the two parts of a complex one share theirs."""
    return std.repeat_interleave(2) if len(std) not in (1, m) else std
