r"""Parity checks of bits: the exclusive or of a few of them, extended to what lies between 0 and 1.

    y_a = (1 - prod_{i in check a} (1 - 2 x_i)) / 2

At bits this is their exclusive or. It is linear in each bit, so that at the means of independent bits it is the exact
probability that the check is 1: soft bits have their way, and gradients pass.
"""

from typing import final

import torch
from jaxtyping import Shaped
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator


@final
class Parity(Operator):
    """Exclusive or of the bits of each check.

    Parameters
    ----------
    checks
        1 where a bit takes part in a check, shape (checks, bits).
    in_shape
        Shape of the bits, (bits,) if None.

    Raises
    ------
    ShapeError
        If the checks are not a matrix, or do not fit the shape.
    InputError
        If a check is empty, or an entry is neither 0 nor 1.
    """

    checks: Tensor
    _members: Tensor

    def __init__(self, checks: Shaped[Tensor, "m b"], in_shape: tuple[int, ...] | None = None) -> None:
        m, bits = checks.shape
        super().__init__((bits,) if in_shape is None else in_shape, (m,))
        if torch.Size(self.in_shape).numel() != bits:
            raise ShapeError(f"Checks of {bits} bits do not fit the shape {self.in_shape}.")
        if not bool(((checks == 0) | (checks == 1)).all()) or not bool((checks != 0).any(1).all()):
            raise InputError("Checks are rows of 0 and 1, each with one bit at least.")
        taken = checks != 0
        size = int(taken.sum(1).max())
        order = taken.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
        self.register_buffer("checks", taken)
        # Checks of fewer bits are filled up with number `bits`, whose factor is 1.
        self.register_buffer("_members", torch.where(taken.gather(1, order), order, bits), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, *in_shape) -> (n, checks)."""
        signs = torch.nn.functional.pad(1.0 - 2.0 * x.flatten(1), (0, 1), value=1.0)
        return 0.5 * (1.0 - signs[:, self._members].prod(2))
