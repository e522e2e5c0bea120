r"""Gaussian prior with a dense covariance.

With ``C = V diag(l) V^T`` the noised prior is ``N(m, C + sigma^2 I)`` and its denoiser the Wiener filter

    D(z, sigma) = m + V diag(l / (l + sigma^2)) V^T (z - m).
"""

from collections.abc import Mapping
from math import log, pi, prod
from typing import TYPE_CHECKING, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, CatalogueError, ShapeError
from invdiff.event import Event
from invdiff.operators.base import Operator
from invdiff.operators.composition import Affine
from invdiff.priors.analytic import AnalyticPrior, ExactCurvature, eigenbasis, gain
from invdiff.priors.base import Sigma

if TYPE_CHECKING:
    from invdiff.priors.exact import GaussianPosterior


@final
class EigenCurvature(ExactCurvature):
    """Error covariance in the eigenbasis of a dense covariance.

    Parameters
    ----------
    values, vectors
        Eigenvalues (d,) and orthonormal eigenvectors (d, d) in columns.
    shape
        Shape of one event.
    """

    def __init__(self, values: Float[Tensor, " d"], vectors: Float[Tensor, "d d"], shape: tuple[int, ...]) -> None:
        super().__init__(values)
        self.vectors, self.shape = vectors, tuple(shape)

    def to_basis(self, z: Float[Tensor, " n *event"]) -> Float[Tensor, "n d"]:
        """Coefficients along the eigenvectors."""
        return z.flatten(1) @ self.vectors.to(z)

    def from_basis(self, c: Float[Tensor, "n d"]) -> Float[Tensor, " n *event"]:
        """Events from coefficients."""
        return (c @ self.vectors.to(c).mT).reshape(len(c), *self.shape)


@final
class GaussianPrior(AnalyticPrior):
    """N(mean, covariance) over the flattened event.

    Parameters
    ----------
    mean
        Mean, latent units, shape (*shape) or (d,).
    covariance
        Symmetric positive semi-definite covariance of the flattened event, latent units squared, shape (d, d).
    shape
        Shape of one event; the mean's if None.
    sigma_min, sigma_max
        Noise levels, latent units. By default 1e-3 of the smallest std of any direction (directions below 1e-2 of the
        largest apart), and 50 times the largest (at least 10 |mean|).
    decoder
        Operator from latent to physical units; the identity if None.
    event
        The unknown; several variables stand one after the other in a flat event. A plain one of the shape if None.

    Raises
    ------
    ShapeError
        If mean, covariance, shape and event disagree.
    InputError
        If the covariance is not one.
    """

    name: ClassVar[str] = "gaussian"
    _defining: ClassVar[tuple[str, ...]] = ("mean", "covariance")
    mean: Tensor
    covariance: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        mean: Tensor,
        covariance: Float[Tensor, "d d"],
        shape: tuple[int, ...] | None = None,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
        event: Event | None = None,
    ) -> None:
        shape = tuple(mean.shape) if shape is None else tuple(shape)
        d = prod(shape)
        if mean.numel() != d or tuple(covariance.shape) != (d, d):
            raise ShapeError(
                f"For events of shape {shape} the mean needs {d} values and the covariance shape ({d}, {d}); "
                f"got {tuple(mean.shape)} and {tuple(covariance.shape)}."
            )
        super().__init__(shape, decoder)
        self._event = super().event if event is None else tuple(event)
        if sum(v.size for v in self._event) != prod(self.decoder.out_shape):
            raise ShapeError(
                f"The event's variables have {sum(v.size for v in self._event)} values, the prior's events "
                f"{prod(self.decoder.out_shape)}."
            )
        self.register_buffer("mean", mean.detach().double().reshape(shape).clone())
        self.register_buffer("covariance", covariance.detach().double().clone())
        values, vectors = eigenbasis(self.covariance)
        self.register_buffer("eigenvalues", values, persistent=False)
        self.register_buffer("eigenvectors", vectors, persistent=False)
        stds = float(values[0]) ** 0.5, float(values[-1]) ** 0.5
        self._set_levels((sigma_min, sigma_max), stds, 0.0, float(self.mean.norm()))

    @property
    def curvature(self) -> EigenCurvature:
        """Exact error covariance, diagonal in the eigenbasis."""
        return EigenCurvature(self.eigenvalues, self.eigenvectors, self.shape)

    @property
    def event(self) -> Event:
        """The unknown in physical units."""
        return self._event

    def condition(self, given: Mapping[str, Tensor]) -> "GaussianPrior":
        """Return the law given some variables, as a prior on the same event whose known values do not vary.

        Parameters
        ----------
        given
            Values of whole variables of the event by name, physical units.

        Raises
        ------
        CatalogueError, ShapeError
            If a variable is not of the event, or its values have another shape.
        CapabilityError
            If the decoder is not affine with scalar coefficients.
        """
        if not isinstance(self.decoder, Affine):
            raise CapabilityError(f"Known values cannot be carried back through {type(self.decoder).__name__}.")
        known = torch.zeros(self.size, dtype=torch.bool, device=self.mean.device)
        value, start = self.mean.flatten().clone(), 0
        for v in self.event:
            if v.name in given:
                x = given[v.name]
                if tuple(x.shape) != v.shape:
                    raise ShapeError(f"The given {v.name!r} has shape {tuple(x.shape)}, the variable {v.shape}.")
                known[start : start + v.size] = True
                value[start : start + v.size] = ((x.to(value) - self.decoder.offset) / self.decoder.scale).flatten()
            start += v.size
        for name in set(given) - {v.name for v in self.event}:
            raise CatalogueError.unknown("variable of the prior", name, [v.name for v in self.event])
        C, free = self.covariance, ~known
        G = (
            torch.linalg.lstsq(C[known][:, known], C[known][:, free], driver="gelsd").solution.mT
            if known.any() and free.any()
            else None
        )
        mean, covariance = value.clone(), torch.zeros_like(C)
        covariance[torch.outer(free, free)] = C[free][:, free].flatten()
        if G is not None:
            mean[free] += G @ (value - self.mean.flatten())[known]
            covariance[torch.outer(free, free)] -= (G @ C[known][:, free]).flatten()
        return GaussianPrior(
            mean.reshape(self.shape),
            covariance,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            decoder=self.decoder,
            event=self.event,
        )

    def _coefficients(self, z: Tensor) -> Tensor:
        self._check(z)
        return (z - self.mean.to(z)).flatten(1) @ self.eigenvectors.to(z)

    def denoise(self, z: Float[Tensor, " n *event"], sigma: Sigma) -> Float[Tensor, " n *event"]:
        """E[z_0 | z_sigma = z], exact for every sigma >= 0; latent units."""
        c = self._coefficients(z)
        c = c * gain(self.eigenvalues.to(z), self._square(sigma, c))
        return self.mean.to(z) + (c @ self.eigenvectors.to(z).mT).reshape(z.shape)

    def log_prob(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, " n"]:
        """Log-density of z_sigma, nats; sigma = 0 is the prior itself."""
        self._check_density(sigma, self.eigenvalues[0])
        c = self._coefficients(z)
        variance = self.eigenvalues.to(z) + self._square(sigma, c)
        return -0.5 * ((c**2 / variance + variance.log()).sum(1) + self.size * log(2.0 * pi))

    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, " n *event"]:
        """Independent exact draws, latent units, float64; draw i depends on the seed and i alone."""
        noise = self._noise(n, seed)
        c = noise.normal(noise.slots, (self.size,)) * self.eigenvalues.sqrt()
        return self.mean + (c @ self.eigenvectors.mT).reshape(n, *self.shape)

    @torch.no_grad()
    def posterior(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> "GaussianPosterior":
        """Exact posterior of a linear-Gaussian measurement; see `AnalyticPrior.posterior`."""
        from invdiff.priors.exact import gaussian_posterior

        return gaussian_posterior(self, self.mean, self.covariance, operator, y, noise_std)
