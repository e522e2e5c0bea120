r"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) in variance-exploding notation.

With lambda = -log sigma, h = lambda' - lambda and r = h_previous / h,

    D~ = (1 + 1 / 2r) D - (1 / 2r) D_previous
    z' = (sigma' / sigma) z + (1 - sigma' / sigma) D~

Second order with one evaluation a step; the first step and the step to sigma' = 0 are first order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log
from typing import final

from torch import Tensor

from invdiff.integrators.base import Denoise, Integrator


@final
@dataclass(frozen=True, kw_only=True)
class DPMSolver2M(Integrator):
    """Deterministic second-order multistep stepper."""

    def step(
        self,
        denoise: Denoise,
        z: Tensor,
        sigma: float,
        sigma_next: float,
        *,
        memory: Tensor | None = None,
        sigma_previous: float | None = None,
        normal: Callable[[Tensor], Tensor] | None = None,  # noqa: ARG002 the contract's
    ) -> tuple[Tensor, Tensor | None]:
        """Move z from sigma to sigma_next; see `Integrator.step`."""
        d = denoise(z, sigma)
        extrapolated = d
        if memory is not None and sigma_previous is not None and sigma_next > 0.0:
            half_over_r = 0.5 * log(sigma / sigma_next) / log(sigma_previous / sigma)
            extrapolated = (1.0 + half_over_r) * d - half_over_r * memory
        ratio = sigma_next / sigma
        return ratio * z + (1.0 - ratio) * extrapolated, d
