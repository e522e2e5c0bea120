"""A prior made of somebody else's network, in whatever parametrisation it was trained."""

import hashlib
from itertools import pairwise
from typing import Self, final

import torch
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.event import Event, plain_event
from invdiff.integrators.base import karras_levels
from invdiff.integrators.heun import Heun
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import fingerprint
from invdiff.operators.composition import Affine
from invdiff.priors.adapters.denoiser import denoiser
from invdiff.priors.adapters.parametrisations import Parametrisation
from invdiff.priors.base import Sigma


@final
class AdaptedPrior(nn.Module):
    """A diffusion prior whose denoiser follows from a network and what it predicts.

    Parameters
    ----------
    network
        Called with ((n, *shape), time (n,)); see `denoiser.denoiser`. Put into evaluation mode (dropout off);
        whether its weights take gradients is left as it is, see `eval_only`. If it has a ``stride``, the sides of a
        picture must divide by it.
    shape
        Shape (c, ...) of one event.
    parametrisation
        What the network predicts.
    sigma_min, sigma_max
        Noise levels, latent units; those of the parametrisation if None.
    scale, offset
        Physical units are ``scale * z + offset``; the default takes a network trained on [-1, 1] to [0, 1].
    name
        For provenance and messages.

    Raises
    ------
    ShapeError
        If the sides do not divide by the network's stride.
    InputError
        If the noise levels are missing or out of order, or the scale is zero.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        parametrisation: Parametrisation,
        *,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        scale: float = 0.5,
        offset: float = 0.5,
        name: str = "adapted",
    ) -> None:
        super().__init__()
        stride = getattr(network, "stride", 1)
        stride = stride if isinstance(stride, int) else 1  # a bare convolution's is a pair, and means something else
        if len(shape) < 2 or any(side % stride or side < stride for side in shape[1:]):
            raise ShapeError(
                f"The network of the prior {name!r} takes events (channels, *sides) with sides divisible by {stride}, "
                f"got {tuple(shape)}; pad or crop to such a size."
            )
        known = parametrisation.levels
        if known is None and (sigma_min is None or sigma_max is None):
            raise InputError(f"A {type(parametrisation).__name__} network does not say its sigma_min and sigma_max.")
        low, high = known or (0.0, 0.0)
        self.sigma_min = low if sigma_min is None else float(sigma_min)
        self.sigma_max = high if sigma_max is None else float(sigma_max)
        if not 0.0 < self.sigma_min < self.sigma_max < float("inf"):
            raise InputError(
                f"Noise levels must satisfy 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}."
            )
        self.network, self.parametrisation, self.name = network.eval(), parametrisation, name
        self.shape = tuple(shape)
        self.decoder = Affine(self.shape, scale, offset)
        self._key: str | None = None

    @property
    def event(self) -> Event:
        """The unknown in physical units."""
        return plain_event(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights; float32 if it has none."""
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    @property
    def key(self) -> str:
        """Hash of what defines the prior: weights, parametrisation, noise levels, decoder; made when asked for."""
        if self._key is None:
            settings = f"{self.shape}{self.parametrisation!r}{self.sigma_min:.6g},{self.sigma_max:.6g}"
            text = settings + fingerprint(self.decoder) + fingerprint(self.network)
            self._key = hashlib.sha256(text.encode()).hexdigest()
        return self._key

    def decode(self, z: Tensor) -> Tensor:
        """Physical units from latents; not clipped."""
        x: Tensor = self.decoder(z)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Latents from physical units."""
        return self.decoder.inverse(x)

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z], in the dtype of z; differentiable in z.

        Parameters
        ----------
        z
            Noisy latents (n, *shape).
        sigma
            Noise level, latent units, positive; a float or one a particle, shape (n,).

        Raises
        ------
        ShapeError
            If z does not have the prior's shape, sigma not one value a particle, or the network answers in another
            shape.
        """
        if tuple(z.shape[1:]) != self.shape:
            raise ShapeError(
                f"The prior {self.name!r} is for shape (n, {', '.join(map(str, self.shape))}), got {tuple(z.shape)}; "
                "see at()."
            )
        if isinstance(sigma, Tensor):
            if sigma.ndim and sigma.shape != z.shape[:1]:
                raise ShapeError(f"sigma must be a float or have shape ({len(z)},), got {tuple(sigma.shape)}.")
            s = sigma.to(z).expand(len(z))
        else:
            s = torch.full((len(z),), float(sigma), dtype=z.dtype, device=z.device)
        return denoiser(self.network, self.parametrisation, z, s)

    def at(self, shape: tuple[int, ...]) -> "AdaptedPrior":
        """Give the same prior for events of another size, its weights shared.

        Whether the network is any good at a size that it was not trained at is for the user to know.
        """
        if len(shape) != len(self.shape) or shape[0] != self.shape[0]:
            raise ShapeError(
                f"The prior {self.name!r} has shape {self.shape} and {self.shape[0]} channels, got {shape}."
            )
        return AdaptedPrior(
            self.network,
            shape,
            self.parametrisation,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            scale=self.decoder.scale,
            offset=self.decoder.offset,
            name=self.name,
        )

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, steps: int = 32, batch: int = 64) -> Tensor:
        """Unconditional draws, latent units, float32, shape (n, *shape), by Heun's method on Karras' levels.

        Parameters
        ----------
        n
            How many.
        seed
            Draw i is the same for any n and batch, up to rounding.
        steps
            Noise levels; costs ``2 * steps - 1`` network evaluations a draw.
        batch
            Draws worked on at a time.
        """
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=device, dtype=torch.float32)
        levels, heun = karras_levels(steps, self.sigma_min, self.sigma_max), Heun()
        draws = []
        for slots in torch.split(noise.slots, batch):
            z = levels[0] * noise.at(0).normal(slots, self.shape)
            for sigma, sigma_next in pairwise(levels):
                z, _ = heun.step(self.denoise, z, sigma, sigma_next)
            draws.append(z)
        return torch.cat(draws)

    def eval_only(self) -> Self:
        """Freeze the weights: no gradients are kept for them. Returns self."""
        return self.eval().requires_grad_(requires_grad=False)
