"""What a prior is: two Protocols over one base, so that a user's network is a prior without inheriting."""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Sigma = float | Tensor
"""A noise level in latent units: a float, or a tensor (n,), one a particle."""


@runtime_checkable
class DiffusionPrior(Protocol):
    """A continuous diffusion prior, variance-exploding: ``z_sigma = z_0 + sigma * eps`` (Karras et al. 2022).

    This is the least that a user writes. Optional members, used where they exist: ``decoder`` (an Operator from latent
    to physical units; the identity if missing), ``event``, ``encode(x)``, ``sample(n, seed=)``, ``at(shape)``,
    ``condition(given)``, ``curvature`` (a `Curvature`), ``name``, ``key`` (a hash of what defines it) and ``dtype``.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent event."""
        ...

    @property
    def sigma_min(self) -> float:
        """Smallest noise level at which the denoiser is accurate, latent units."""
        ...

    @property
    def sigma_max(self) -> float:
        """Noise level at which the noised prior is a Gaussian for all purposes, latent units."""
        ...

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z] for z of shape (n, *shape), latent units."""
        ...


@runtime_checkable
class MaskedPrior(Protocol):
    """A masked discrete diffusion prior with time-independent conditionals (Ou et al. 2024, RADD).

    Optional members, used where they exist: ``detokeniser`` (an Operator from embeddings (length, c) to physical units
    that `decode_embedding` applies; says whether the way out is linear), ``event``, ``sample(n, seed=)``,
    ``fill(tokens)`` (sequences with the tokens in their places that are known beforehand), ``name`` and ``key`` (a hash
    of what defines it).
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event: (length,)."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens, the mask not among them."""
        ...

    @property
    def mask_token(self) -> int:
        """Index of the mask."""
        ...

    @property
    def codebook(self) -> Tensor:
        """Embedding of each token, shape (V, c); one-hot if none is trained."""
        ...

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Log p(z_0^i | unmasked tokens), shape (n, length, V); one-hot where a token is known."""
        ...

    def decode_embedding(self, embedding: Tensor) -> Tensor:
        """Physical units from embeddings (n, length, c), so that guidance through soft embeddings has its way."""
        ...


@runtime_checkable
class Measurement(Protocol):
    """What an exact posterior asks of a likelihood."""

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        ...

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the measurement at x (n, *shape), physical units."""
        ...


def half_multiplicity(size: int) -> Tensor:
    """Return how many coefficients of a real axis of that size each of its rfft stands for, shape (size // 2 + 1,)."""
    twice = torch.full((size // 2 + 1,), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if size % 2 == 0:
        twice[-1] = 1.0
    return twice


class Curvature(ABC):
    r"""Error covariance of a denoiser by sigma, diagonal in a fixed orthonormal basis.

    The covariance ``C(sigma) = Cov[z_0 | z_sigma]`` is what Tweedie's second-order formula gives,
    ``C = sigma^2 dD/dz``; the curvature of ``-log p_sigma`` follows as ``h = (1 - C / sigma^2) / sigma^2``. For a
    Gaussian prior it is exact; for a trained one it is the table of its mean squared error by frequency.

    Subclasses give `to_basis`, `from_basis` and `variance`.
    """

    @property
    def multiplicity(self) -> Tensor | None:
        """How many coefficients of the orthonormal basis each one that is stored stands for; None if itself alone."""
        return None

    @abstractmethod
    def to_basis(self, z: Tensor) -> Tensor:
        """Coefficients of z (n, *shape) in the orthonormal basis; may be complex."""

    @abstractmethod
    def from_basis(self, c: Tensor) -> Tensor:
        """Inverse of `to_basis`."""

    @abstractmethod
    def variance(self, sigma: float) -> Tensor:
        """Error variance of each coefficient, broadcasting against coefficients without their leading axis."""

    def covariance(self, v: Tensor, sigma: float) -> Tensor:
        """C(sigma) v."""
        return self.from_basis(self.variance(sigma).to(v.device) * self.to_basis(v)).to(v.dtype)

    def precision(self, sigma: float, floor: float = 0.0) -> Tensor:
        """Curvature h of -log p_sigma by coefficient, clamped below at ``floor / sigma^2``."""
        h = (1.0 - self.variance(sigma) / sigma**2) / sigma**2
        return torch.clamp(h, min=floor / sigma**2)
