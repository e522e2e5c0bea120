"""Window: a part of a larger array, or a smaller array in zeros, along any of the last axes."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.operators.base import SVD, LinearOperator


@final
class Window(LinearOperator):
    """Cut an axis where it is longer than asked for, continue it with zeros where it is shorter.

    It brings arrays to the sides that a network takes, and back: coefficients of 41 x 60 into 64 x 64, and out again
    by its adjoint. A picture as the crop of an unknown scene is `operators.crop.Crop`.

    Parameters
    ----------
    shape
        Shape of one input.
    size
        Lengths of the last axes of one output; the axes before them stay as they are.
    corner
        Place of the shorter of input and output in the longer one, an axis of ``size`` each; zeros if None, so that
        padding comes after the values.

    Raises
    ------
    ShapeError
        If the sizes are not positive, are more than the axes, or the shorter does not lie inside the longer.
    """

    _one: Tensor

    def __init__(self, shape: Sequence[int], size: Sequence[int], corner: Sequence[int] | None = None) -> None:
        shape, size = tuple(shape), tuple(size)
        corner = (0,) * len(size) if corner is None else tuple(corner)
        lead = shape[: len(shape) - len(size)]
        sides = shape[len(lead) :]
        if len(size) > len(shape) or len(corner) != len(size) or min((*shape, *size), default=0) < 1:
            raise ShapeError(
                f"A window of an array {shape} needs one positive length and one corner an axis, for its last axes; "
                f"got {size} and the corner {corner}."
            )
        if any(c < 0 or c + min(a, b) > max(a, b) for a, b, c in zip(sides, size, corner, strict=True)):
            raise ShapeError(f"A window {size} at {corner} does not fit the sides {sides}.")
        super().__init__(shape, (*lead, *size))
        self.corner = corner
        axes = tuple(zip(sides, size, corner, strict=True))
        self._cut = tuple(slice(c, c + b) if a > b else slice(None) for a, b, c in axes)
        self._kept = tuple(slice(None) if a > b else slice(c, c + a) for a, b, c in axes)  # of the output
        self._after = tuple(n for a, b, c in reversed(axes) for n in ((c, b - a - c) if b > a else (0, 0)))
        self._before = tuple(n for a, b, c in reversed(axes) for n in ((c, a - b - c) if a > b else (0, 0)))
        self._all = tuple(max(pair) for pair in zip(self.in_shape, self.out_shape, strict=True))
        self.register_buffer("_one", torch.ones(()), persistent=False)  # tells the singular values their device

    def forward(self, x: Tensor) -> Tensor:
        r"""Cut and pad: (n, \*shape) -> (n, \*out_shape)."""
        return torch.nn.functional.pad(x[(..., *self._cut)], self._after)

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Put what was kept back into zeros: (n, \*out_shape) -> (n, \*shape)."""
        return torch.nn.functional.pad(y[(..., *self._kept)], self._before)

    @property
    def svd(self) -> SVD:
        """The diagonalisation in the standard basis of the longer of both along every axis; 1 where both have values.

        Where axes are cut and others padded, the coefficients of neither are all of that basis.
        """
        to_input, to_output = (
            Window(self._all, self.in_shape, self._places(0)),
            Window(self._all, self.out_shape, self._places(1)),
        )
        seen = to_input.adjoint(self._one.new_ones(self.in_shape)) * to_output.adjoint(
            self._one.new_ones(self.out_shape)
        )
        return SVD(seen, to_output.forward, to_output.adjoint, to_input.forward, to_input.adjoint)

    def _places(self, side: int) -> tuple[int, ...]:
        """Corner of the input (0) or the output (1) in the longer of both along every axis."""
        lead = (0,) * (len(self.in_shape) - len(self.corner))
        own = (self.in_shape, self.out_shape)[side]
        corner = (*lead, *self.corner)
        return tuple(c if n < m else 0 for n, m, c in zip(own, self._all, corner, strict=True))
