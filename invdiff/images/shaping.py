"""Padding and resizing of pictures."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError


def pad_to_multiple(x: Float[Tensor, "c h w"], multiple: int) -> tuple[Float[Tensor, "c H W"], tuple[slice, slice]]:
    """Pad a picture at the bottom and right, by reflection, to sides divisible by `multiple`.

    Returns
    -------
        The padded picture, and the slices of rows and columns that crop it back.

    Raises
    ------
    InputError
        If `multiple` is less than 1.
    """
    if multiple < 1:
        raise InputError(f"Sides can be made divisible by a positive number only, got {multiple}.")
    h, w = x.shape[-2:]
    rows, columns = (torch.arange(-(-side // multiple) * multiple) for side in (h, w))

    def reflected(i: Tensor, side: int) -> Tensor:
        period = max(1, 2 * (side - 1))
        i = i % period
        return torch.where(i < side, i, period - i)

    padded = x[..., reflected(rows, h), :][..., reflected(columns, w)]
    return padded, (slice(0, h), slice(0, w))


def resize_image(x: Float[Tensor, "c h w"], long_side: int) -> Float[Tensor, "c H W"]:
    """Scale a picture to a longer side of `long_side` pixels, anti-aliased bicubic, clipped to [0, 1].

    Raises
    ------
    InputError
        If `long_side` is less than 1.
    """
    if long_side < 1:
        raise InputError(f"A picture's longer side has at least 1 pixel, got {long_side}.")
    scale = long_side / max(x.shape[-2:])
    size = [max(1, round(side * scale)) for side in x.shape[-2:]]
    return F.interpolate(x[None], size=size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0.0, 1.0)
