"""Diagonal: a factor for every value."""

from typing import final

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import SVD, LinearOperator


@final
class Diagonal(LinearOperator):
    """Multiplication of every value by its own factor.

    Parameters
    ----------
    values
        Factors, finite, that broadcast to the shape. A constant: no gradient flows into it.
    shape
        Shape of one input; the values' if None.

    Raises
    ------
    ShapeError
        If the factors do not broadcast to the shape.
    InputError
        If a factor is not finite, or complex.
    """

    values: Tensor

    def __init__(self, values: Tensor, shape: tuple[int, ...] | None = None) -> None:
        shape = tuple(values.shape) if shape is None else tuple(shape)
        if values.is_complex() or not bool(torch.isfinite(values).all()):
            raise InputError("The factors must be real and finite.")
        try:
            values = values.detach().double().expand(shape)
        except RuntimeError as error:
            raise ShapeError(f"Factors of shape {tuple(values.shape)} do not broadcast to {shape}.") from error
        super().__init__(shape, shape)
        self.register_buffer("values", values.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.values.to(x.dtype) * x

    def adjoint(self, y: Tensor) -> Tensor:
        """Multiply."""
        return self.values.to(y.dtype) * y

    def inverse(self, y: Tensor) -> Tensor:
        """Divide; infinite or not a number where a factor is zero."""
        return y / self.values.to(y.dtype)

    @property
    def svd(self) -> SVD:
        """The diagonalisation, in the standard basis; a factor's sign is in U."""
        sign = torch.where(self.values < 0, -1.0, 1.0)

        def signed(t: Tensor) -> Tensor:
            return sign.to(t) * t

        def same(t: Tensor) -> Tensor:
            return t

        return SVD(self.values.abs(), signed, signed, same, same)
