"""Resizing of pictures."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError


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
