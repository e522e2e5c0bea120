"""Measurements of single pixels: seen or not, and through a curve; their log-density and its gradient in one pass.

What autograd, torch.compile or torch.func follow takes the reference, which they can follow; the faster versions serve
calls outside of them, as samplers make them.
"""

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import plain, version
from invdiff.kernels.pixelwise import reference
from invdiff.kernels.pixelwise.curve import Curve

__all__ = ["Curve", "gather", "misfit", "spread"]

_LEAST = 2**15
"""Values from which the compiled version is faster than PyTorch's operations on a CPU."""


def _version(x: Tensor, size: int) -> ModuleType:
    name = version("pixelwise", x) if plain(x) else "reference"
    if name == "gpu" and x.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        from invdiff.kernels.pixelwise import gpu

        return gpu
    if name == "cpu" and size >= _LEAST and x.dtype in (torch.float64, torch.float32):
        from invdiff.kernels.pixelwise import cpu

        return cpu
    return reference


def _check(t: Tensor, size: int, table: Tensor) -> None:
    if t.ndim != 2 or t.shape[1] != size:
        raise ShapeError(f"Flat pictures or measurements must be (n, {size}), got {tuple(t.shape)}.")
    if t.device != table.device:
        raise InputError(f"The tables are on {table.device}, the values on {t.device}; bring them together.")


def gather(x: Float[Tensor, "n d"], index: Int[Tensor, " m"], place: Int[Tensor, " d"]) -> Float[Tensor, "n m"]:
    """Return the seen entries of flat pictures.

    Parameters
    ----------
    x
        Pictures, any unit.
    index, place
        Which entries are seen, int64; and the place of every entry among them, -1 where it is not seen, int32.

    Raises
    ------
    ShapeError, InputError
        If sizes or devices do not fit each other.
    """
    _check(x, len(place), place)
    result: Tensor = _version(x, x.numel()).gather(x, index)
    return result


def spread(y: Float[Tensor, "n m"], index: Int[Tensor, " m"], place: Int[Tensor, " d"]) -> Float[Tensor, "n d"]:
    """Return zeros with the seen entries in their places: the transpose of `gather`.

    Parameters
    ----------
    y
        Seen entries.
    index, place
        As in `gather`.

    Raises
    ------
    ShapeError, InputError
        If sizes or devices do not fit each other.
    """
    _check(y, len(index), place)
    result: Tensor = _version(y, len(y) * len(place)).spread(y, index, place)
    return result


def misfit(
    x: Float[Tensor, "n d"],
    y: Float[Tensor, "k m"],
    std: Float[Tensor, "*s"],
    index: Int[Tensor, " m"] | None = None,
    place: Int[Tensor, " d"] | None = None,
    curve: Curve | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n d"]]:
    r"""Chi-square ``sum ((y - f(x)) / std)^2`` over the seen entries, and the gradient of -1/2 of it.

    Sums are in float32 for half types, in the pictures' type else, or better.

    Parameters
    ----------
    x
        Pictures.
    y
        One measurement, or one a picture.
    std
        Noise in units of y: a scalar, or one value a seen entry.
    index, place
        As in `gather`; None where all entries are seen.
    curve
        f; the identity if None.

    Raises
    ------
    ShapeError
        If the measurements are neither one nor as many as the pictures, or do not fit them.
    InputError
        If types or devices differ.
    """
    if place is not None:
        _check(x, len(place), place)
    seen = x.shape[1] if index is None else len(index)
    if y.shape[1] != seen or len(y) not in (1, len(x)) or std.numel() not in (1, seen):
        raise ShapeError(
            f"Measurements must be (1 or {len(x)}, {seen}) with a noise of 1 or {seen} values, got {tuple(y.shape)} "
            f"and {tuple(std.shape)}."
        )
    if {y.dtype, std.dtype} != {x.dtype} or {y.device, std.device} != {x.device}:
        raise InputError(
            f"Pictures are {x.dtype} on {x.device}, measurements {y.dtype} on {y.device}, their noise {std.dtype} on "
            f"{std.device}; bring them together."
        )
    result: tuple[Tensor, Tensor] = _version(x, x.numel()).misfit(
        x.contiguous(), y, std.reshape(-1), index, place, curve or Curve()
    )
    return result
