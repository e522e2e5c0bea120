"""Heun on the probability-flow ODE (Karras et al. 2022, algorithm 1): second order, two evaluations a step.

    z~ = z + (sigma' - sigma) d,  d = (z - D) / sigma
    z' = z + (sigma' - sigma) (d + d~) / 2,  d~ = (z~ - D(z~, sigma')) / sigma'

The step to sigma' = 0 is Euler's, with one evaluation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from invdiff.integrators.base import Denoise, Integrator


@final
@dataclass(frozen=True, kw_only=True)
class Heun(Integrator):
    """Deterministic second-order stepper."""

    evaluations: ClassVar[int] = 2

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
        slope = (z - denoise(z, sigma)) / sigma
        end = z + (sigma_next - sigma) * slope
        if sigma_next == 0.0:
            return end, None
        slope_end = (end - denoise(end, sigma_next)) / sigma_next
        return z + (sigma_next - sigma) * 0.5 * (slope + slope_end), None
