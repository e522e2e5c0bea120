"""Photon counts."""

from collections.abc import Sequence
from math import prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError
from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.measurements import as_measurements, flat_sum, pick, shared_operator
from invdiff.operators.base import Operator


@final
class Poisson(Likelihood):
    r"""Photon counts ``y ~ Poisson(gain * A(x) + background)``.

    Parameters
    ----------
    operator
        Measurement operator A; its output is clamped at zero.
    measurement
        Counts of shape (\*out_shape) or (problems, \*out_shape), non-negative.
    gain
        Counts for one unit of A's output, positive.
    background
        Mean dark counts, non-negative; a small positive value keeps the gradient finite where A(x) is 0.
    """

    measurement: Tensor

    def __init__(self, operator: Operator, measurement: Tensor, gain: float, background: float = 1e-3) -> None:
        super().__init__()
        if not gain > 0 or not background >= 0:
            raise InputError(f"Poisson needs gain > 0 and background >= 0, got {gain} and {background}.")
        if bool((measurement < 0).any()):
            raise InputError("Poisson counts are non-negative; the measurement holds negative values.")
        self.operator, self.in_shape, self.gain, self.background = (
            operator,
            operator.in_shape,
            float(gain),
            float(background),
        )
        self.register_buffer("measurement", as_measurements(measurement, operator))

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        return len(self.measurement)

    @property
    def measurements(self) -> int:
        """Number of values in one measurement."""
        return prod(self.operator.out_shape)

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-probability of the counts."""
        y, rate = self.measurement.to(x.dtype), self.gain * self.operator(x).clamp_min(0) + self.background
        return flat_sum(torch.xlogy(y, rate) - rate - torch.lgamma(y + 1.0))

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Poisson deviance."""
        y, rate = self.measurement.to(x.dtype), self.gain * self.operator(x).clamp_min(0) + self.background
        return 2.0 * flat_sum(torch.xlogy(y, y) - torch.xlogy(y, rate) - (y - rate))

    def rows(self, index: Tensor) -> "Poisson":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        return (
            self
            if self.problems == 1
            else Poisson(self.operator, pick(self.measurement, index), self.gain, self.background)
        )

    @classmethod
    def stack(cls, parts: Sequence["Poisson"]) -> "Poisson":
        """One likelihood with the measurements of all parts."""
        first = parts[0]
        if any((p.gain, p.background) != (first.gain, first.background) for p in parts[1:]):
            raise InputError(
                "Problems that run together share gain and background; these differ. Solve them one by one."
            )
        return cls(
            shared_operator([p.operator for p in parts]),
            torch.cat([p.measurement for p in parts]),
            first.gain,
            first.background,
        )
