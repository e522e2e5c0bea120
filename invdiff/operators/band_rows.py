"""BandRows: the wavelet bands of a state as channels beside a trajectory's coefficients, the same in every row."""

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
    r"""Channels (c bands, time, \*space) that hold the one-level bands of a state (c, \*space), such as an initial one.

    A network of trajectories' coefficients knows its states by such channels: a band is a channel, the same in every
    row of the network's grid along its first axis; sides are continued with zeros. WDNO (Hu et al. 2025, ICLR) lays the
    bands of two states one after the other along the rows of one channel, so that a network must carry them to where
    they are needed; here they stand at every time.

    Parameters
    ----------
    shape
        Shape (c, \*space) of a state, one or two axes of space.
    grid
        Sides (time, \*space) of the network's grid.
    wavelet, mode
        As for `WaveletTransform`.
    scales
        Factor of each band, channel by channel, (c bands,); 1 if None.

    Raises
    ------
    CatalogueError
        If there is no such wavelet or mode.
    ShapeError
        If the state's bands do not fit the grid, or there are not as many scales as bands.
    """

    scales: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        grid: Sequence[int],
        wavelet: str = "db4",
        mode: Mode = "periodization",
        scales: Sequence[float] | None = None,
    ) -> None:
        shape, grid = tuple(shape), tuple(grid)
        transform = WaveletTransform(shape, wavelet, 1, mode)
        channels, *sides = transform.out_shape
        if len(grid) != len(shape) or grid[0] < 1 or any(n < m for n, m in zip(grid[1:], sides, strict=True)):
            raise ShapeError(
                f"Bands of sides {tuple(sides)} of a state {shape} do not fit a grid (time, *space) of {grid}."
            )
        if scales is not None and len(scales) != channels:
            raise ShapeError(f"The state has {channels} bands, got {len(scales)} scales.")
        super().__init__(shape, (channels, *grid))
        self.transform = transform
        factors = torch.ones(channels) if scales is None else torch.tensor(scales)
        self.register_buffer("scales", factors.double().reshape(-1, *[1] * len(sides)))
        self._after = tuple(n for a, b in zip(reversed(sides), reversed(grid[1:]), strict=True) for n in (0, b - a))

    def forward(self, x: Tensor) -> Tensor:
        r"""Bands in every row: (n, c, \*space) -> (n, c bands, \*grid)."""
        bands = torch.nn.functional.pad(self.transform(x) * self.scales.to(x.dtype), self._after)
        return bands[:, :, None].expand(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Sum over rows, then apply the transform's adjoint: (n, c bands, \*grid) -> (n, c, \*space)."""
        sides = self.transform.out_shape[1:]
        rows = y[(slice(None), slice(None), slice(None), *map(slice, sides))]
        return self.transform.adjoint(rows.sum(2) * self.scales.to(y.dtype))
