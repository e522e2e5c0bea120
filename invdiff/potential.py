r"""The likelihood along the noise levels: the paths that temper it.

A path is a family f_sigma with f_0 = log p(y | z). The noised path of a linear-Gaussian problem is

    f_sigma(z) = log N(y; A z, R + kappa sigma^2 A A^T)

It is exact where A A^T is diagonal in a known basis (an SVD); elsewhere A A^T is replaced by its bound ||A||^2, which
is a valid path too, since any positive f_sigma with the right end will do.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi, prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.linear_gaussian import LinearGaussian

LogProbAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class Path(ABC):
    """How the likelihood is tempered along the noise levels; subclasses are final frozen dataclasses."""

    @abstractmethod
    def potential(
        self, sigma: float, linear: LinearGaussian | None, log_prob_and_grad: LogProbAndGrad
    ) -> LogProbAndGrad:
        """f_sigma and its gradient, on rows (n, *shape)."""


@final
@dataclass(frozen=True, kw_only=True)
class Noised(Path):
    """``log N(y; A z, R + kappa sigma^2 A A^T)``: the likelihood of the measurement with the noise of z in it.

    Parameters
    ----------
    kappa
        0 is the constant path; 1 the noised likelihood, with which steps need not shrink as sigma grows.
    """

    kappa: float = 1.0

    def potential(
        self, sigma: float, linear: LinearGaussian | None, log_prob_and_grad: LogProbAndGrad
    ) -> LogProbAndGrad:
        """f_sigma and its gradient; see `Path.potential`."""
        if sigma == 0.0 or self.kappa == 0.0:
            return log_prob_and_grad
        if linear is None:
            raise CapabilityError("The noised path needs a linear-Gaussian problem; use the path Tempered for others.")
        A, extra = linear.operator, self.kappa * sigma**2
        size = prod(A.out_shape)
        svd, R = A.svd, linear.scalar_variance
        if svd is not None and R is not None:
            s2 = svd.singular_values.double() ** 2
            log_det = size * log(R) + torch.log1p(extra / R * s2).sum()

            def solve(r: Tensor) -> Tensor:
                return svd.outer(lambda t: 1.0 / (R + extra * t), r)
        else:
            variance = linear.noise_std**2 + extra * linear.norm() ** 2
            log_det = torch.broadcast_to(variance, A.out_shape).log().sum()

            def solve(r: Tensor) -> Tensor:
                return r / variance.to(r.dtype)

        def value_and_grad(z: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
            r = linear.residual(z)
            w = solve(r)
            value = -0.5 * ((r * w).flatten(1).sum(1) + log_det + size * log(2.0 * pi))
            return value, A.adjoint(w)

        return value_and_grad


@final
@dataclass(frozen=True, kw_only=True)
class Tempered(Path):
    """``log p(y | z) / (1 + (sigma / scale)^2)``: for any likelihood.

    Parameters
    ----------
    scale
        Noise level at which half of the likelihood acts, latent units; about noise_std / ||dA/dz||.
    """

    scale: float

    def potential(
        self,
        sigma: float,
        linear: LinearGaussian | None,  # noqa: ARG002 the contract's
        log_prob_and_grad: LogProbAndGrad,
    ) -> LogProbAndGrad:
        """f_sigma and its gradient; see `Path.potential`."""
        beta = 1.0 / (1.0 + (sigma / self.scale) ** 2)

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = log_prob_and_grad(z)
            return beta * value, beta * grad

        return value_and_grad
