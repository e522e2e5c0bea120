r"""Mixture of Gaussians with dense covariances.

The noised prior is ``sum_k w_k N(m_k, C_k + sigma^2 I)``; with responsibilities ``r_k(z)`` of its components the
denoiser is

    D(z, sigma) = sum_k r_k(z) (m_k + C_k (C_k + sigma^2 I)^{-1} (z - m_k)).
"""

from math import log, pi, prod
from typing import TYPE_CHECKING, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator
from invdiff.priors.analytic import AnalyticPrior, eigenbasis, gain
from invdiff.priors.base import Sigma

if TYPE_CHECKING:
    from invdiff.priors.exact import MixturePosterior


@final
class MixturePrior(AnalyticPrior):
    """A Gaussian mixture over the flattened event.

    Parameters
    ----------
    weights
        Positive weights of the components, shape (k,); normalised here.
    means
        Means, latent units, shape (k, *shape).
    covariances
        Symmetric positive semi-definite covariances of the flattened event, latent units squared, shape (k, d, d).
    sigma_min, sigma_max
        Noise levels, latent units. By default 1e-3 of the smallest std of any component and direction (directions below
        1e-2 of the largest apart), and 50 times the sum of the largest std and the largest distance of a component's
        mean from the mixture's (at least 10 |mean|).
    decoder
        Operator from latent to physical units; the identity if None.

    Raises
    ------
    ShapeError
        If the numbers of components or the shapes disagree.
    InputError
        If a weight is not positive or a covariance is not one.
    """

    name: ClassVar[str] = "mixture"
    _defining: ClassVar[tuple[str, ...]] = ("weights", "means", "covariances")
    weights: Tensor
    means: Tensor
    covariances: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        weights: Float[Tensor, " k"],
        means: Float[Tensor, " k *event"],
        covariances: Float[Tensor, "k d d"],
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: Operator | None = None,
    ) -> None:
        shape = tuple(means.shape[1:])
        k, d = len(means), prod(shape)
        if tuple(weights.shape) != (k,) or tuple(covariances.shape) != (k, d, d):
            raise ShapeError(
                f"For {k} means of shape {shape} the weights need shape ({k},) and the covariances ({k}, {d}, {d}); "
                f"got {tuple(weights.shape)} and {tuple(covariances.shape)}."
            )
        if not bool((weights > 0).all()) or not bool(torch.isfinite(weights).all()):
            raise InputError(
                f"Weights must be positive and finite, got {weights.tolist()}; leave out empty components."
            )
        super().__init__(shape, decoder)
        self.register_buffer("weights", weights.detach().double() / weights.detach().double().sum())
        self.register_buffer("means", means.detach().double().clone())
        self.register_buffer("covariances", covariances.detach().double().clone())
        values, vectors = eigenbasis(self.covariances)
        self.register_buffer("eigenvalues", values, persistent=False)
        self.register_buffer("eigenvectors", vectors, persistent=False)
        spread = float((self.means - self.mean).flatten(1).norm(dim=1).max())
        stds = float(values.min()) ** 0.5, float(values.max()) ** 0.5
        self._set_levels((sigma_min, sigma_max), stds, spread, float(self.mean.norm()))

    @property
    def mean(self) -> Float[Tensor, " *event"]:
        """Mean of the mixture."""
        return torch.einsum("k,k...->...", self.weights, self.means)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Covariance of the mixture: within plus between components."""
        shift = (self.means - self.mean).flatten(1)
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        return within + (self.weights[:, None] * shift).mT @ shift

    def _components(self, z: Tensor, sigma: Sigma) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients (n, k, d), sigma^2 to broadcast against them, and log w_k N(z; m_k, C_k + sigma^2 I) (n, k)."""
        self._check(z)
        shift = (z[:, None] - self.means.to(z)).flatten(2)
        c = torch.einsum("nkd,kde->nke", shift, self.eigenvectors.to(z))
        s2 = self._square(sigma, c)
        variance = (self.eigenvalues.to(z) + s2).clamp_min(torch.finfo(z.dtype).tiny)
        log_density = -0.5 * ((c**2 / variance + variance.log()).sum(2) + self.size * log(2.0 * pi))
        return c, s2, self.weights.log().to(z) + log_density

    def responsibilities(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, "n k"]:
        """Probability of each component given z_sigma = z."""
        return torch.softmax(self._components(z, sigma)[2], dim=1)

    def denoise(self, z: Float[Tensor, " n *event"], sigma: Sigma) -> Float[Tensor, " n *event"]:
        """E[z_0 | z_sigma = z], exact for every sigma >= 0; latent units."""
        c, s2, log_joint = self._components(z, sigma)
        shrunk = torch.einsum("nke,kde->nkd", c * gain(self.eigenvalues.to(z), s2), self.eigenvectors.to(z))
        means = self.means.to(z).flatten(1) + shrunk
        return torch.einsum("nk,nkd->nd", torch.softmax(log_joint, dim=1), means).reshape(z.shape)

    def log_prob(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, " n"]:
        """Log-density of z_sigma, nats; sigma = 0 is the prior itself."""
        self._check_density(sigma, self.eigenvalues.min())
        return torch.logsumexp(self._components(z, sigma)[2], dim=1)

    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, " n *event"]:
        """Independent exact draws, latent units, float64; draw i depends on the seed and i alone."""
        noise = self._noise(n, seed)
        cumulative = self.weights.cumsum(0)
        k = torch.searchsorted(
            cumulative / cumulative[-1], noise.uniform(noise.slots).contiguous(), right=True
        ).clamp_max(len(self.weights) - 1)
        c = noise.normal(noise.slots, (self.size,)) * self.eigenvalues.sqrt()[k]
        draws = self.means[k].clone()
        for component in range(
            len(self.weights)
        ):  # one product a component: gathering (n, d, d) eigenvectors would not fit
            rows = k == component
            draws[rows] += (c[rows] @ self.eigenvectors[component].mT).reshape(-1, *self.shape)
        return draws

    @torch.no_grad()
    def posterior(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> "MixturePosterior":
        """Exact posterior of a linear-Gaussian measurement, again a mixture; see `AnalyticPrior.posterior`."""
        from invdiff.priors.exact import mixture_posterior

        return mixture_posterior(self, operator, y, noise_std)
