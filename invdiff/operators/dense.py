"""A dense matrix as an operator, for small problems."""

from math import prod
from typing import final

from jaxtyping import Float
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.operators.base import LinearOperator


@final
class Dense(LinearOperator):
    r"""A matrix on flattened inputs, ``y = M x``.

    Parameters
    ----------
    matrix
        M, shape (measured, inputs).
    in_shape
        Shape of the inputs; they are flattened in the order of memory.

    Raises
    ------
    ShapeError
        If the matrix does not have a column for each value of an input.
    """

    matrix: Tensor

    def __init__(self, matrix: Float[Tensor, "m d"], in_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, (len(matrix),))
        d = prod(in_shape)
        if matrix.shape[1] != d:
            raise ShapeError(f"Inputs of shape {tuple(in_shape)} need a matrix of {d} columns, got {matrix.shape[1]}.")
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        r"""Apply the matrix to (n, \*in_shape)."""
        return x.flatten(1) @ self.matrix.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply its transpose to (n, m)."""
        return (y @ self.matrix.to(y.dtype)).reshape(-1, *self.in_shape)
