"""Gaussian noise with a scalar or diagonal covariance."""

from collections.abc import Sequence
from math import log, pi, prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.measurements import as_measurements, flat_sum, pick, shared_operator
from invdiff.operators.base import LinearOperator, Operator
from invdiff.operators.caches import Cache
from invdiff.operators.pixelwise import Pixelwise


@final
class Gaussian(Likelihood):
    r"""``y = A(x) + noise_std * eps`` with standard normal eps.

    Parameters
    ----------
    operator
        Measurement operator A.
    measurement
        Measurement of shape (\*out_shape) or (problems, \*out_shape), in the operator's output units; finite.
    noise_std
        Standard deviation of the noise in the measurement's units; a positive scalar, or a tensor that broadcasts to
        out_shape (a diagonal covariance). For complex data, of each of the real and the imaginary part.

    Raises
    ------
    ShapeError
        If the measurement or the noise does not fit the operator.
    InputError
        If the measurement is not finite or noise_std is not positive.
    """

    noise_std: Tensor
    measurement: Tensor

    def __init__(self, operator: Operator, measurement: Tensor, noise_std: float | Tensor) -> None:
        super().__init__()
        std = torch.as_tensor(noise_std, dtype=torch.float64)
        if not bool((std > 0).all()) or not bool(torch.isfinite(std).all()):
            raise InputError(
                f"noise_std must be positive and finite, got {noise_std}. "
                "For noiseless data give a small value, e.g. 1e-3."
            )
        if std.ndim:
            try:
                torch.broadcast_to(std, operator.out_shape)
            except RuntimeError as error:
                raise ShapeError(
                    f"noise_std of shape {tuple(std.shape)} does not broadcast to the measurement {operator.out_shape}."
                ) from error
        self.operator, self.in_shape = operator, operator.in_shape
        self.register_buffer("measurement", as_measurements(measurement, operator))
        self.register_buffer("noise_std", std)
        self._numbers = Cache()

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        return len(self.measurement)

    @property
    def measurements(self) -> int:
        """Number of real values in one measurement."""
        return prod(self.operator.out_shape) * (2 if self.measurement.is_complex() else 1)

    def _std(self, like: Tensor) -> Tensor:
        return self.noise_std.to(like.real.dtype if like.is_complex() else like.dtype)

    def _whitened(self, x: Tensor) -> Tensor:
        r = self.measurement.to(
            x.dtype if not self.measurement.is_complex() else self.measurement.dtype
        ) - self.operator(x)
        return r / self._std(r)

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Chi-square of the residuals."""
        return flat_sum(self._whitened(x).abs() ** 2)

    def log_normaliser(self) -> float:
        """Log of the density's normalising constant for one measurement."""

        def build() -> float:
            components = self.measurements / prod(self.operator.out_shape)
            log_std = torch.broadcast_to(self.noise_std, self.operator.out_shape).log().sum() * components
            return -float(log_std) - 0.5 * self.measurements * log(2.0 * pi)

        # Once: a number from a GPU waits for all work there.
        return self._numbers.get(self.noise_std, "log normaliser", build)

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-density of the measurement."""
        return -0.5 * self.deviance(x) + self.log_normaliser()

    def log_prob_and_grad(self, x: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
        """Log-density and gradient; one pass over x where A is pixelwise, A and its adjoint where it is linear.

        Both are differentiable themselves where A is linear and x requires gradients.
        """
        linear = isinstance(self.operator, LinearOperator)
        leaf = x if linear else x.detach()
        if isinstance(self.operator, Pixelwise):
            std = self._std(leaf)
            std = torch.broadcast_to(std, self.operator.out_shape) if std.ndim else std
            chi2, grad = self.operator.misfit_and_grad(leaf, self.measurement.to(x.dtype), std)
            return -0.5 * chi2 + self.log_normaliser(), grad
        if not isinstance(self.operator, LinearOperator):
            return super().log_prob_and_grad(x)
        w = self._whitened(x)
        return -0.5 * flat_sum(w.abs() ** 2) + self.log_normaliser(), self.operator.adjoint(w / self._std(w))

    def rows(self, index: Tensor) -> "Gaussian":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        return (
            self
            if self.problems == 1
            else Gaussian._unchecked(self.operator, pick(self.measurement, index), self.noise_std, self._numbers)
        )

    @classmethod
    def _unchecked(cls, operator: Operator, measurement: Tensor, noise_std: Tensor, numbers: Cache) -> "Gaussian":
        # rows() is called in every step: checking finiteness there would synchronise the device.
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new.operator, new.in_shape = operator, operator.in_shape
        new.register_buffer("measurement", measurement)
        new.register_buffer("noise_std", noise_std)
        new._numbers = numbers
        return new

    @classmethod
    def stack(cls, parts: Sequence["Gaussian"]) -> "Gaussian":
        """One likelihood with the measurements of all parts."""
        operator = shared_operator([p.operator for p in parts])
        if any(not torch.equal(p.noise_std, parts[0].noise_std) for p in parts[1:]):
            raise InputError(
                "Problems that run together share one noise level; these have different ones. Solve them one by one."
            )
        return cls(operator, torch.cat([p.measurement for p in parts]), parts[0].noise_std)
