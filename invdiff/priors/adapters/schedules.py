r"""Noise schedules of discrete variance-preserving models, and the time step of any noise level.

A model trained on ``x_i = sqrt(abar_i) x_0 + sqrt(1 - abar_i) eps`` at steps i = 0 .. N - 1 knows the noise levels
``sigma_i = sqrt((1 - abar_i) / abar_i)`` of ``x_i / sqrt(abar_i)``. Between them the step is the fraction

    t(sigma) = i + (ln sigma - ln sigma_i) / (ln sigma_{i+1} - ln sigma_i),

never rounded: sinusoidal embeddings take fractions, and a rounded step makes D jump in sigma.
"""

import hashlib
from collections.abc import Mapping, Sequence
from math import cos, pi
from typing import Any, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.operators.caches import Cache

_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


@final
class NoiseSchedule:
    """The noise levels of a discrete variance-preserving diffusion.

    Parameters
    ----------
    alphas_cumprod
        Falling abar_i in (0, 1), shape (N,), N >= 2. Trailing zeros, as of a zero terminal signal-to-noise ratio (Lin
        et al. 2024, arXiv:2305.08891), are left out: their noise level is infinite.

    Raises
    ------
    InputError
        If there are fewer than two levels, or they do not fall strictly within (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if abar.ndim == 1:
            last = len(abar)
            while last and float(abar[last - 1]) == 0.0:
                last -= 1
            abar = abar[:last]
        fall = abar.ndim == 1 and len(abar) > 1 and bool((abar.diff() < 0).all())
        if not fall or not bool((abar > 0).all() & (abar < 1).all()):
            raise InputError(
                "A noise schedule is at least two values of abar that fall strictly from below 1 to above 0, got "
                f"shape {tuple(abar.shape)} from {float(abar.max()) if abar.numel() else 'nothing'} to "
                f"{float(abar.min()) if abar.numel() else 'nothing'}."
            )
        self.sigmas: Float[Tensor, " N"] = ((1.0 - abar) / abar).sqrt()
        self._cache = Cache()

    def __repr__(self) -> str:
        digest = hashlib.sha256(",".join(f"{s:.6g}" for s in self.sigmas.tolist()).encode()).hexdigest()[:12]
        ends = f"sigma {self.sigma_min:.6g} to {self.sigma_max:.6g}"
        return f"NoiseSchedule({len(self.sigmas)} steps, {ends}, {digest})"  # the digest makes priors' keys differ

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and torch.equal(self.sigmas, other.sigmas)

    def __hash__(self) -> int:
        return hash((len(self.sigmas), self.sigma_min, self.sigma_max))

    @property
    def sigma_min(self) -> float:
        """Noise level of step 0, in units of x_0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Noise level of the last step with a finite one, in units of x_0."""
        return float(self.sigmas[-1])

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float], *, zero_terminal_snr: bool = False) -> Self:
        """Schedule of ``abar = cumprod(1 - beta)``.

        Parameters
        ----------
        betas
            In [0, 1), shape (N,).
        zero_terminal_snr
            Shift and scale sqrt(abar) so that it ends at 0 and begins where it did (Lin et al. 2024, algorithm 1). The
            last step, of infinite noise, is left out of the schedule.
        """
        abar = torch.cumprod(1.0 - torch.as_tensor(betas, dtype=torch.float64), 0)
        if zero_terminal_snr:
            root = abar.sqrt()
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return cls(abar)

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Self:
        """Betas linear in the step (Ho et al. 2020); by default sigma runs from 0.0100 to 157.4."""
        return cls.from_betas(torch.linspace(start, end, steps, dtype=torch.float64))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Schedule in the config of a diffusers scheduler.

        Parameters
        ----------
        config
            With ``trained_betas``, or ``num_train_timesteps`` and a ``beta_schedule`` of linear, scaled_linear (both
            with ``beta_start`` and ``beta_end``) or squaredcos_cap_v2 (Nichol & Dhariwal 2021), and perhaps
            ``rescale_betas_zero_snr``. What sets the sampling alone (spacing, clipping) has no part in a denoiser.

        Raises
        ------
        CapabilityError
            If the schedule is of another kind.
        InputError
            If a field is missing.
        """
        zero = bool(config.get("rescale_betas_zero_snr", False))
        if config.get("trained_betas") is not None:
            return cls.from_betas([float(b) for b in config["trained_betas"]], zero_terminal_snr=zero)
        kind = _field(config, "beta_schedule")
        steps = int(_field(config, "num_train_timesteps"))
        if kind not in _BETAS:
            raise CapabilityError(
                f"The beta_schedule {kind!r} is not among {', '.join(_BETAS)}; give its betas as trained_betas."
            )
        if kind == "squaredcos_cap_v2":
            signal = [cos((i / steps + 0.008) / 1.008 * pi / 2) ** 2 for i in range(steps + 1)]
            betas = 1.0 - torch.tensor(signal[1:], dtype=torch.float64) / torch.tensor(signal[:-1], dtype=torch.float64)
            return cls.from_betas(betas.clamp(max=0.999), zero_terminal_snr=zero)
        start, end = float(_field(config, "beta_start")), float(_field(config, "beta_end"))
        power = 2.0 if kind == "scaled_linear" else 1.0
        grid = torch.linspace(start ** (1 / power), end ** (1 / power), steps, dtype=torch.float64)
        return cls.from_betas(grid**power, zero_terminal_snr=zero)

    def time(self, sigma: Tensor) -> Tensor:
        """Fractional time step of noise levels, in [0, N - 1]; beyond the schedule its first or last step.

        Parameters
        ----------
        sigma
            Noise levels in units of x_0, shape (n,).

        Returns
        -------
            Shape (n,), in the dtype of sigma, but at least float32: half precision does not tell 998 from 998.4.
        """
        log_sigmas = self._cache.get(
            self.sigmas, sigma.device, lambda: self.sigmas.to(sigma.device).log()
        )  # moved once a device, and never cast with the weights
        log_sigma = sigma.double().log()
        i = torch.searchsorted(log_sigmas, log_sigma.detach().contiguous(), right=True) - 1
        i = i.clamp(0, len(log_sigmas) - 2)
        low, high = log_sigmas[i], log_sigmas[i + 1]
        t = (i + (log_sigma - low) / (high - low)).clamp(0, len(log_sigmas) - 1)
        return t.to(torch.promote_types(sigma.dtype, torch.float32))


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise InputError(
            f"The scheduler's config lacks {name!r}; it has {', '.join(sorted(map(str, config))) or 'no fields'}. "
            "Needed: trained_betas, or num_train_timesteps, beta_schedule, beta_start and beta_end."
        )
    return config[name]
