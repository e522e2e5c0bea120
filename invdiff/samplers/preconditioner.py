r"""The step of a Langevin refresh, from the curvature of the prior and of the likelihood along its path.

At noise level sigma the target is p_sigma(z) exp(f_sigma(z)) with the Hessian -H = -(h + G), h the curvature of -log
p_sigma and G that of -f_sigma. A step of size e along P = 1 / diag(H) has to keep e * lambda_max(P^{1/2} H P^{1/2})
below 2. Both come from what is known without the network: h from the prior's error covariance by coefficient,
G = A^T (R + kappa sigma^2 A A^T)^{-1} A from the operator, its diagonal by random signs, and lambda_max by power
iteration. Where the prior knows no curvature, P = 1 / (1 / sigma^2 + ||G||) is a number: no prior's h exceeds 1 /
sigma^2, since h = (1 - C / sigma^2) / sigma^2 with C = Cov[z_0 | z_sigma] >= 0.

A trained prior's table is an average over pictures and places; near its pictures the curvature reaches 1 / sigma^2 in
most directions. For such a prior 1 / sigma^2 stands for h in lambda_max, and P is kept below 1 / (floor / sigma^2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.posterior import Posterior
from invdiff.potential import Noised, Path, Tempered
from invdiff.samplers.inner import stiffness

STABLE = 1.6
"""Largest e * lambda_max that is taken: 2 diverges, and power iteration comes from below."""
_FIRST_ITERATIONS, _LATER_ITERATIONS = 30, 4
"""Power iterations from a random vector, and from what the level before found, which is nearly the direction again."""


@runtime_checkable
class Basis(Protocol):
    """An orthonormal basis of events; see `Curvature`."""

    def to_basis(self, z: Tensor) -> Tensor:
        """Coefficients of z (n, *shape)."""
        ...

    def from_basis(self, c: Tensor) -> Tensor:
        """Inverse of `to_basis`."""
        ...


@dataclass(frozen=True)
class Preconditioner:
    """Step size times P, a positive matrix that is diagonal in a basis, or a multiple of the identity.

    Parameters
    ----------
    basis
        The basis; None for a multiple of the identity.
    values
        e P: eigenvalues, latent units squared, broadcasting against the coefficients of one event.
    direction
        Flat event along which the target is the stiffest, where it was sought.
    """

    basis: Basis | None
    values: Tensor
    direction: Tensor | None = None

    def refresh(self, z: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
        """Return z + E grad + sqrt(2 E) noise, with E = e P; all of shape (n, *shape)."""
        values = self.values.to(z)
        if self.basis is None:
            return z + values * grad + torch.sqrt(2.0 * values) * noise
        to = self.basis.to_basis
        return z + self.basis.from_basis(values * to(grad) + torch.sqrt(2.0 * values) * to(noise))

    def root(self, z: Tensor) -> Tensor:
        """Return sqrt(2 E) z for z of shape (ensemble, particle, *shape)."""
        scale = torch.sqrt(2.0 * self.values.to(z))
        if self.basis is None:
            return scale * z
        return self.basis.from_basis(scale * self.basis.to_basis(z.flatten(0, 1))).reshape(z.shape)


@dataclass(frozen=True)
class Information:
    """G, the curvature of -f_sigma along a path.

    Parameters
    ----------
    apply
        v (n, *shape) -> G v.
    diagonal
        Basis -> diagonal of G in it, broadcasting against the coefficients of one event.
    largest
        Bound on its eigenvalues.
    """

    apply: Callable[[Tensor], Tensor]
    diagonal: Callable[..., Tensor]
    largest: float

    @classmethod
    def along(cls, posterior: Posterior, path: Path, sigma: float, slope: float | None = None) -> "Information":
        """G of a path at sigma, of the very R and tempering that `Path.potential` has.

        Parameters
        ----------
        posterior, path, sigma
            What is tempered, how, and where.
        slope
            Bound on the norm of dA/dz where the problem is not linear: G is then bounded, not known.

        Raises
        ------
        CapabilityError
            If the path is not one whose curvature is known, or the problem is not linear and no slope is given.
        """
        linear = posterior.linear
        squared = stiffness(posterior, slope) ** 2
        if isinstance(path, Noised) and linear is not None:
            extra = path.kappa * sigma**2
            return cls(
                lambda v: linear.information(v, extra),
                lambda basis: linear.information_diagonal(basis, extra),
                squared / (1.0 + extra * squared),
            )
        if isinstance(path, Tempered):
            beta = 1.0 / (1.0 + (sigma / path.scale) ** 2)
            if linear is not None:
                return cls(
                    lambda v: beta * linear.information(v),
                    lambda basis: beta * linear.information_diagonal(basis),
                    beta * squared,
                )
            bound = torch.full((), beta * squared, dtype=torch.float64, device=posterior.device)
            return cls(lambda v: bound.to(v) * v, lambda _: bound, beta * squared)
        raise CapabilityError(
            f"The curvature along the path {type(path).__name__} is not known for this problem; use Noised() for "
            "linear-Gaussian problems, Tempered(scale=...) for others."
        )


def precondition(
    posterior: Posterior,
    information: Information,
    sigma: float,
    step_size: float,
    floor: float | None = None,
    direction: Tensor | None = None,
) -> Preconditioner:
    """Step and preconditioner of a refresh at sigma.

    Parameters
    ----------
    posterior, information, sigma
        The target.
    step_size
        e, in (0, 1.6]; made smaller where e * lambda_max would exceed 1.6.
    floor
        c: h is taken as at least c / sigma^2. If None, 0 for the exact curvature of a Gaussian prior, else
        0.5.
    direction
        That of the preconditioner at a level nearby; it saves most of the power iterations.
    """
    curvature, flat = posterior.curvature, 1.0 / sigma**2
    if curvature is None:
        value = step_size / (flat + information.largest)
        return Preconditioner(None, torch.full((), value, dtype=torch.float64, device=posterior.device))
    gaussian = hasattr(curvature, "prior_variance")  # a covariance that is the same for every z
    c = floor if floor is not None else (0.0 if gaussian else 0.5)
    like = torch.empty((), dtype=posterior.dtype, device=posterior.device)
    h = curvature.precision(sigma, floor=c).to(like)
    P = 1.0 / (h + information.diagonal(curvature).to(like))
    bound = h if gaussian else torch.full_like(h, flat)
    root = P.sqrt()
    start, iterations = direction, _LATER_ITERATIONS
    if start is None:
        start = torch.randn(prod(posterior.shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        iterations = _FIRST_ITERATIONS
    v = curvature.to_basis(start.to(like).reshape(1, *posterior.shape))
    largest = torch.ones_like(like)
    for _ in range(iterations):
        v = v / torch.linalg.vector_norm(v)
        v = root * (bound * root * v + curvature.to_basis(information.apply(curvature.from_basis(root * v))))
        largest = torch.linalg.vector_norm(v)
    found = curvature.from_basis(v / largest).flatten()
    return Preconditioner(curvature, P * torch.clamp(STABLE / largest, max=step_size), found)
