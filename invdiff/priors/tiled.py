r"""A prior of fixed size on larger events: its denoiser on overlapping tiles, blended.

    D(z, sigma) = sum over tiles t of w_t D_tile(z on t, sigma),    sum over t of w_t = 1 everywhere,

with weights that fall smoothly to zero at a tile's inner edges (the sin^2 ramps of a Hann window over the overlap), as
in MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113), which blends with other weights. It is the denoiser of no
prior: a tile does not know what lies outside it. The error is that of the missing context: none where values are
independent, small where they are correlated over less than the overlap, and growing with sigma, when the network
would look further.

Cost: one evaluation for each tile; ``((side - overlap) / (tile - overlap))^2`` tiles of a picture, rounded up.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import Event, plain_event
from invdiff.integrators.base import karras_levels
from invdiff.integrators.heun import Heun
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import fingerprint
from invdiff.operators.composition import Affine
from invdiff.priors.base import Curvature, DiffusionPrior, Sigma


class TiledPrior(nn.Module):
    r"""A diffusion prior of events of any size that is at least a tile's, made of one for tiles.

    For networks that take no other size than that of their training. Where a prior has ``at(shape)``, as photos-64 has,
    that is the first choice: one network sees the whole picture, at less than half of the cost for the default overlap.
    Tiles know nothing of each other, so that nothing larger than a tile is consistent, and at high noise, where a
    network leans on the widest context, neighbours disagree by more than anywhere else: photos-64 as tiles of 64 x 64
    on a crop of 128 x 128 of a photograph (skimage's astronaut, halved; 9 tiles, overlap 32) has a `seam` of 0.019,
    0.014 and 0.007 at sigma 0.1, 1 and 10, which is 5 %, 10 % and 19 % of the denoiser's root-mean-square error there
    (0.038, 0.144 and 0.37, latent units). That error itself is 1 %, 2 % and 5 % smaller than of ``at((3, 128, 128))``,
    since the network was trained at 64 x 64: a seam speaks of consistency, not of accuracy.

    A posterior counts one evaluation, and a micro-batch one particle, where this prior evaluates `tiles` of them.

    Parameters
    ----------
    prior
        Prior of one tile, of shape (c, \*tile); its decoder the identity or `Affine`.
    shape
        Shape (c, \*grid) of the large events; no side less than the tile's.
    overlap
        Least overlap of neighbouring tiles along each axis, grid cells, at least 0 and less than any side of a tile; a
        quarter of a tile's smallest side if None. Tiles are spread evenly, so the overlap can be larger.

    Attributes
    ----------
    curvature
        That of the tile's prior for the large shape, where it has ``at(shape)``; else None.

    Raises
    ------
    ShapeError
        If the shape is smaller than a tile, or has other axes or channels.
    InputError
        If the overlap is out of range.
    CapabilityError
        If the prior's decoder does more than scale and shift, so that there is none for the large events.
    """

    def __init__(self, prior: DiffusionPrior, shape: tuple[int, ...], *, overlap: int | None = None) -> None:
        super().__init__()
        self.tile, self.shape = tuple(prior.shape), tuple(shape)
        sides = self.tile[1:]
        if (
            len(self.shape) != len(self.tile)
            or not sides
            or self.shape[0] != self.tile[0]
            or any(large < small for large, small in zip(self.shape[1:], sides, strict=True))
        ):
            raise ShapeError(
                f"Tiles of shape {self.tile} cannot make events of shape {self.shape}: as many axes and channels are "
                "needed, and no side less than a tile's."
            )
        self.overlap = min(sides) // 4 if overlap is None else overlap
        if not 0 <= self.overlap < min(sides):
            raise InputError(f"The overlap of tiles of {sides} lies between 0 and {min(sides) - 1}, got {overlap}.")
        given = getattr(prior, "decoder", None)
        if not (given is None or isinstance(given, Affine)) or (given is None and hasattr(prior, "decode")):
            raise CapabilityError(
                "Tiles need a decoder that scales and shifts every value alike (operators.composition.Affine); that of "
                f"{type(prior).__name__} is {type(given).__name__ if given is not None else 'its own decode'}."
            )
        self.prior = prior
        self.decoder = Affine(self.shape, *((1.0, 0.0) if given is None else (given.scale, given.offset)))
        self.starts = tuple(
            _starts(large, small, self.overlap) for large, small in zip(self.shape[1:], sides, strict=True)
        )
        ramps = [
            _weights(starts, small, large)
            for starts, small, large in zip(self.starts, sides, self.shape[1:], strict=True)
        ]
        weights = []
        for corner in product(*(range(len(starts)) for starts in self.starts)):
            w = torch.ones((), dtype=torch.float64)
            for ramp, i in zip(ramps, corner, strict=True):
                w = w[..., None] * ramp[i]
            weights.append(w)
        self.weights: Tensor
        self.register_buffer("weights", torch.stack(weights), persistent=False)

    @property
    def tiles(self) -> int:
        """Number of tiles: evaluations of the tile's prior for one of this prior's."""
        return prod(len(starts) for starts in self.starts)

    @property
    def sigma_min(self) -> float:
        """The tile's, latent units."""
        return self.prior.sigma_min

    @property
    def sigma_max(self) -> float:
        """The tile's, latent units."""
        return self.prior.sigma_max

    @property
    def differentiable(self) -> bool:
        """Whether the denoiser has gradients: as the tile's."""
        return bool(getattr(self.prior, "differentiable", True))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tile's denoiser; float32 where it does not say."""
        return getattr(self.prior, "dtype", torch.float32)

    @property
    def event(self) -> Event:
        """The large event; a picture with values in [0, 1] if it has three axes."""
        return plain_event(self.shape)

    @property
    def name(self) -> str:
        """Name for provenance."""
        return f"{getattr(self.prior, 'name', type(self.prior).__name__)}, tiled"

    @property
    def key(self) -> str:
        """Hash of what defines it, for provenance."""
        own = getattr(self.prior, "key", None)
        if own is None:
            own = fingerprint(self.prior) if isinstance(self.prior, nn.Module) else type(self.prior).__qualname__
        return f"{stream_key(0, str(own), *self.shape, self.overlap):016x}"

    @property
    def curvature(self) -> Curvature | None:
        """See the class."""
        at = getattr(getattr(self.prior, "curvature", None), "at", None)
        if at is None:
            return None
        if self._curvature is None:
            self._curvature = at(self.shape)
        return self._curvature

    _curvature: Curvature | None = None

    def at(self, shape: tuple[int, ...]) -> "TiledPrior":
        """Give the same prior for events of another size."""
        return TiledPrior(self.prior, shape, overlap=self.overlap)

    def decode(self, z: Tensor) -> Tensor:
        """Physical units from latent units."""
        x: Tensor = self.decoder(z)
        return x

    def encode(self, x: Tensor) -> Tensor:
        """Latent units from physical units."""
        return self.decoder.inverse(x)

    def denoise(self, z: Tensor, sigma: Sigma) -> Tensor:
        """Blended E[z_0 | z_sigma = z], in the dtype of z.

        Parameters
        ----------
        z
            Noisy latents (n, *shape).
        sigma
            Noise level, latent units; a float or one a particle, shape (n,).

        Raises
        ------
        ShapeError
            If z does not have the prior's shape.
        """
        return self._blend(self._denoised(z, sigma))

    @torch.no_grad()
    def seam(self, z: Tensor, sigma: Sigma) -> Tensor:
        r"""Measure how much overlapping tiles disagree, as a share of the noise that they take away.

        Where two tiles or more see a value, d_t is what tile t makes of it. The figure is the root mean square, over
        these values, of the tiles' spread about the blended value, ``sum over t of w_t (d_t - D)^2``, over that of the
        noise taken away there, ``z - D``; dimensionless. 0 is no seam at all, which says that the tiles agree, not that
        they are right. Times sigma it is the seam in latent units, since the noise taken away is close to sigma
        wherever sigma exceeds the error of the denoiser.

        Parameters
        ----------
        z
            Noisy latents (n, \*shape), as of a picture plus sigma times normal noise.
        sigma
            Noise level, latent units.

        Returns
        -------
            One figure for each of the n, shape (n,); NaN where no tiles overlap.
        """
        denoised = self._denoised(z, sigma)
        blended = self._blend(denoised)
        shared = self._add(torch.ones_like(denoised)) > 1.5
        spread = self._blend((denoised - self._cut(blended)) ** 2) * shared
        noise = (z - blended) ** 2 * shared
        return (spread.flatten(1).sum(1) / noise.flatten(1).sum(1)).sqrt()

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0, steps: int = 32, batch: int = 16) -> Tensor:
        """Unconditional draws, latent units, (n, *shape), by Heun's method on Karras' levels; as `NetworkPrior.sample`.

        Parameters
        ----------
        n
            How many.
        seed
            Draw i is the same for any n and batch, up to rounding.
        steps
            Noise levels; costs ``2 * steps - 1`` denoisings, each of all tiles.
        batch
            Draws worked on at a time.
        """
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=self.weights.device, dtype=torch.float32)
        levels, heun, draws = karras_levels(steps, self.sigma_min, self.sigma_max), Heun(), []
        for slots in torch.split(noise.slots, batch):
            z = levels[0] * noise.at(0).normal(slots, self.shape)
            for step, (sigma, sigma_next) in enumerate(pairwise(levels), start=1):
                noise.at(step)

                def normal(state: Tensor, slots: Tensor = slots) -> Tensor:
                    return noise.normal(slots, tuple(state.shape[1:]))

                z, _ = heun.step(self.denoise, z, sigma, sigma_next, memory=None, normal=normal)
            draws.append(z)
        return torch.cat(draws)

    # Within.

    def _windows(self) -> Iterator[tuple[Any, ...]]:
        """Index of every tile in (n, *shape)."""
        for corner in product(*self.starts):
            yield (..., *(slice(i, i + side) for i, side in zip(corner, self.tile[1:], strict=True)))

    def _cut(self, z: Tensor) -> Tensor:
        """(n, *shape) -> (tiles, n, *tile)."""
        return torch.stack([z[window] for window in self._windows()])

    def _denoised(self, z: Tensor, sigma: Sigma) -> Tensor:
        """Every tile, denoised in one batch: (tiles, n, *tile)."""
        if tuple(z.shape[1:]) != self.shape:
            raise ShapeError(
                f"This prior is for shape (n, {', '.join(map(str, self.shape))}), got {tuple(z.shape)}; see at()."
            )
        cut = self._cut(z)
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = sigma.repeat(self.tiles)
        return self.prior.denoise(cut.flatten(0, 1), sigma).reshape(cut.shape)

    def _blend(self, tiles: Tensor) -> Tensor:
        """(tiles, n, *tile) -> (n, *shape), by the weights."""
        return self._add(self.weights.to(tiles)[:, None, None] * tiles)

    def _add(self, tiles: Tensor) -> Tensor:
        """(tiles, n, *tile) -> (n, *shape), overlaps added."""
        total = tiles.new_zeros(tiles.shape[1], *self.shape)
        for window, tile in zip(self._windows(), tiles, strict=True):
            total[window] += tile
        return total


def _starts(large: int, small: int, overlap: int) -> tuple[int, ...]:
    """First cells of evenly spread tiles along an axis, neighbours overlapping by at least ``overlap``."""
    gaps = ceil((large - small) / (small - overlap))
    return tuple((i * (large - small)) // gaps for i in range(gaps + 1)) if gaps else (0,)


def _weights(starts: tuple[int, ...], small: int, large: int) -> Tensor:
    """Weights (tiles, small) along an axis; their sum over tiles is 1 in every cell but for rounding."""
    t = torch.arange(small, dtype=torch.float64)
    raw = torch.ones(len(starts), small, dtype=torch.float64)
    for i, (left, right) in enumerate(pairwise(starts)):
        shared = left + small - right
        if shared > 0:
            quarter = 0.5 * torch.pi / shared
            raw[i + 1] *= torch.where(t < shared, (quarter * (t + 0.5)).sin() ** 2, 1.0)
            raw[i] *= torch.where(t >= small - shared, (quarter * (small - t - 0.5)).sin() ** 2, 1.0)
    # Two neighbours sum to 1 by sin^2 + cos^2; where overlaps are wide enough for three, this makes them.
    total = torch.zeros(large, dtype=torch.float64)
    for row, start in zip(raw, starts, strict=True):
        total[start : start + small] += row
    return torch.stack([row / total[start : start + small] for row, start in zip(raw, starts, strict=True)])
