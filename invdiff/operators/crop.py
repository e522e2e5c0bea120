"""Crop: what a picture shows of a larger scene, so that a prior's grid may be larger than the measured part."""

from types import EllipsisType
from typing import final

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.separable import picture_shape


@final
class Crop(LinearOperator):
    """Cut a window out of a picture; its adjoint puts the window back into zeros.

    A picture whose sides do not suit a network is the crop of a scene whose sides do: ``A @ Crop(...)`` measures the
    window alone, and what lies around it is unknown, not invented.

    Parameters
    ----------
    shape
        Shape (c, height, width) of the scene.
    size
        (height, width) of the window.
    corner
        (top, left) of the window; None centres it, rounding down.

    Raises
    ------
    ShapeError
        If the window does not lie inside the scene.
    """

    mask: Tensor

    def __init__(
        self, shape: tuple[int, int, int], size: tuple[int, int], corner: tuple[int, int] | None = None
    ) -> None:
        c, height, width = picture_shape(shape)
        h, w = size
        top, left = ((height - h) // 2, (width - w) // 2) if corner is None else corner
        if min(h, w) < 1 or min(top, left) < 0 or top + h > height or left + w > width:
            raise ShapeError(
                f"A window of {(h, w)} pixels at {(top, left)} does not lie inside a scene of {(height, width)} pixels."
            )
        super().__init__((c, height, width), (c, h, w))
        self.corner = (top, left)
        mask = torch.zeros(c, height, width, dtype=torch.bool)
        mask[self._window] = True
        self.register_buffer("mask", mask)

    @property
    def _window(self) -> tuple[EllipsisType, slice, slice]:
        (top, left), (_, h, w) = self.corner, self.out_shape
        return (..., slice(top, top + h), slice(left, left + w))

    def forward(self, x: Tensor) -> Tensor:
        """Cut: (n, c, height, width) -> (n, c, h, w)."""
        return x[self._window]

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros around the window: (n, c, h, w) -> (n, c, height, width)."""
        (top, left), (_, h, w), (_, height, width) = self.corner, self.out_shape, self.in_shape
        return torch.nn.functional.pad(y, (left, width - left - w, top, height - top - h))

    @property
    def svd(self) -> SVD:
        """The diagonalisation in the scene's standard basis; singular values are 1 inside the window, else 0."""

        def same(x: Tensor) -> Tensor:
            return x

        return SVD(self.mask.double(), self.forward, self.adjoint, same, same)
