r"""Observation at scattered points of a grid, e.g. at weather stations, by bilinear interpolation.

A point at row r and column q, counted from 0 in steps of the grid, with i = floor(r), j = floor(q), a = r - i and
b = q - j, sees

    y = (1 - a) (1 - b) x[i, j] + (1 - a) b x[i, j + 1] + a (1 - b) x[i + 1, j] + a b x[i + 1, j + 1].

Points are sorted by cell, so that neighbours read the same memory; the adjoint gathers, for each grid point, from the
points that see it. Outputs keep the order in which points were given.
"""

from math import prod
from typing import final

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels.scattered import Tables, gather_sum, tables
from invdiff.operators.base import LinearOperator
from invdiff.operators.caches import Cache


@final
class Scattered(LinearOperator):
    """Bilinear observation of every channel at points of a two-dimensional grid.

    There is no fast diagonalisation: the norm is by power iteration and the proximal step by conjugate gradients.

    Parameters
    ----------
    points
        Rows and columns (m, 2) in steps of the grid, from 0: a latitude is (latitude - first) / step. Rows lie in
        [0, h - 1]; columns in [0, w - 1], or anywhere where the columns are periodic. A point may occur twice.
    shape
        Shape (..., h, w) of one input with any channels before the grid; outputs are (..., m). The operator follows its
        input's dtype.
    periodic
        Whether column w is column 0 again, as for longitudes around the globe.

    Raises
    ------
    ShapeError
        If points are not (m, 2) or the shape holds no grid.
    InputError
        If there are no points, some are not finite real numbers, or some lie outside the grid.
    """

    points: Tensor

    def __init__(self, points: Tensor, shape: tuple[int, ...], *, periodic: bool = False) -> None:
        if len(shape) < 2 or min(shape) < 1:
            raise ShapeError(f"shape must be (..., h, w) with positive sizes, got {tuple(shape)}.")
        if points.ndim != 2 or points.shape[1] != 2:
            raise ShapeError(f"points must be rows and columns, of shape (m, 2), got {tuple(points.shape)}.")
        if not len(points) or points.is_complex() or not bool(torch.isfinite(points).all()):
            raise InputError("points must be finite real numbers, and at least one point.")
        points = points.detach().double().clone()
        h, w = shape[-2:]
        outside = (points[:, 0] < 0) | (points[:, 0] > h - 1)
        if not periodic:
            outside |= (points[:, 1] < 0) | (points[:, 1] > w - 1)
        if bool(outside.any()):
            first = int(outside.nonzero()[0, 0])
            columns = "any column" if periodic else f"columns in [0, {w - 1}]"
            raise InputError(
                f"{int(outside.sum())} of {len(points)} points lie outside the grid, the first is number {first} at "
                f"{tuple(points[first].tolist())}; a grid of {h} x {w} has rows in [0, {h - 1}] and {columns}. "
                "Leave them out, or convert them to steps of the grid."
            )
        super().__init__(shape, (*shape[:-2], len(points)))
        self.periodic = bool(periodic)
        self.register_buffer("points", points)
        self._tables = Cache()

    def _matrix(self, dtype: torch.dtype) -> tuple[Tables, Tensor, Tensor]:
        """Tables with the points sorted by cell, the order of the points, and its inverse."""

        def build() -> tuple[Tables, Tensor, Tensor]:
            index, weights = _bilinear(self.points.double(), *self.in_shape[-2:], periodic=self.periodic)
            order = index[:, 0].argsort(stable=True)
            made = tables(index[order], weights[order], prod(self.in_shape[-2:]), dtype)
            return made, order, order.argsort()

        return self._tables.get(self.points, dtype, build)

    def forward(self, x: Tensor) -> Tensor:
        """Observe at the points: (n, ..., h, w) -> (n, ..., m)."""
        matrix, _, places = self._matrix(x.dtype)
        y = gather_sum(x.reshape(-1, prod(self.in_shape[-2:])), matrix)
        return y.index_select(1, places).reshape(len(x), *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Exact transpose: (n, ..., m) -> (n, ..., h, w)."""
        matrix, order, _ = self._matrix(y.dtype)
        x = gather_sum(y.reshape(-1, self.out_shape[-1]).index_select(1, order), matrix.mT)
        return x.reshape(len(y), *self.in_shape)


def _bilinear(points: Tensor, h: int, w: int, *, periodic: bool) -> tuple[Tensor, Tensor]:
    """Flat places (m, 4) of the cell's corners and their weights (m, 4)."""
    r, q = points.unbind(1)
    q = q.remainder(w) if periodic else q.clamp(0, w - 1)
    r = r.clamp(0, h - 1)  # a point that float32 moved over the edge
    i, j = r.floor(), q.floor()
    a, b = r - i, q - j
    top, left = i.long(), j.long() % w  # the remainder of -1e-20 rounds to w
    bottom = (top + 1).clamp_max(h - 1)
    right = (left + 1) % w if periodic else (left + 1).clamp_max(w - 1)
    index = torch.stack((top * w + left, top * w + right, bottom * w + left, bottom * w + right), 1)
    weights = torch.stack(((1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b), 1)
    return index, weights
