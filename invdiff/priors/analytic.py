"""What analytic priors share: checked shapes, noise levels from the prior's own scale, the way out and a key."""

import hashlib
from abc import ABC, abstractmethod
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import Event, plain_event
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator, fingerprint
from invdiff.operators.composition import Affine
from invdiff.priors.base import Curvature, Sigma

if TYPE_CHECKING:
    from invdiff.priors.exact import ExactPosterior


class AnalyticPrior(nn.Module, ABC):
    """A prior whose denoiser, density, draws and linear-Gaussian posteriors are exact.

    Buffers are float64; `denoise` and `log_prob` compute in the dtype of their input, `sample` and posteriors in
    float64.

    Parameters
    ----------
    shape
        Shape of one latent event.
    decoder
        Operator from latent to physical units; the identity if None.
    """

    name: ClassVar[str]
    _defining: ClassVar[tuple[str, ...]]  # buffers that define the prior; the others follow from them
    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    decoder: Operator

    def __init__(self, shape: tuple[int, ...], decoder: Operator | None) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.decoder = Affine(self.shape) if decoder is None else decoder
        if self.decoder.in_shape != self.shape:
            raise ShapeError(f"The decoder takes events of shape {self.decoder.in_shape}, the prior has {self.shape}.")
        self._key: str | None = None

    def _set_levels(
        self, given: tuple[float | None, float | None], stds: tuple[float, float], spread: float, mean_norm: float
    ) -> None:
        """Set the noise levels: as given, or from the smallest and largest std of any direction and the means.

        At the default sigma_max the Kullback-Leibler divergence from N(0, sigma_max^2) is about std^4 / (4 sigma_max^4)
        a direction, below 4e-8, plus |mean|^2 / (2 sigma_max^2), below 0.005. Directions a hundred times narrower than
        the widest do not lower sigma_min: no sampler could afford the levels.
        """
        smallest, largest = max(stds[0], 1e-2 * stds[1]), stds[1]
        if given[0] is None and largest == 0:
            raise InputError("A prior without any variance has no scale; give sigma_min and sigma_max.")
        self.sigma_min = 1e-3 * smallest if given[0] is None else float(given[0])
        self.sigma_max = max(50.0 * (largest + spread), 10.0 * mean_norm) if given[1] is None else float(given[1])
        if not 0.0 < self.sigma_min < self.sigma_max < float("inf"):
            raise InputError(
                f"Noise levels must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}."
            )

    @property
    def size(self) -> int:
        """Number of values of one event."""
        return prod(self.shape)

    @property
    def event(self) -> Event:
        """The unknown in physical units."""
        return plain_event(self.decoder.out_shape)

    @property
    def key(self) -> str:
        """Hash of what defines the prior: its parameters, noise levels and decoder."""
        if self._key is None:
            levels = (
                f"{self.sigma_min:.6g},{self.sigma_max:.6g}"  # derived ones may differ in rounding between machines
            )
            digest = hashlib.sha256(
                f"{type(self).__qualname__}{self.shape}{levels}{fingerprint(self.decoder)}".encode()
            )
            for name in self._defining:
                tensor = self.get_buffer(name)
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
            self._key = digest.hexdigest()
        return self._key

    @property
    def curvature(self) -> Curvature | None:
        """Exact error covariance of the denoiser, or None where it is not the same for every z."""
        return None

    def decode(self, z: Float[Tensor, " n *event"]) -> Tensor:
        """Physical units from latent units."""
        x: Tensor = self.decoder(z)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Latent units from physical units.

        Raises
        ------
        CapabilityError
            If the decoder has no ``inverse``.
        """
        inverse = getattr(self.decoder, "inverse", None)
        if inverse is None:
            raise CapabilityError(
                f"{type(self.decoder).__name__} has no inverse; give a decoder with one, e.g. operators.Affine."
            )
        z: Tensor = inverse(x)
        return z

    def _check(self, z: Tensor) -> None:
        if tuple(z.shape[1:]) != self.shape:
            raise ShapeError(
                f"{type(self).__name__} takes z of shape (n, {', '.join(map(str, self.shape))}), got {tuple(z.shape)}."
            )

    def _square(self, sigma: Sigma, z: Tensor) -> Tensor:
        """sigma^2 in the dtype of z, shape () or (n, 1, ..., 1)."""
        s = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
        if s.ndim and s.shape != z.shape[:1]:
            raise ShapeError(f"sigma must be a float or one value a particle, shape ({len(z)},), got {tuple(s.shape)}.")
        return (s.reshape(-1, *[1] * (z.ndim - 1)) if s.ndim else s) ** 2

    def _check_density(self, sigma: Sigma, smallest_variance: Tensor) -> None:
        if bool((torch.as_tensor(sigma).min() == 0) & (smallest_variance == 0).to("cpu")):
            raise InputError(
                f"This {type(self).__name__} has directions without variance, so no density at sigma = 0; "
                "give sigma > 0."
            )

    def _noise(self, n: int, seed: int) -> Noise:
        """Noise of the prior's own draws: draw i is the same for any n."""
        buffer = self.get_buffer(self._defining[0])
        return Noise([stream_key(seed, "sample", self.name)], n, device=buffer.device, dtype=buffer.dtype)

    @abstractmethod
    def denoise(self, z: Float[Tensor, " n *event"], sigma: Sigma) -> Float[Tensor, " n *event"]:
        """E[z_0 | z_sigma = z], exact for every sigma >= 0; latent units."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, " n *event"], sigma: Sigma = 0.0) -> Float[Tensor, " n"]:
        """Log-density of z_sigma, nats; sigma = 0 is the prior itself.

        Raises
        ------
        InputError
            If sigma is 0 and the prior has no density.
        """

    @abstractmethod
    def sample(self, n: int, *, seed: int = 0) -> Float[Tensor, " n *event"]:
        """Independent exact draws, latent units, float64; draw i depends on the seed and i alone."""

    @abstractmethod
    def posterior(self, operator: Operator, y: Tensor, noise_std: float | Tensor) -> "ExactPosterior":
        r"""Exact posterior of ``y = A(decode(z)) + noise_std * eps``, in latent units.

        Parameters
        ----------
        operator
            Linear (or affine) operator A on physical units.
        y
            Measurement of shape (\*out_shape) or (1, \*out_shape).
        noise_std
            Noise standard deviation in the units of y; a positive scalar, or a tensor that broadcasts to out_shape. For
            complex data, of each of the real and the imaginary part.

        Raises
        ------
        CapabilityError
            If ``A(decode(z))`` is not affine in z.
        ShapeError, InputError
            If y, noise_std or the shapes do not fit.
        """


def eigenbasis(covariance: Float[Tensor, "*k d d"]) -> tuple[Float[Tensor, "*k d"], Float[Tensor, "*k d d"]]:
    """Eigenvalues, rising, and eigenvectors (columns) of covariances.

    Values below rounding, d * eps * largest, become zero.

    Raises
    ------
    InputError
        If a covariance is not finite, symmetric and positive semi-definite.
    """
    if not bool(torch.isfinite(covariance).all()):
        raise InputError("A covariance must be finite.")
    scale = covariance.abs().amax((-2, -1), keepdim=True)
    asymmetry = float(((covariance - covariance.mT).abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
    if asymmetry > 1e-8:
        raise InputError(
            f"A covariance must be symmetric; entries differ from their mirror image by {asymmetry:.1e} of the largest."
        )
    values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
    largest = values[..., -1:]
    if bool((values < -1e-8 * largest.abs()).any()):
        raise InputError(
            f"A covariance must be positive semi-definite; the smallest eigenvalue is {float(values.min()):.3e}."
        )
    rounding = covariance.shape[-1] * torch.finfo(values.dtype).eps * largest
    return torch.where(values > rounding, values, torch.zeros_like(values)), vectors


def gain(variance: Tensor, sigma_squared: Tensor) -> Tensor:
    """Wiener gain ``variance / (variance + sigma^2)``; zero where both are zero."""
    total = variance + sigma_squared
    return variance / total.clamp_min(torch.finfo(total.dtype).tiny)


class ExactCurvature(Curvature):
    """Error covariance of a Gaussian's denoiser, diagonal where the prior's covariance is; subclasses give the basis.

    Parameters
    ----------
    prior_variance
        Eigenvalues of the prior's covariance, broadcasting against the coefficients of one event, float64.
    """

    def __init__(self, prior_variance: Tensor) -> None:
        self.prior_variance = prior_variance

    def variance(self, sigma: float) -> Tensor:
        """Error variance of each coefficient."""
        s2 = self.prior_variance.new_tensor(float(sigma) ** 2)
        return gain(self.prior_variance, s2) * s2

    def precision(self, sigma: float, floor: float = 0.0) -> Tensor:
        """1 / (variance + sigma^2), without cancellation; clamped below at ``floor / sigma^2``."""
        return torch.clamp(1.0 / (self.prior_variance + float(sigma) ** 2), min=floor / float(sigma) ** 2)
