"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239) in variance-exploding notation: first order, stochastic.

    z' = D + (sigma_down / sigma) (z - D) + sigma_up eps,
    sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2),  sigma_down = sqrt(sigma'^2 - sigma_up^2)

eta = 1 draws from the Gaussian q(z' | z, z_0 = D); eta = 0 is Euler.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import final

from torch import Tensor

from invdiff.errors import InputError
from invdiff.integrators.base import Denoise, Integrator


@final
@dataclass(frozen=True, kw_only=True)
class Ancestral(Integrator):
    """Stochastic first-order stepper.

    Parameters
    ----------
    eta
        Stochasticity in [0, 1].
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise InputError(f"Ancestral's eta lies in [0, 1], got {self.eta}.")

    def step(
        self,
        denoise: Denoise,
        z: Tensor,
        sigma: float,
        sigma_next: float,
        *,
        memory: Tensor | None = None,  # noqa: ARG002 the contract's
        sigma_previous: float | None = None,  # noqa: ARG002
        normal: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Move z from sigma to sigma_next; see `Integrator.step`."""
        d = denoise(z, sigma)
        up = self.eta * sigma_next * sqrt(1.0 - (sigma_next / sigma) ** 2)
        down = sqrt(sigma_next**2 - up**2)
        z = d + (down / sigma) * (z - d)
        return (z + up * normal(z), None) if up > 0.0 else (z, None)
