"""Distances between two sets of draws."""

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import ShapeError


def sliced_wasserstein(
    a: Float[Tensor, " n *event"], b: Float[Tensor, " n *event"], *, projections: int = 256, seed: int = 0
) -> float:
    """Sliced 2-Wasserstein distance of two sets of equally many draws (Rabin et al. 2011), in the values' units.

    The root of the mean, over random unit directions, of the squared distance of the projected sets: sets shifted
    against each other by s in d dimensions are |s| / sqrt(d) apart on average.

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
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(prod(a.shape[1:]), projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    pa, pb = ((t.flatten(1).double() @ directions).sort(dim=0).values for t in (a, b))
    return float((pa - pb).square().mean().sqrt())
