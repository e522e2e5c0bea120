"""ConditionalPrior: a network prior that is told what is known by further input channels.

The network takes, after the noisy latents, the channels of every condition and one channel more for each, which is 1
where the condition is given and 0 where it is not, so that one network is trained for every subset of conditions (its
channels then zero). A network of fields that have walls or a beginning may be told where it is by a channel for each
axis of the grid. Its output's first channels are the denoiser's, in the preconditioning of EDM
(`invdiff.priors.diffusion`); conditions are not scaled with the noise level, as in WDNO (Hu et al. 2025,
ICLR), where known channels enter every call without noise.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from invdiff.errors import CatalogueError, InputError, ShapeError
from invdiff.event import Event, plain_event
from invdiff.operators.composition import Affine
from invdiff.priors.base import Sigma
from invdiff.priors.diffusion import NetworkPrior


class _Appended(nn.Module):
    """A network with fixed channels appended to its input, and its output cut to the latents' channels."""

    extra: Tensor

    def __init__(self, network: nn.Module, channels: int, extra: Tensor) -> None:
        super().__init__()
        self.network, self.channels = network, channels
        self.stride = int(getattr(network, "stride", 1))
        self.register_buffer("extra", extra, persistent=False)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Evaluate the network beside the known channels, each row beside its own where there are rows of them."""
        extra = self.extra.to(x)
        if extra.ndim == x.ndim and len(extra) != len(x):
            raise ShapeError(f"What is known stands for {len(extra)} latents, a row each; got {len(x)} of them.")
        extra = extra.expand(len(x), *extra.shape[-3:])
        out: Tensor = self.network(torch.cat((x, extra), 1), c_noise)
        return out[:, : self.channels]


def positions_of(grid: Sequence[int]) -> Tensor:
    r"""Positions of the cells of a grid along each axis, from -1 at its first to 1 at its last edge: (axes, \*grid)."""
    axes = [(2.0 * torch.arange(n) + 1.0) / n - 1.0 for n in grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


@final
class ConditionalPrior(nn.Module):
    r"""A diffusion prior of latents (c, h, w), its denoiser a network with channels for what is known.

    Parameters
    ----------
    network
        Maps ((n, c + k, h, w), c_noise (n,)) to (n, at least c, h, w), where k counts the conditions' channels and one
        more for each condition, in the conditions' order, then the positions'.
    shape
        Shape (c, h, w) of the latents.
    conditions
        Channels of each condition, by name.
    positions
        Whether the network takes, after the conditions, the positions along each axis, from -1 to 1.
    sigma_data, sigma_min, sigma_max
        Of the latents and of the training, as for `NetworkPrior`.
    given
        What is known: channels (channels, h, w) by name, latent units; the others are not given. With one axis more,
        (n, channels, h, w), each of n latents has its own. Gradients pass through them.
    name, key
        Name, and a hash of the weights, for provenance.

    Raises
    ------
    ShapeError
        If the shape does not suit the network, or a condition its channels.
    CatalogueError
        If something given is no condition.
    InputError
        If a condition has no channel.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        conditions: Mapping[str, int],
        *,
        positions: bool = False,
        sigma_data: float | Tensor = 0.5,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        given: Mapping[str, Tensor] | None = None,
        name: str = "conditional network",
        key: str = "",
    ) -> None:
        super().__init__()
        given, grid = dict(given or {}), tuple(shape[1:])
        if any(n < 1 for n in conditions.values()):
            raise InputError(f"A condition has one channel at least, got {dict(conditions)}.")
        for unknown in set(given) - set(conditions):
            raise CatalogueError.unknown("condition of the network", unknown, conditions)
        channels, rows = [], {len(k) for k in given.values() if k.ndim == 4}
        if len(rows) > 1:
            raise ShapeError(
                f"What is known has a row for each latent, as many for every condition; got {sorted(rows)}."
            )
        for condition, count in conditions.items():
            known = given.get(condition)
            if known is not None and (tuple(known.shape[-3:]) != (count, *grid) or known.ndim > 4):
                raise ShapeError(
                    f"The condition {condition!r} has channels {(count, *grid)}, got {tuple(known.shape)}."
                )
            values = torch.zeros(count, *grid) if known is None else known
            channels += [values, torch.full((1, *grid), 0.0 if known is None else 1.0, device=values.device)]
        if positions:
            channels.append(positions_of(grid))
        device = next(iter(network.parameters())).device
        lead = tuple(rows)
        parts = [c.float().to(device).expand(*lead, *c.shape[-3:]) for c in channels]
        extra = torch.cat(parts, -3) if parts else torch.zeros(0, *grid)
        self._conditions, self._given, self._positions = dict(conditions), given, positions
        self._prior = NetworkPrior(
            _Appended(network, shape[0], extra),
            shape,
            sigma_data=sigma_data,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            scale=1.0,
            offset=0.0,
            name=name,
            key=key,
        )
        self.network = network
        self.shape, self.sigma_min, self.sigma_max, self.name = tuple(shape), sigma_min, sigma_max, name
        self.decoder: Affine = self._prior.decoder

    @property
    def event(self) -> Event:
        """The latents themselves, without a unit."""
        return plain_event(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return self._prior.dtype

    @property
    def key(self) -> str:
        """Hash of the weights' key and of what is given."""
        digest = hashlib.sha256(self._prior.key.encode())
        for name, value in sorted(self._given.items()):
            digest.update(name.encode() + value.detach().double().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def condition(self, given: Mapping[str, Tensor]) -> "ConditionalPrior":
        """Give the same prior, its weights shared, with these conditions known beside those that were.

        Parameters
        ----------
        given
            Channels (channels, h, w) by name of the condition, latent units, or (n, channels, h, w), a row for each of
            n latents, which are then denoised together.

        Raises
        ------
        CatalogueError, ShapeError
            If there is no such condition, or it has other channels.
        """
        inner = self._prior
        return ConditionalPrior(
            self.network,
            self.shape,
            self._conditions,
            positions=self._positions,
            sigma_data=inner.sigma_data,
            sigma_min=inner.sigma_min,
            sigma_max=inner.sigma_max,
            given={**self._given, **given},
            name=inner.name,
            key=inner.key,
        )

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """E[z_0 | z_sigma = z, what is given], latent units; see `NetworkPrior.denoise`."""
        return self._prior.denoise(z, sigma)

    def decode(self, z: Tensor) -> Tensor:
        """Return the latents as they are."""
        return z

    def encode(self, x: Tensor) -> Tensor:
        """Return the latents as they are."""
        return x

    def sample(self, n: int, *, seed: int = 0, steps: int = 32, batch: int = 64) -> Tensor:
        """Draws under what is given, latent units; see `NetworkPrior.sample`."""
        return self._prior.sample(n, seed=seed, steps=steps, batch=batch)
