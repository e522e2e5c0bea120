"""Operators whose log-density and gradient need one pass: over the picture, or over its spectrum."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Pixelwise(Protocol):
    """What an operator offers that can weigh its own residuals faster than by forward and adjoint.

    Those that measure single pixels do, of a picture or of its spectrum.
    """

    def misfit_and_grad(self, x: Tensor, y: Tensor, std: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
        r"""Chi-square of the residuals, and the gradient of -1/2 of it with respect to x, of x's shape.

        Parameters
        ----------
        x
            Inputs (n, \*in_shape).
        y
            Measurements (1 or n, \*out_shape), of x's dtype.
        std
            Noise in units of y, of x's dtype: a scalar, or \*out_shape.
        """
        ...
