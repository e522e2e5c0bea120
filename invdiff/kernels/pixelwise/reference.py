"""Pixelwise measurements in plain PyTorch."""

from torch import Tensor

from invdiff.kernels.pixelwise.curve import Curve


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the seen entries: (n, d) -> (n, m)."""
    return x.index_select(1, index)


def spread(y: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """Return zeros with the seen entries in their places: (n, m) -> (n, d)."""
    return y.new_zeros(len(y), len(place)).index_copy(1, index, y)


def misfit(
    x: Tensor, y: Tensor, std: Tensor, index: Tensor | None, place: Tensor | None, curve: Curve
) -> tuple[Tensor, Tensor]:
    """Chi-square (n,) and gradient (n, d) of the log-density; see `invdiff.kernels.pixelwise.misfit`."""
    u = curve.gain * x - curve.offset
    seen = u.clamp(curve.low, curve.high)
    w = (y - (seen if index is None else gather(seen, index))) / std
    g = w / std
    g = g if index is None or place is None else spread(g, index, place)
    inside = (u >= curve.low) & (u <= curve.high)
    return (w**2).sum(1), g * inside * curve.gain
