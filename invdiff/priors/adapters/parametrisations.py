r"""What networks predict, and the denoiser that follows from it.

Every common parametrisation has the form of Karras et al. 2022, eq. 7, in ``z = z_0 + sigma eps``:

    D(z, sigma) = c_skip z + c_out N(c_in z, time).

With ``a = 1 / sqrt(1 + sigma^2) = sqrt(abar)`` and ``b = sigma a``:

    network                          c_in        time              c_skip      c_out
    eps          (VP)                a           t(sigma)          1           -sigma
    v = a eps - b x_0  (VP)          a           t(sigma)          a^2         -b
    x_0          (VP)                a           t(sigma)          0           1
    score of a x_0 + b eps  (VP)     a           t(sigma)          1           b^2 / a
    F            (EDM)               1 / r       ln(sigma) / 4     s^2 / r^2   sigma s / r,    r^2 = sigma^2 + s^2
    F            (VE)                1           ln(sigma / 2)     1           sigma
    u = eps - x_0      (flow)        1 - t       t                 1 - t       -t,             t = sigma / (1 + sigma)
    x_0 itself   (a denoiser)        1           sigma             0           1

(Ho et al. 2020; Salimans & Ho 2022; Song et al. 2021; Karras et al. 2022; Liu et al. 2023.)
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.priors.adapters.schedules import NoiseSchedule


class Coefficients(NamedTuple):
    """Coefficients at noise levels (n,), each of shape (n,); the time is what the network is called with."""

    c_in: Tensor
    time: Tensor
    c_skip: Tensor
    c_out: Tensor


class Parametrisation(ABC):
    """What a network predicts; subclasses are frozen settings."""

    @property
    @abstractmethod
    def levels(self) -> tuple[float, float] | None:
        """Smallest and largest noise level of the training, latent units; None where nothing is known of it."""

    @property
    def counts_steps(self) -> bool:
        """Whether the time counts many steps, so that it must not be rounded to a network's half precision."""
        return False

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""


@final
@dataclass(frozen=True, kw_only=True)
class VariancePreserving(Parametrisation):
    """A network of ``x_t = a x_0 + b eps`` at the steps of a schedule.

    Parameters
    ----------
    predicts
        "epsilon", "v_prediction", "sample" (x_0) or "score" (of x_t).
    schedule
        Noise levels of the steps.
    integer_steps
        Call the network at the nearest whole step, as int64, for networks that look their time up in a table of
        embeddings. D then jumps in sigma half-way between steps, and is what was trained only at the schedule's levels;
        it stays differentiable in z.
    """

    predicts: Literal["epsilon", "v_prediction", "sample", "score"] = "epsilon"
    schedule: NoiseSchedule
    integer_steps: bool = False

    def __post_init__(self) -> None:
        if self.predicts not in ("epsilon", "v_prediction", "sample", "score"):
            raise InputError(
                f"A variance-preserving network predicts 'epsilon', 'v_prediction', 'sample' or 'score', got "
                f"{self.predicts!r}."
            )

    @property
    def levels(self) -> tuple[float, float]:
        """Those of the schedule's first and last step."""
        return self.schedule.sigma_min, self.schedule.sigma_max

    @property
    def counts_steps(self) -> bool:
        """Yes."""
        return True

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""
        time = self.schedule.time(sigma)
        if self.integer_steps:
            time = time.round().long()
        one = torch.ones_like(sigma)
        a = (1.0 + sigma**2).rsqrt()
        if self.predicts == "epsilon":
            return Coefficients(a, time, one, -sigma)
        if self.predicts == "v_prediction":
            return Coefficients(a, time, a**2, -sigma * a)
        if self.predicts == "sample":
            return Coefficients(a, time, torch.zeros_like(sigma), one)
        return Coefficients(a, time, one, sigma**2 * a)


@final
@dataclass(frozen=True, kw_only=True)
class EDM(Parametrisation):
    """The network F of EDM's preconditioning.

    Parameters
    ----------
    sigma_data
        Standard deviation of the data in the training, latent units; 0.5 in the published checkpoints.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise InputError(f"sigma_data is a standard deviation and must be positive, got {self.sigma_data}.")

    @property
    def levels(self) -> tuple[float, float]:
        """Those of Karras et al. 2022: 0.002 to 80."""
        return 0.002, 80.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""
        s = self.sigma_data
        r = (sigma**2 + s**2).sqrt()
        return Coefficients(1.0 / r, sigma.log() / 4, (s / r) ** 2, sigma * s / r)


@final
@dataclass(frozen=True, kw_only=True)
class VarianceExploding(Parametrisation):
    """The network F of a variance-exploding model (NCSN++), the score times sigma, called with ln(sigma / 2)."""

    @property
    def levels(self) -> tuple[float, float]:
        """Those of Karras et al. 2022, table 1: 0.02 to 100."""
        return 0.02, 100.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""
        one = torch.ones_like(sigma)
        return Coefficients(one, (sigma / 2).log(), one, sigma)


@final
@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(Parametrisation):
    """A network of the velocity ``u = eps - x_0`` at ``x_t = (1 - t) x_0 + t eps``, so noise at t = 1.

    Parameters
    ----------
    time_scale
        The network is called with ``time_scale * t``; 1000 in diffusers.
    smallest_time
        The noise levels run from t = smallest_time to 1 - smallest_time, in (0, 0.5).
    """

    time_scale: float = 1.0
    smallest_time: float = 1e-3

    def __post_init__(self) -> None:
        if not self.time_scale > 0 or not 0 < self.smallest_time < 0.5:
            raise InputError(
                f"Need time_scale > 0 and 0 < smallest_time < 0.5, got {self.time_scale} and {self.smallest_time}."
            )

    @property
    def levels(self) -> tuple[float, float]:
        """Sigma = t / (1 - t) at both ends."""
        ratio = self.smallest_time / (1.0 - self.smallest_time)
        return ratio, 1.0 / ratio

    @property
    def counts_steps(self) -> bool:
        """Whether the time is scaled up."""
        return self.time_scale > 1.0

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""
        clean = 1.0 / (1.0 + sigma)
        t = sigma * clean
        return Coefficients(clean, self.time_scale * t, clean, -t)


@final
@dataclass(frozen=True, kw_only=True)
class Denoised(Parametrisation):
    """A denoiser: called with (z, sigma), it returns E[z_0 | z]."""

    @property
    def levels(self) -> None:
        """Unknown: a denoiser does not say what it was trained for."""
        return

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Coefficients at positive noise levels (n,), latent units."""
        one = torch.ones_like(sigma)
        return Coefficients(one, sigma, torch.zeros_like(sigma), one)
