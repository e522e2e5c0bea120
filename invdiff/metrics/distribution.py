"""Distances between two sets of draws."""

from math import prod

import torch
from torch import Tensor

from invdiff.errors import ShapeError


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance of two sets of equally many draws (Rabin et al. 2011), in the values' units.

    Parameters
    ----------
    a, b
        Draws (n, *event).
    projections, seed
        Number of random directions, and their seed.

    Raises
    ------
    ShapeError
        If the sets differ in shape.
    """
    if a.shape != b.shape:
        raise ShapeError(f"Compare sets of one shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    d = prod(a.shape[1:])
    directions = torch.randn(d, projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(a.device)
    directions = directions / directions.norm(dim=0)
    pa, pb = ((t.flatten(1).double() @ directions).sort(dim=0).values for t in (a, b))
    return float((pa - pb).square().mean().sqrt())
