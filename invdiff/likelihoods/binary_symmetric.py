"""Bits through a binary symmetric channel."""

from collections.abc import Sequence
from math import log, prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError
from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.measurements import as_measurements, flat_sum, pick, shared_operator
from invdiff.operators.base import Operator


@final
class BinarySymmetric(Likelihood):
    r"""Bits ``q = A(x)``, each of which is flipped on its way with the same probability.

    ``p(y_a | x) = (1 - f) [y_a = q_a] + f [y_a != q_a]``, taken as linear in q between 0 and 1: where q_a is the
    probability that a bit is 1, so that this is the probability of y_a.

    Parameters
    ----------
    operator
        Operator A whose outputs are bits, as `operators.Parity`.
    measurement
        Bits of shape (\*out_shape) or (problems, \*out_shape).
    flip
        Probability f of a flip, in [0, 0.5).

    Raises
    ------
    ShapeError
        If the measurement does not fit the operator.
    InputError
        If a measured value is no bit, or the probability lies out of its range.
    """

    measurement: Tensor

    def __init__(self, operator: Operator, measurement: Tensor, flip: float) -> None:
        super().__init__()
        if not 0.0 <= flip < 0.5:
            raise InputError(f"The probability of a flip lies in [0, 0.5), got {flip}.")
        y = as_measurements(measurement, operator)
        if not bool(((y == 0) | (y == 1)).all()):
            raise InputError("Measured bits are 0 or 1; the measurement holds other values.")
        self.operator, self.in_shape, self.flip = operator, operator.in_shape, float(flip)
        self.register_buffer("measurement", y)

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        return len(self.measurement)

    @property
    def measurements(self) -> int:
        """Number of bits in one measurement."""
        return prod(self.operator.out_shape)

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-probability of the bits; at means of the unknown bits, the sum over checks of their log-probabilities."""
        q = self.operator(x)
        y = self.measurement.to(q.dtype)
        agree = y * q + (1.0 - y) * (1.0 - q)
        return flat_sum(torch.log(self.flip + (1.0 - 2.0 * self.flip) * agree))

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Twice the log-probability lost against bits that all agree."""
        return 2.0 * (self.measurements * log(1.0 - self.flip) - self.log_prob(x)).clamp_min(0.0)

    def rows(self, index: Tensor) -> "BinarySymmetric":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        if self.problems == 1:
            return self
        new = BinarySymmetric.__new__(BinarySymmetric)  # a look at the bits in every step would wait for the device
        nn.Module.__init__(new)
        new.operator, new.in_shape, new.flip = self.operator, self.in_shape, self.flip
        new.register_buffer("measurement", pick(self.measurement, index))
        return new

    @classmethod
    def stack(cls, parts: Sequence["BinarySymmetric"]) -> "BinarySymmetric":
        """One likelihood with the measurements of all parts."""
        if any(p.flip != parts[0].flip for p in parts[1:]):
            raise InputError("Problems that run together share the probability of a flip. Solve them one by one.")
        operator = shared_operator([p.operator for p in parts])
        return cls(operator, torch.cat([p.measurement for p in parts]), parts[0].flip)
