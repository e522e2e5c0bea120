"""Gaussian noise with a scalar or diagonal covariance."""

from collections.abc import Sequence
from math import log, pi, prod
from typing import TypeGuard, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.kernels.gaussian_misfit import chi_square, misfit
from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.measurements import as_measurements, pick, shared_operator
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

    def _seen(self, x: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions and measurements as rows of one dtype, and the noise along a row."""
        p, y = prediction, self.measurement
        y = y if y.is_complex() else y.to(x.dtype)
        if p.dtype != y.dtype:  # complex data may be more precise than the picture, as may an operator's output
            kind = torch.promote_types(p.dtype, y.dtype)
            p, y = p.to(kind), y.to(kind)
        if len(p) == 1 < len(y):
            p = p.expand(len(y), *p.shape[1:])
        return p.flatten(1), y.flatten(1), self._row_of_std()

    def _row_of_std(self) -> Tensor:
        std, shape = self.noise_std, self.operator.out_shape
        if std.numel() == 1 or tuple(std.shape) == shape:
            return std.reshape(-1)
        return self._numbers.get(std, "row", lambda: torch.broadcast_to(std, shape).reshape(-1))

    def _std(self, dtype: torch.dtype) -> Tensor:
        """Noise as operators take it that weigh residuals themselves: a scalar, or of their output's shape."""

        def build() -> Tensor:
            std = self.noise_std.to(dtype)
            return (
                std.reshape(()) if std.numel() == 1 else torch.broadcast_to(std, self.operator.out_shape).contiguous()
            )

        return self._numbers.get(self.noise_std, dtype, build)

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Chi-square of the residuals."""
        return chi_square(*self._seen(x, self.operator(x)))

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
        return self._log_density(self.deviance(x))

    def _log_density(self, chi2: Tensor) -> Tensor:
        return torch.rsub(chi2, self.log_normaliser(), alpha=0.5)  # in one operation

    def log_prob_and_grad(self, x: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
        """Log-density and gradient; one pass over x where A is pixelwise, else one over what A predicts.

        Both are differentiable themselves where A is linear and x requires gradients.
        """
        A = self.operator
        linear = isinstance(A, LinearOperator)
        leaf = x if linear else x.detach()
        if _weighs(A) and self.problems in (1, len(x)):
            chi2, grad = A.misfit_and_grad(leaf, self.measurement.to(x.dtype), self._std(x.dtype))
            return self._log_density(chi2), grad
        if isinstance(A, LinearOperator):
            chi2, cotangent = misfit(*self._seen(x, A(x)))
            return self._log_density(chi2), A.adjoint(cotangent.reshape(-1, *A.out_shape))
        with torch.enable_grad():
            leaf.requires_grad_()
            p, y, std = self._seen(leaf, A(leaf))
        chi2, cotangent = misfit(p.detach(), y, std)
        (grad,) = torch.autograd.grad(p, leaf, cotangent)
        return self._log_density(chi2), grad

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


def _weighs(operator: Operator) -> TypeGuard[Pixelwise]:
    # The class is asked, whose answer Python keeps: looking at an instance takes as long as ten launches on a GPU.
    return issubclass(type(operator), Pixelwise)
