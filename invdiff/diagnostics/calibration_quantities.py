r"""What is ranked: functions of an event, many of them linear, none of which is singled out by the prior or the data.

Ranks of single values see errors of the marginal laws; random projections and frequencies those of the joint law; the
event's variance and roughness see draws that are too rough or too smooth as a whole, where every value alone looks
right within its wide interval. What only the measurement tells (`calibrate` ranks the log-likelihood, too) is not seen
by any of them: draws of the prior would pass (Modrák et al. 2023, arXiv 2211.02383).
"""

from collections.abc import Callable
from math import prod, tau

import torch
from torch import Tensor

Quantity = Callable[[Tensor], Tensor]
"""A function of events (n, *event), physical units, to (n,) or, for several components of one kind, (n, m)."""

BANDS = {"low frequencies": (0.0, 0.125), "middle frequencies": (0.125, 0.5), "high frequencies": (0.5, 1.0)}
"""Ranges of the radial frequency |f|, in units of its largest on the grid."""


def default_quantities(shape: tuple[int, ...], seed: int = 0) -> dict[str, Quantity]:
    """Quantities for events of a shape: values, mean, variance, roughness, projections and frequencies.

    Parameters
    ----------
    shape
        Shape of one event; the first of several axes counts channels.
    seed
        Chooses the values, projections and frequencies.

    Returns
    -------
        By name: ``values`` (up to 16, well apart), ``mean``, ``variance`` (of the event's values about their mean),
        ``roughness`` (mean squared difference of neighbours along the last axis), ``projections`` (4 random directions)
        and, where the grid is large enough to have some, the real and imaginary parts of two coefficients each of
        ``low``, ``middle`` and ``high frequencies``, of the mean over channels.
    """
    size = prod(shape)
    generator = torch.Generator().manual_seed(seed)
    index = spread_values(shape, 16, generator)
    found: dict[str, Quantity] = {"values": lambda x: x.flatten(1)[:, index.to(x.device)], "mean": _mean}
    if size > 1:
        found |= {"variance": _variance}
    if shape[-1] > 1:
        found |= {"roughness": _roughness}
    found |= {"projections": _projection(torch.randn(size, 4, generator=generator, dtype=torch.float64) / size**0.5)}
    for name, (low, high) in BANDS.items():
        waves = _waves(shape, low, high, generator)
        if waves.shape[1]:
            found[name] = _projection(waves)
    return found


def spread_values(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """Flat indices of up to ``count`` values well apart on the grid, taking turns over the channels; rising, distinct.

    The points are a Kronecker sequence, frac(u + k / phi^j), j = 1 to dim, with phi^(dim + 1) = phi + 1, the golden
    ratio for dim = 1, and a random shift u.
    """
    channels, grid = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    phi = 1.5
    for _ in range(60):
        phi = (1.0 + phi) ** (1.0 / (len(grid) + 1))
    k = torch.arange(min(count, prod(shape)), dtype=torch.float64)
    flat = (torch.arange(len(k)) + int(torch.randint(channels, (), generator=generator))) % channels
    for j, side in enumerate(grid, start=1):
        shift = torch.rand((), generator=generator, dtype=torch.float64)
        flat = flat * side + ((shift + k / phi**j) % 1.0 * side).long().clamp(max=side - 1)
    distinct: Tensor = torch.unique(flat)
    return distinct


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).double().mean(1)


def _variance(x: Tensor) -> Tensor:
    return x.flatten(1).double().var(1)


def _roughness(x: Tensor) -> Tensor:
    return x.double().diff(dim=-1).square().flatten(1).mean(1)


def _projection(directions: Tensor) -> Quantity:
    return lambda x: x.flatten(1).double() @ directions.to(x.device)


def _waves(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Cosines and sines of two wave vectors in a band, orthonormal on the mean over channels; (size, 4 or fewer)."""
    channels, grid = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
    axes = [torch.fft.fftfreq(side, dtype=torch.float64) for side in grid]
    f = torch.stack([t.flatten() for t in torch.meshgrid(*axes, indexing="ij")], dim=1)
    radius = f.norm(dim=1) / f.norm(dim=1).max().clamp_min(1e-12)
    # A positive first frequency leaves one of f and -f, and none that is its own mirror image with a sine of zero.
    able = ((radius > low) & (radius <= high) & (f[:, 0] > 0.0)).nonzero()[:, 0]
    chosen = f[able[torch.randperm(len(able), generator=generator)[:2]]]
    positions = torch.stack(
        [t.flatten() for t in torch.meshgrid(*[torch.arange(s, dtype=torch.float64) for s in grid], indexing="ij")]
    )
    phase = tau * (chosen @ positions)
    waves = torch.cat([phase.cos(), phase.sin()]) * (2.0 / len(f)) ** 0.5
    both: Tensor = (waves / channels).repeat(1, channels).T.contiguous()
    return both
