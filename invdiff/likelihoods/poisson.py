"""Photon counts."""

from collections.abc import Sequence
from math import inf, prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

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

    Raises
    ------
    ShapeError
        If the measurement does not fit the operator.
    InputError
        If the measurement is negative or not finite, gain or background is out of range, or A's output is complex.
    """

    measurement: Tensor

    def __init__(self, operator: Operator, measurement: Tensor, gain: float, background: float = 1e-3) -> None:
        super().__init__()
        if not 0 < gain < inf or not 0 <= background < inf:
            raise InputError(f"Poisson needs finite gain > 0 and background >= 0, got {gain} and {background}.")
        if operator.complex_output:
            raise InputError(
                f"Poisson counts are real, the output of {type(operator).__name__} is complex; measure its magnitude."
            )
        counts = as_measurements(measurement, operator)
        if bool((counts < 0).any()):
            raise InputError("Poisson counts are non-negative; the measurement holds negative values.")
        self.operator, self.in_shape, self.gain, self.background = (
            operator,
            operator.in_shape,
            float(gain),
            float(background),
        )
        self.register_buffer("measurement", counts)

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        return len(self.measurement)

    @property
    def measurements(self) -> int:
        """Number of values in one measurement."""
        return prod(self.operator.out_shape)

    @property
    def noise_level(self) -> float:
        """Root-mean-square noise in units of A's output, as the counts have it: sqrt(mean count) / gain."""
        return float(self.measurement.double().mean().clamp_min(1.0).sqrt()) / self.gain

    def rate(self, x: Tensor) -> Tensor:
        """Mean counts at x: (n, *in_shape) -> (n, *out_shape)."""
        return self.gain * self.operator(x).clamp_min(0) + self.background

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-probability of the counts."""
        y, rate = self.measurement.to(x.dtype), self.rate(x)
        return flat_sum(torch.xlogy(y, rate) - rate - torch.lgamma(y + 1.0))

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Poisson deviance."""
        y, rate = self.measurement.to(x.dtype), self.rate(x)
        return 2.0 * flat_sum(torch.xlogy(y, y) - torch.xlogy(y, rate) - (y - rate))

    def rows(self, index: Tensor) -> "Poisson":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        return (
            self
            if self.problems == 1
            else Poisson._unchecked(self.operator, pick(self.measurement, index), self.gain, self.background)
        )

    @classmethod
    def _unchecked(cls, operator: Operator, measurement: Tensor, gain: float, background: float) -> "Poisson":
        # rows() is called in every step: a look at the counts there would synchronise the device.
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.operator, new.in_shape, new.gain, new.background = operator, operator.in_shape, gain, background
        new.register_buffer("measurement", measurement)
        return new

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


def poisson_quantile(u: Tensor, rate: Tensor) -> Tensor:
    """Smallest count whose cumulative probability exceeds u: a Poisson variable if u is uniform.

    One uniform makes one count, by bisection of the cumulative distribution Q(k + 1, rate) (the regularised incomplete
    gamma function). Unlike by rejection, a rate that differs in its last digit moves no count but its own, and that
    with a probability of its size.

    Parameters
    ----------
    u
        Values in [0, 1), float64.
    rate
        Means, non-negative and finite, float64, of u's shape.

    Returns
    -------
    Tensor
        Whole numbers in float64, of u's shape.
    """
    # Chernoff's bounds P(X >= rate + t) <= exp(-t^2 / (2 rate + 2 t / 3)) and P(X <= rate - t) <= exp(-t^2 / (2 rate))
    # are below 2^-53, the step of u, at these ends.
    low = (rate - 9.0 * rate.sqrt()).floor().clamp_min(0.0)
    high = (rate + 9.0 * rate.sqrt() + 26.0).ceil()
    while bool((low < high).any()):
        middle = ((low + high) / 2.0).floor()
        above = torch.special.gammaincc(middle + 1.0, rate) > u
        low, high = torch.where(above, low, middle + 1.0), torch.where(above, middle, high)
    return high
