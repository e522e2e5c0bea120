"""BandRows: the wavelet bands of a state, each repeated over rows, as channels beside a trajectory's coefficients."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.kernels.wavelet import Mode
from invdiff.operators.base import LinearOperator
from invdiff.operators.wavelet import WaveletTransform


@final
class BandRows(LinearOperator):
    r"""Channels (c, time, \*space) that hold the one-level bands of a state (c, \*space), such as an initial one.

    A network of trajectories' coefficients knows its states by such channels: along the first axis of its grid the
    bands of the state follow one another, each repeated over as many rows; sides are continued with zeros. As in WDNO
    (Hu et al. 2025, ICLR), where one channel holds two states, and here two do.

    Parameters
    ----------
    shape
        Shape (c, \*space) of a state, one or two axes of space.
    grid
        Sides (time, \*space) of the network's grid; time is at least the number of bands.
    wavelet, mode
        As for `WaveletTransform`.

    Raises
    ------
    CatalogueError
        If there is no such wavelet or mode.
    ShapeError
        If the state's bands do not fit the grid.
    """

    def __init__(
        self, shape: Sequence[int], grid: Sequence[int], wavelet: str = "db4", mode: Mode = "periodization"
    ) -> None:
        shape, grid = tuple(shape), tuple(grid)
        transform = WaveletTransform(shape, wavelet, 1, mode)
        sides, bands = transform.out_shape[1:], 2**transform.axes
        if len(grid) != len(shape) or grid[0] < bands or any(n < m for n, m in zip(grid[1:], sides, strict=True)):
            raise ShapeError(
                f"{bands} bands of sides {sides} of a state {shape} do not fit a grid (time, *space) of {grid}."
            )
        super().__init__(shape, (shape[0], *grid))
        self.transform = transform
        self._bands, self._repeats = bands, grid[0] // bands
        self._after = tuple(n for a, b in zip(reversed(sides), reversed(grid[1:]), strict=True) for n in (0, b - a))

    def forward(self, x: Tensor) -> Tensor:
        r"""Bands over rows: (n, c, \*space) -> (n, c, \*grid)."""
        c = self.transform(x).reshape(len(x), self.in_shape[0], self._bands, *self.transform.out_shape[1:])
        rows = c.repeat_interleave(self._repeats, 2)
        last = self.out_shape[1] - self._bands * self._repeats
        return torch.nn.functional.pad(rows, (*self._after, 0, last))

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Sum over rows, then apply the transform's adjoint: (n, c, \*grid) -> (n, c, \*space)."""
        sides = self.transform.out_shape[1:]
        rows = y[(slice(None), slice(None), slice(self._bands * self._repeats), *map(slice, sides))]
        c = rows.reshape(len(y), self.in_shape[0], self._bands, self._repeats, *sides).sum(3)
        return self.transform.adjoint(c.reshape(len(y), *self.transform.out_shape))
