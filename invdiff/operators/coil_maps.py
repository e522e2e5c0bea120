"""Sensitivities of receiver coils for magnetic resonance imaging: simulated ones, and the check of given ones."""

from math import isfinite, sqrt, tau

import torch
from jaxtyping import Complex
from torch import Tensor

from invdiff.errors import InputError, ShapeError


def birdcage_maps(coils: int, shape: tuple[int, int], *, radius: float = 1.5) -> Complex[Tensor, "coils h w"]:
    r"""Sensitivities of coils on a circle around the picture: smooth, complex, with sum_c \|s_c\|^2 = 1 in every pixel.

    Each coil is the rung of a birdcage, a long straight wire across the picture's plane at z_c = radius exp(i theta_c).
    By the law of Biot and Savart its field in the plane, B_x + i B_y, is proportional to i / conj(z - z_c) at z = x +
    i y, and by reciprocity a coil receives in proportion to B_x - i B_y (Hoult 2000, Concepts Magn. Reson. 12(4),
    173-187):

        s_c(z) = -i / (z - z_c) / sqrt(sum_b 1 / \|z - z_b\|^2)

    Parameters
    ----------
    coils
        Number of coils, at least 1; coil 0 is at the end of the columns' axis, the others follow at equal angles
        towards the end of the rows' axis.
    shape
        (h, w) of the picture, whose longer side spans [-1, 1].
    radius
        Of the circle on that scale; above sqrt(2), so that no wire runs through the picture. Closer coils see less of
        what lies opposite, and their maps differ more.

    Returns
    -------
    Tensor
        Sensitivities in complex128; the same at every call.

    Raises
    ------
    InputError
        If there is no coil, the picture is empty or the radius too small or infinite.
    """
    h, w = shape
    if coils < 1 or min(h, w) < 1:
        raise InputError(f"birdcage_maps needs at least one coil and one pixel, got {coils} for shape {(h, w)}.")
    if not sqrt(2.0) < radius or not isfinite(radius):
        raise InputError(f"radius must be finite and above sqrt(2), outside the picture's corners, got {radius}.")
    side = max(h, w)
    y, x = ((2.0 * torch.arange(n, dtype=torch.float64) - (n - 1)) / side for n in (h, w))
    angle = tau / coils * torch.arange(coils, dtype=torch.float64)
    place = torch.polar(torch.full_like(angle, radius), angle)
    field = -1j / (x + 1j * y[:, None] - place[:, None, None])
    maps: Tensor = field / torch.linalg.vector_norm(field, dim=0)
    return maps


def check_maps(maps: Tensor, size: tuple[int, int]) -> int:
    """Return the number of coils of maps that are complex (coils, h, w), finite and not all 0.

    Parameters
    ----------
    maps
        The maps.
    size
        (h, w) of the picture.

    Raises
    ------
    ShapeError
        If they do not fit the picture.
    InputError
        If they are not complex, not finite or 0 everywhere.
    """
    if not maps.is_complex():
        raise InputError(f"coil_maps must be complex, got {maps.dtype}; make them with torch.complex(real, imaginary).")
    if maps.ndim != 3 or len(maps) == 0 or tuple(maps.shape[1:]) != size:
        raise ShapeError(f"coil_maps must be (coils, {size[0]}, {size[1]}), got {tuple(maps.shape)}.")
    if not bool(torch.isfinite(maps).all()):
        raise InputError("coil_maps must be finite; some entries are NaN or infinite, set those to 0.")
    if not bool((maps != 0).any()):
        raise InputError("coil_maps are 0 everywhere: no coil receives anything; give the sensitivities.")
    return len(maps)
