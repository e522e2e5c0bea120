"""The contract of a reverse-time stepper and the noise levels it walks down."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from torch import Tensor

from invdiff.errors import InputError

Denoise = Callable[[Tensor, float], Tensor]
"""(z, sigma) -> E[z_0 | z_sigma = z], perhaps guided by a measurement."""


def karras_levels(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> tuple[float, ...]:
    """Noise levels of Karras et al. 2022, eq. 5: ``steps`` of them from sigma_max down to sigma_min, then 0.

    Returns
    -------
        ``steps + 1`` falling levels, the last of which is 0.

    Raises
    ------
    InputError
        If steps < 1 or not 0 < sigma_min < sigma_max.
    """
    if steps < 1 or not 0.0 < sigma_min < sigma_max:
        raise InputError(f"Need steps >= 1 and 0 < sigma_min < sigma_max, got {steps}, {sigma_min}, {sigma_max}.")
    if steps == 1:
        return (float(sigma_max), 0.0)
    ramp = np.linspace(0.0, 1.0, steps)
    levels = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return (*map(float, levels), 0.0)


class Integrator(ABC):
    """A stepper from one noise level to the next; subclasses are final frozen dataclasses of settings."""

    evaluations: ClassVar[int] = 1
    """Denoiser evaluations a step (a step to sigma 0 may need fewer)."""

    @abstractmethod
    def step(
        self,
        denoise: Denoise,
        z: Tensor,
        sigma: float,
        sigma_next: float,
        *,
        memory: Tensor | None,
        sigma_previous: float | None,
        normal: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Move z from sigma to sigma_next < sigma.

        Parameters
        ----------
        denoise
            The denoiser.
        z
            State at sigma, any shape.
        sigma, sigma_next
            Noise levels; sigma_next may be 0.
        memory
            What the previous step returned; None at the first step. Multistep methods keep the last denoised state
            here, and whoever permutes the particles permutes it with them.
        sigma_previous
            Noise level from which the previous step started, to which the memory belongs; None at the first step.
        normal
            z -> fresh standard normals of its shape.

        Returns
        -------
            The state at sigma_next, and the memory for the next step.
        """
