"""Operators that act on rows and columns apart: ``Y = L X R^T``, with an SVD from those of two small matrices.

With L = U_l S_l V_l^T and R = U_r S_r V_r^T the operator is the Kronecker product of L and R, so its singular values
are the products of theirs. Where L and R are not square, inputs and outputs have different numbers of coefficients: all
live on one grid of max(outputs, inputs) coefficients an axis, zero-filled on the way in and cropped on the way out. The
full (square) U and V then give V V^T = 1 and U U^T = 1, and the singular values that the grid adds are 0.
"""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from invdiff.errors import ShapeError
from invdiff.kernels.separable_stencil import Tables, reference, separable_stencil, tables
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.caches import Cache


class KroneckerTables:
    """The factors of two dense SVDs in float64, cast once to each dtype that is asked for.

    Parameters
    ----------
    left, right
        Matrices (c, p, h) and (c, q, w), c being 1 where all channels share one.
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.inputs = (left.shape[-1], right.shape[-1])
        self.outputs = (left.shape[-2], right.shape[-2])
        self.grid = (max(left.shape[-2:]), max(right.shape[-2:]))
        ul, sl, vlt = torch.linalg.svd(left.double(), full_matrices=True)
        ur, sr, vrt = torch.linalg.svd(right.double(), full_matrices=True)
        sl, sr = (pad(s, (0, n - s.shape[-1])) for s, n in zip((sl, sr), self.grid, strict=True))
        self.values = sl[..., :, None] * sr[..., None, :]
        self._sides = {torch.float64: ((ul, ur), (vlt.mT, vrt.mT))}

    def _side(self, dtype: torch.dtype, which: int) -> tuple[Tensor, Tensor]:
        if dtype not in self._sides:
            (ul, ur), (vl, vr) = self._sides[torch.float64]
            self._sides[dtype] = ((ul.to(dtype), ur.to(dtype)), (vl.to(dtype), vr.to(dtype)))
        return self._sides[dtype][which]

    def _to_coefficients(self, t: Tensor, which: int) -> Tensor:
        left, right = self._side(t.dtype, which)
        c = reference.separable_stencil(t, left.mT, right.mT)
        return pad(c, (0, self.grid[1] - c.shape[-1], 0, self.grid[0] - c.shape[-2]))

    def _from_coefficients(self, c: Tensor, which: int) -> Tensor:
        left, right = self._side(c.dtype, which)
        return reference.separable_stencil(c[..., : left.shape[-1], : right.shape[-1]], left, right)

    def svd(self, channels: int) -> SVD:
        """Return the diagonalisation for inputs of that many channels."""
        return SVD(
            self.values.expand(channels, -1, -1),
            lambda c: self._from_coefficients(c, 0),
            lambda y: self._to_coefficients(y, 0),
            lambda c: self._from_coefficients(c, 1),
            lambda x: self._to_coefficients(x, 1),
        )


@final
class Separable(LinearOperator):
    """``Y = L X R^T`` for every channel of a picture.

    Band matrices go through `invdiff.kernels.separable_stencil` where it is faster, others through dense matrix
    products: 2 p h w + 2 p q w operations a channel. On CUDA the latter follow torch's global setting of TF32 for
    matrix products, which is off by default. The first use of the SVD costs two dense SVDs.

    Parameters
    ----------
    left
        Matrix L (p, h), or one a channel (c, p, h).
    right
        Matrix R (q, w), or one a channel (c, q, w).
    shape
        Shape (c, h, w) of one input; outputs are (c, p, q). The operator follows its input's dtype.

    Raises
    ------
    ShapeError
        If the matrices do not fit the shape.
    """

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor, shape: tuple[int, int, int]) -> None:
        c, h, w = picture_shape(shape)
        for name, matrix, size in (("left", left, h), ("right", right, w)):
            if (
                matrix.ndim not in (2, 3)
                or matrix.shape[-1] != size
                or (matrix.ndim == 3 and len(matrix) not in (1, c))
            ):
                raise ShapeError(
                    f"{name} must be a matrix (outputs, {size}) or ({c}, outputs, {size}) for inputs {(c, h, w)}, "
                    f"got {tuple(matrix.shape)}."
                )
        super().__init__((c, h, w), (c, left.shape[-2], right.shape[-2]))
        self.register_buffer("left", left.detach().double().clone().reshape(-1, *left.shape[-2:]))
        self.register_buffer("right", right.detach().double().clone().reshape(-1, *right.shape[-2:]))
        self._tables = Cache()

    def _matrices(self, dtype: torch.dtype) -> Tables:
        sides = (self.left, self.right)
        return self._tables.get(sides, dtype, lambda: tables(self.left, self.right, dtype, self.left.device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both matrices: (n, c, h, w) -> (n, c, p, q)."""
        return separable_stencil(x, self._matrices(x.dtype))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply both transposes: (n, c, p, q) -> (n, c, h, w)."""
        return separable_stencil(y, self._matrices(y.dtype).mT)

    @property
    def svd(self) -> SVD:
        """The Kronecker product of two dense SVDs, null spaces included."""
        tables = self._tables.get((self.left, self.right), "svd", lambda: KroneckerTables(self.left, self.right))
        return tables.svd(self.in_shape[0])


def picture_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Check that a shape is (channels, height, width) of positive numbers."""
    if len(shape) != 3 or any(int(n) != n or n < 1 for n in shape):
        raise ShapeError(f"shape must be (channels, height, width) of one picture, got {tuple(shape)}.")
    c, h, w = (int(n) for n in shape)
    return c, h, w
