r"""A diffusion prior made of a network, in the preconditioning of EDM.

    D(z, sigma) = c_skip z + c_out F(c_in z, ln(sigma) / 4),
    c_skip = s^2 / (sigma^2 + s^2),  c_out = sigma s / sqrt(sigma^2 + s^2),  c_in = 1 / sqrt(sigma^2 + s^2),

with s the standard deviation of the data (Karras et al. 2022, arXiv:2206.00364, table 1 and section 5).
"""

from itertools import pairwise
from typing import Self

import torch
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.event import Event, image_event
from invdiff.integrators.base import karras_levels
from invdiff.integrators.heun import Heun
from invdiff.noise import Noise, stream_key
from invdiff.operators.composition import Affine
from invdiff.priors.base import Sigma
from invdiff.priors.frequency_table import FrequencyTable


def precondition(network: nn.Module, z: Tensor, sigma: Tensor, sigma_data: float | Tensor) -> Tensor:
    """Make the denoiser of a network, for noise levels (n,); in the dtype of z, the network in its own.

    The data's standard deviation is one number, or one a channel, (c, 1, 1).
    """
    s = sigma.reshape(-1, *[1] * (z.ndim - 1))
    norm = (s**2 + sigma_data**2).sqrt()
    own = next(network.parameters()).dtype
    f: Tensor = network((z / norm).to(own), (sigma.log() / 4).to(own))
    return (sigma_data / norm) ** 2 * z + (s * sigma_data / norm) * f.to(z.dtype)


class NetworkPrior(nn.Module):
    """A diffusion prior of pictures, its denoiser a network.

    Parameters
    ----------
    network
        Maps ((n, c, h, w), c_noise (n,)) to (n, c, h, w); sides divisible by its ``stride``.
    shape
        Shape (c, h, w) of one picture.
    sigma_data
        Standard deviation of the data, latent units; one number, or one a channel, (c,).
    sigma_min, sigma_max
        Range of noise levels the network was trained for, latent units.
    scale, offset
        Pictures in [0, 1] are ``scale * z + offset``.
    curvature
        Measured error of the denoiser, or None.
    name, key
        Name, and a hash of what defines it, for provenance.

    Raises
    ------
    ShapeError
        If the sides do not divide by the network's stride.
    """

    _sigma_data: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        *,
        sigma_data: float | Tensor = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        scale: float = 0.5,
        offset: float = 0.5,
        curvature: FrequencyTable | None = None,
        name: str = "network",
        key: str = "",
    ) -> None:
        super().__init__()
        stride = int(getattr(network, "stride", 1))
        if len(shape) != 3 or any(side % stride or side < stride for side in shape[1:]):
            raise ShapeError(
                f"The network of the prior {name!r} takes pictures (channels, height, width) with sides "
                f"divisible by {stride}, got {tuple(shape)}; pad or crop to such a size."
            )
        each = torch.as_tensor(sigma_data, dtype=torch.float32)
        if not 0 < sigma_min < sigma_max or not bool((each > 0).all()):
            raise InputError(
                f"Need 0 < sigma_min < sigma_max and sigma_data > 0, got {sigma_min}, {sigma_max}, {sigma_data}."
            )
        self.network, self.curvature, self.name, self.key = network, curvature, name, key
        self.shape, self.sigma_min, self.sigma_max = tuple(shape), sigma_min, sigma_max
        # Not a parameter's business, but it must move with the network.
        self.register_buffer("_sigma_data", each.reshape(-1, 1, 1) if each.ndim else None, persistent=False)
        self._one_sigma_data = sigma_data
        self.decoder = Affine(self.shape, scale, offset)

    @property
    def sigma_data(self) -> float | Tensor:
        """Standard deviation of the data, latent units; a number, or (c, 1, 1)."""
        return self._one_sigma_data if self._sigma_data is None else self._sigma_data

    @property
    def event(self) -> Event:
        """A picture with values in [0, 1]."""
        return image_event(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(self.network.parameters()).dtype

    def decode(self, z: Tensor) -> Tensor:
        """Pictures in [0, 1] from latents; not clipped."""
        x: Tensor = self.decoder(z)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Latents from pictures in [0, 1]."""
        return self.decoder.inverse(x)

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z], in the dtype of z.

        Parameters
        ----------
        z
            Noisy latents (n, *shape).
        sigma
            Noise level, latent units, positive; a float or one a particle, shape (n,).

        Raises
        ------
        ShapeError
            If z does not have the prior's shape, or sigma not one value a particle.
        """
        if tuple(z.shape[1:]) != self.shape:
            raise ShapeError(
                f"The prior {self.name!r} is for shape (n, {', '.join(map(str, self.shape))}), got {tuple(z.shape)}; "
                "see at()."
            )
        s = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
        if s.ndim and s.shape != z.shape[:1]:
            raise ShapeError(f"sigma must be a float or have shape ({len(z)},), got {tuple(s.shape)}.")
        return precondition(self.network, z, s.expand(len(z)), self.sigma_data)

    def at(self, shape: tuple[int, ...]) -> "NetworkPrior":
        """Give the same prior for pictures of another size, its weights shared."""
        if len(shape) == 3 and shape[0] != self.shape[0]:
            raise ShapeError(f"The prior {self.name!r} has {self.shape[0]} channels, got shape {tuple(shape)}.")
        other = NetworkPrior(
            self.network,
            shape,
            sigma_data=self.sigma_data,
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            scale=self.decoder.scale,
            offset=self.decoder.offset,
            name=self.name,
            key=self.key,
        )
        other.curvature = self.curvature and self.curvature.at(shape)
        return other

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, steps: int = 32, batch: int = 64) -> Tensor:
        """Unconditional draws, latent units, shape (n, *shape), by Heun's method on Karras' levels.

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
        parameter = next(self.network.parameters())
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=parameter.device, dtype=torch.float32)
        levels = karras_levels(steps, self.sigma_min, self.sigma_max)
        heun, draws = Heun(), []
        for slots in torch.split(noise.slots, batch):
            z = levels[0] * noise.at(0).normal(slots, self.shape)
            for step, (sigma, sigma_next) in enumerate(pairwise(levels), start=1):
                noise.at(step)

                def normal(state: Tensor, slots: Tensor = slots) -> Tensor:
                    return noise.normal(slots, tuple(state.shape[1:]))

                z, _ = heun.step(self.denoise, z, sigma, sigma_next, memory=None, normal=normal)
            draws.append(z)
        return torch.cat(draws)

    def eval_only(self) -> Self:
        """Freeze the weights: no gradients are kept for them. Returns self."""
        return self.eval().requires_grad_(requires_grad=False)
