r"""The error covariance of a trained denoiser, measured by spatial frequency, colour and noise level.

Photographs are close to stationary, so the denoiser's error is close to diagonal in the Fourier basis, and its
variance there depends on the radial frequency alone. Colours are decorrelated by a fixed orthonormal transform. For
the true posterior mean the mean squared error is ``E Cov[z_0 | z_sigma]``, the averaged second-order Tweedie formula,
so that the table serves as the curvature of a prior.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.priors.base import Curvature, half_multiplicity

KNOTS = tuple(k / 64 for k in (0, 1, 1.5, 2, 3, 4, 6, 8, 11, 16, 22, 32, 45.25))
"""Radial frequencies of the table, cycles a pixel; the last is the corner of the Nyquist square."""


def opponent_colours() -> Tensor:
    """Return the orthonormal rows grey, red minus blue, and magenta minus green, of RGB; shape (3, 3), float64."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


def radial_frequency(height: int, width: int) -> Tensor:
    """Radial frequency of each rfft2 coefficient, cycles a pixel, shape (height, width // 2 + 1), float64."""
    fy, fx = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    return torch.hypot(fy[:, None], fx[None])


def hat_weights(values: Tensor, knots: Tensor) -> Tensor:
    """Weights of linear interpolation between rising knots, clamped at the ends: (...) -> (..., len(knots))."""
    v = values.clamp(float(knots[0]), float(knots[-1]))
    right = torch.searchsorted(knots, v).clamp(1, len(knots) - 1)
    t = (v - knots[right - 1]) / (knots[right] - knots[right - 1])
    weights = torch.zeros(*v.shape, len(knots), dtype=knots.dtype, device=knots.device)
    weights.scatter_(-1, (right - 1)[..., None], (1 - t)[..., None])
    return weights.scatter_(-1, right[..., None], t[..., None])


class FrequencyTable(Curvature):
    """Error variance of a denoiser of RGB pictures, diagonal in opponent colours and the real Fourier transform.

    Parameters
    ----------
    shape
        Shape (3, h, w) of the pictures it speaks of; the table itself serves every size.
    sigmas
        Rising noise levels, latent units, shape (s,).
    log_variance
        Logarithm of the variance of a coefficient, latent units squared, shape (s, 3, len(KNOTS)). Between entries it
        is linear in ln(sigma) and in the frequency.

    Raises
    ------
    ShapeError
        If the pictures are not RGB or the table does not have that shape.
    InputError
        If the noise levels do not rise or a value is not finite.
    """

    def __init__(self, shape: tuple[int, ...], sigmas: Tensor, log_variance: Tensor) -> None:
        if len(shape) != 3 or shape[0] != 3:
            raise ShapeError(f"A frequency table speaks of pictures of shape (3, h, w), got {tuple(shape)}.")
        if log_variance.shape != (len(sigmas), 3, len(KNOTS)):
            raise ShapeError(
                f"The table must have shape {(len(sigmas), 3, len(KNOTS))}, got {tuple(log_variance.shape)}."
            )
        if not bool((sigmas[1:] > sigmas[:-1]).all()) or not bool(log_variance.isfinite().all()):
            raise InputError("A frequency table needs rising noise levels and finite entries; measure it again.")
        self.shape = tuple(shape)
        self.sigmas, self.log_variance = sigmas.detach().double().cpu(), log_variance.detach().double().cpu()
        self._colours = opponent_colours()
        self._knots = torch.tensor(KNOTS, dtype=torch.float64)
        self._last: tuple[float, Tensor] | None = None
        self._mixing: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._weights = hat_weights(radial_frequency(*self.shape[1:]), self._knots)

    @property
    def multiplicity(self) -> Tensor:
        """Two for a coefficient that stands for its conjugate too."""
        return half_multiplicity(self.shape[-1])

    def at(self, shape: tuple[int, ...]) -> "FrequencyTable":
        """Give the same table for pictures of another size."""
        return FrequencyTable(shape, self.sigmas, self.log_variance)

    def to_basis(self, z: Tensor) -> Tensor:
        """(n, 3, h, w) -> complex coefficients (n, 3, h, w // 2 + 1), colours grey, red-blue, magenta-green."""
        coefficients: Tensor = torch.fft.rfft2(self._mix(z, transpose=False), norm="ortho")
        return coefficients

    def from_basis(self, c: Tensor) -> Tensor:
        """Inverse of `to_basis`."""
        return self._mix(torch.fft.irfft2(c, s=self.shape[1:], norm="ortho"), transpose=True)

    def _mix(self, z: Tensor, *, transpose: bool) -> Tensor:
        where = (z.device, z.dtype)
        if where not in self._mixing:  # copied once: a copy to the device waits for all work there
            self._mixing[where] = self._colours.to(z)
        colours = self._mixing[where].mT if transpose else self._mixing[where]
        return (colours @ z.flatten(2)).reshape(z.shape)

    def variance(self, sigma: float) -> Tensor:
        """Error variance of each coefficient at one noise level, in (0, sigma^2], shape (3, h, w // 2 + 1), float32."""
        if self._last is not None and self._last[0] == float(sigma):  # conjugate gradients ask a hundred times a level
            return self._last[1]
        s2 = float(sigma) ** 2
        level = hat_weights(torch.tensor(float(sigma), dtype=torch.float64).log(), self.sigmas.log())
        log_variance = torch.einsum("s,sck,hwk->chw", level, self.log_variance, self._weights)
        tiny = torch.finfo(torch.float32).tiny
        self._last = (float(sigma), log_variance.exp().clamp(min=min(tiny, s2), max=s2).float())
        return self._last[1]

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored beside the weights."""
        return {"curvature.sigmas": self.sigmas.clone(), "curvature.log_variance": self.log_variance.float()}

    @classmethod
    def measure(
        cls,
        denoise: Callable[[Tensor, Tensor], Tensor],
        pictures: Iterable[Tensor],
        sigmas: Tensor,
        *,
        generator: torch.Generator,
    ) -> Self:
        """Measure the table on clean pictures.

        Parameters
        ----------
        denoise
            (z, sigma of shape (n,)) -> denoised pictures.
        pictures
            Batches (n, 3, h, w) in latent units, all of one size, on the denoiser's device.
        sigmas
            Rising noise levels, shape (s,).
        generator
            Source of the noise, on the same device.
        """
        total, count, fourier = None, 0, None
        shape: tuple[int, ...] = (3, 64, 64)
        for z0 in pictures:
            if total is None or fourier is None:
                shape = tuple(z0.shape[1:])
                fourier = cls(shape, sigmas, torch.zeros(len(sigmas), 3, len(KNOTS)))
                total = torch.zeros(len(sigmas), 3, shape[1], shape[2] // 2 + 1, dtype=torch.float64, device=z0.device)
            for i, sigma in enumerate(sigmas.tolist()):
                noise = torch.randn(z0.shape, generator=generator, device=z0.device, dtype=z0.dtype)
                with torch.no_grad():
                    error = denoise(z0 + sigma * noise, torch.full((len(z0),), sigma, device=z0.device)) - z0
                total[i] += fourier.to_basis(error).abs().double().square().sum(0)
            count += len(z0)
        if total is None or fourier is None:
            raise InputError("A frequency table needs at least one picture to be measured on.")
        power = (total / count).cpu()
        # Averages with the hats as weights stay positive; a least-squares fit of the hats might not. The columns
        # of rfft2 that stand for two coefficients count twice.
        weights = fourier._weights * fourier.multiplicity[None, :, None]
        mass = weights.sum((0, 1))
        seen = mass > 0  # a small picture has no coefficient near some knots: these are interpolated
        mean = torch.einsum("schw,hwk->sck", power, weights[..., seen]) / mass[seen]
        log_variance = mean.clamp_min(1e-30).log() @ hat_weights(fourier._knots, fourier._knots[seen]).T
        return cls(shape, sigmas, log_variance)
