"""The same values in another shape: tokens in a row as a picture, or a picture as a row."""

from math import prod
from typing import final

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.operators.base import SVD, LinearOperator


@final
class Reshape(LinearOperator):
    """Values of shape ``in_shape`` in the order of their axes as ``out_shape``.

    Parameters
    ----------
    in_shape, out_shape
        Shapes of equally many values.

    Raises
    ------
    ShapeError
        If they are not.
    """

    _one: Tensor

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        if prod(in_shape) != prod(out_shape):
            raise ShapeError(f"{tuple(in_shape)} and {tuple(out_shape)} do not hold equally many values.")
        super().__init__(in_shape, out_shape)
        self.register_buffer("_one", torch.ones(()), persistent=False)  # tells the singular values their device

    def forward(self, x: Tensor) -> Tensor:
        """Into the new shape."""
        return x.reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Into the old shape."""
        return y.reshape(-1, *self.in_shape)

    @property
    def svd(self) -> SVD:
        """The diagonalisation, in the standard basis."""
        return SVD(self._one.expand(self.in_shape), self.forward, self.adjoint, lambda c: c, lambda x: x)
