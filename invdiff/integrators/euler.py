"""Euler on the probability-flow ODE, which is DDIM (Song et al. 2021, arXiv 2010.02502).

First order, one evaluation a step:

    z' = D + (sigma' / sigma) (z - D)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import Tensor

from invdiff.integrators.base import Denoise, Integrator


@final
@dataclass(frozen=True, kw_only=True)
class Euler(Integrator):
    """Deterministic first-order stepper."""

    def step(
        self,
        denoise: Denoise,
        z: Tensor,
        sigma: float,
        sigma_next: float,
        *,
        memory: Tensor | None = None,  # noqa: ARG002 the contract's
        sigma_previous: float | None = None,  # noqa: ARG002
        normal: Callable[[Tensor], Tensor] | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:
        """Move z from sigma to sigma_next; see `Integrator.step`."""
        d = denoise(z, sigma)
        return d + (sigma_next / sigma) * (z - d), None
