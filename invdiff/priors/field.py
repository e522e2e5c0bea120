r"""Stationary Gaussian random field on a periodic grid.

The orthonormal Fourier transform F makes the coefficients independent with variances S(k), the power spectrum, so that

    D(z, sigma) = m + F^{-1} [S / (S + sigma^2)] F (z - m),

and the variance of one value is the mean of S over k. Lengths are in grid cells, frequencies f in cycles a cell.
"""

from math import log, pi
from typing import TYPE_CHECKING, ClassVar, Self, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator
from invdiff.priors.analytic import AnalyticPrior, ExactCurvature, gain
from invdiff.priors.base import Sigma

if TYPE_CHECKING:
    from invdiff.priors.exact import GaussianPosterior

_LARGEST_DENSE = 4096


@final
class FourierCurvature(ExactCurvature):
    """Error covariance in the orthonormal Fourier basis of a grid; complex coefficients of the event's shape."""

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(2, self.prior_variance.ndim + 1))

    def to_basis(self, z: Float[Tensor, " n *event"]) -> Tensor:
        """Fourier coefficients."""
        c: Tensor = torch.fft.fftn(z, dim=self._axes, norm="ortho")
        return c

    def from_basis(self, c: Tensor) -> Float[Tensor, " n *event"]:
        """Events from the coefficients of real events."""
        z: Tensor = torch.fft.ifftn(c, dim=self._axes, norm="ortho").real
        return z


@final
class FieldPrior(AnalyticPrior):
    """A stationary Gaussian field, its channels independent, on a periodic grid of one to three axes.

    Parameters
    ----------
    spectrum
        Variance of each orthonormal Fourier coefficient in the order of ``torch.fft.fftfreq``, latent units squared,
        not negative, symmetric under k -> -k; shape (c, *grid).
    mean
        Scalar, or tensor that broadcasts to (c, *grid); latent units.
    sigma_min, sigma_max
        Noise levels, latent units. By default 1e-3 of the smallest std of any coefficient (those below 1e-2 of the
        largest apart), and 50 times the largest (at least 10 |mean|).
    decoder
        Operator from latent to physical units; the identity if None.

    Raises
    ------
    ShapeError
        If the spectrum is not of shape (c, *grid), or the mean does not broadcast to it.
    InputError
        If the spectrum is negative, not finite or not symmetric.
    """

    name: ClassVar[str] = "field"
    _defining: ClassVar[tuple[str, ...]] = ("spectrum", "mean")
    spectrum: Tensor
    mean: Tensor

    def __init__(
        self,
        spectrum: Float[Tensor, " c *grid"],
        mean: float | Tensor = 0.0,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
    ) -> None:
        if not 2 <= spectrum.ndim <= 4:
            raise ShapeError(f"A spectrum has shape (c, x), (c, h, w) or (c, t, h, w), got {tuple(spectrum.shape)}.")
        s = spectrum.detach().double()
        if not bool(torch.isfinite(s).all()) or bool((s < 0).any()):
            raise InputError("A spectrum holds variances: it must be finite and not negative.")
        axes = tuple(range(1, s.ndim))
        asymmetry = float((s - s.flip(axes).roll([1] * len(axes), axes)).abs().max())
        if asymmetry > 1e-10 * float(s.max()):
            raise InputError(
                f"The spectrum of a real field satisfies S(k) = S(-k); this one differs by up to {asymmetry:.2e}. "
                "Give it in the order of torch.fft.fftfreq, the zero frequency first."
            )
        super().__init__(tuple(s.shape), decoder)
        self._axes = axes
        try:
            m = torch.as_tensor(mean, dtype=s.dtype, device=s.device).expand(self.shape)
        except RuntimeError as error:
            raise ShapeError(f"The mean must be a scalar or broadcast to {self.shape}.") from error
        self.register_buffer("spectrum", s.clone())
        self.register_buffer("mean", m.clone())
        stds = float(s.min()) ** 0.5, float(s.max()) ** 0.5
        self._set_levels((sigma_min, sigma_max), stds, 0.0, float(m.norm()))

    @classmethod
    def from_spectrum(
        cls,
        spectrum: Tensor,
        shape: tuple[int, ...],
        std: float | Tensor,
        mean: float | Tensor = 0.0,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
    ) -> Self:
        """Field with a spectrum known up to scale.

        Parameters
        ----------
        spectrum
            Not negative, broadcasting to ``shape``; only its form matters.
        shape
            Shape (c, *grid).
        std
            Standard deviation of one value, latent units, positive; a scalar, or one a channel, shape (c,).
        mean, sigma_min, sigma_max, decoder
            As for the class.
        """
        s = torch.broadcast_to(spectrum.double(), shape)
        level = torch.as_tensor(std, dtype=s.dtype, device=s.device).reshape(-1, *[1] * (s.ndim - 1))
        power = s.mean(tuple(range(1, s.ndim)), keepdim=True)
        if not bool((power > 0).all()) or not bool((level > 0).all()) or len(level) not in (1, len(s)):
            raise InputError(
                "A field needs a spectrum that is not all zero and a positive std, a scalar or one a channel."
            )
        return cls(s / power * level**2, mean, sigma_min=sigma_min, sigma_max=sigma_max, decoder=decoder)

    @classmethod
    def power_law(
        cls,
        shape: tuple[int, ...],
        exponent: float,
        std: float | Tensor = 1.0,
        mean: float | Tensor = 0.0,
        *,
        outer_scale: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
    ) -> Self:
        """Spectrum ``(1 / outer_scale^2 + |f|^2)^(-exponent / 2)``; photographs have an exponent near 2.

        Parameters
        ----------
        shape, std, mean, sigma_min, sigma_max, decoder
            As for `from_spectrum`.
        exponent
            Decay of the power with frequency; 0 is white noise.
        outer_scale
            Length beyond which the spectrum is flat, grid cells; the longest side of the grid if None.
        """
        knee = 1.0 / (max(shape[1:]) if outer_scale is None else outer_scale)
        spectrum = (knee**2 + _frequency_squared(shape)) ** (-0.5 * exponent)
        return cls.from_spectrum(spectrum, shape, std, mean, sigma_min=sigma_min, sigma_max=sigma_max, decoder=decoder)

    @classmethod
    def matern(
        cls,
        shape: tuple[int, ...],
        length: float,
        smoothness: float = 1.5,
        std: float | Tensor = 1.0,
        mean: float | Tensor = 0.0,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
    ) -> Self:
        """Spectrum of the Matern covariance, ``(2 nu / length^2 + 4 pi^2 |f|^2)^(-nu - dim / 2)``.

        Rasmussen & Williams 2006, eq. 4.15, taken at the grid's frequencies, so without aliasing from finer scales.

        Parameters
        ----------
        shape, std, mean, sigma_min, sigma_max, decoder
            As for `from_spectrum`.
        length
            Correlation length, grid cells, positive.
        smoothness
            nu, positive; 0.5 is the exponential covariance in one dimension.
        """
        f2 = _frequency_squared(shape)
        spectrum = (2.0 * smoothness / length**2 + 4.0 * pi**2 * f2) ** (-smoothness - 0.5 * f2.ndim)
        return cls.from_spectrum(spectrum, shape, std, mean, sigma_min=sigma_min, sigma_max=sigma_max, decoder=decoder)

    @property
    def curvature(self) -> FourierCurvature:
        """Exact error covariance, diagonal in the Fourier basis."""
        return FourierCurvature(self.spectrum)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Dense covariance of the flattened event, latent units squared, float64; for at most 4096 values."""
        if self.size > _LARGEST_DENSE:
            raise InputError(
                f"A dense covariance of {self.size} values is too large (at most {_LARGEST_DENSE}); use a smaller grid."
            )
        parts = torch.split(torch.eye(self.size, dtype=self.spectrum.dtype, device=self.spectrum.device), 256)
        return torch.cat([self._filter(self.spectrum, rows.reshape(-1, *self.shape)).flatten(1) for rows in parts])

    def _filter(self, transfer: Tensor, z: Tensor) -> Tensor:
        """F^{-1} transfer F z for a real transfer function that is even in k, of shape (n or 1, c, *grid)."""
        axes = tuple(a + 1 for a in self._axes)
        half = transfer[..., : self.shape[-1] // 2 + 1]
        filtered: Tensor = torch.fft.irfftn(half * torch.fft.rfftn(z, dim=axes), s=self.shape[1:], dim=axes)
        return filtered

    def denoise(self, z: Float[Tensor, " n *event"], sigma: Sigma) -> Float[Tensor, " n *event"]:
        """E[z_0 | z_sigma = z], exact for every sigma >= 0; latent units."""
        self._check(z)
        m = self.mean.to(z)
        return m + self._filter(gain(self.spectrum.to(z), self._square(sigma, z)), z - m)

    def log_prob(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, " n"]:
        """Log-density of z_sigma, nats; sigma = 0 is the prior itself."""
        self._check(z)
        self._check_density(sigma, self.spectrum.min())
        power = torch.view_as_real(self.curvature.to_basis(z - self.mean.to(z))).square().sum(-1)
        variance = self.spectrum.to(z) + self._square(sigma, z)
        return -0.5 * ((power / variance + variance.log()).flatten(1).sum(1) + self.size * log(2.0 * pi))

    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, " n *event"]:
        """Independent exact draws, latent units, float64; draw i depends on the seed and i alone."""
        noise = self._noise(n, seed)
        return self.mean + self._filter(self.spectrum.sqrt(), noise.normal(noise.slots, self.shape))

    @torch.no_grad()
    def posterior(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> "GaussianPosterior":
        """Exact posterior by dense algebra, for at most 4096 values; see `AnalyticPrior.posterior`."""
        from invdiff.priors.exact import gaussian_posterior

        return gaussian_posterior(self, self.mean, self.covariance, operator, y, noise_std)


def _frequency_squared(shape: tuple[int, ...]) -> Float[Tensor, " *grid"]:
    """|f|^2 on the grid of a shape (c, *grid), cycles a cell, squared."""
    if len(shape) < 2:
        raise ShapeError(f"A field has shape (c, x), (c, h, w) or (c, t, h, w), got {tuple(shape)}.")
    axes = [torch.fft.fftfreq(side, dtype=torch.float64) ** 2 for side in shape[1:]]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)
