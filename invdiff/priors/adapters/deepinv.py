"""Priors to and from deepinv's `Denoiser`, which maps noisy pictures in [0, 1] and their noise std to clean ones."""

from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import CapabilityError, ShapeError
from invdiff.operators.composition import Affine, Scale
from invdiff.priors.adapters.adapted import AdaptedPrior
from invdiff.priors.adapters.parametrisations import Denoised
from invdiff.priors.base import DiffusionPrior


def from_deepinv(
    denoiser: nn.Module, shape: tuple[int, ...], *, sigma_min: float, sigma_max: float, name: str | None = None
) -> DiffusionPrior:
    """Prior whose denoiser is a deepinv denoiser; its latent units are pictures in [0, 1].

    Parameters
    ----------
    denoiser
        A `deepinv.models.Denoiser`; called as ``denoiser(x, sigma)`` with sigma of shape (n,). Put into evaluation
        mode. Samplers take it for the posterior mean E[x_0 | x_sigma]: one trained on squared error is that, total
        variation is not. One that clamps its output and rounds sigma (DiffUNet) has no useful gradient: take
        `load_guided_diffusion`.
    shape
        Shape (c, h, w) of one picture.
    sigma_min, sigma_max
        Noise levels it was trained for, in units of [0, 1]. Annealed samplers start at sigma_max, where nothing of the
        picture must be left: a denoiser trained up to 0.2 alone is too little for them.
    name
        For provenance; the denoiser's class if None.

    Returns
    -------
        An `AdaptedPrior`; or, for a denoiser that `to_deepinv` made of a prior with this shape and these noise levels,
        that prior itself.

    Raises
    ------
    CapabilityError
        If the argument is not a deepinv denoiser.
    """
    import deepinv

    if not isinstance(denoiser, deepinv.models.Denoiser):
        raise CapabilityError(f"from_deepinv takes a deepinv.models.Denoiser, got {type(denoiser).__name__}.")
    inner = getattr(denoiser, "prior", None)
    if isinstance(inner, DiffusionPrior) and inner.shape == tuple(shape):
        scale = abs(_affine(inner)[0])
        levels = (inner.sigma_min * scale, sigma_min), (inner.sigma_max * scale, sigma_max)
        if all(abs(own - given) <= 1e-6 * own for own, given in levels):
            return inner
    return AdaptedPrior(
        denoiser,
        shape,
        Denoised(),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        scale=1.0,
        offset=0.0,
        name=name or type(denoiser).__name__,
    )


def to_deepinv(prior: DiffusionPrior) -> Any:
    """Make a deepinv denoiser that computes with a prior.

    ``forward(x, sigma)`` takes pictures in [0, 1] and their noise std in the same units; a float, or a tensor of one
    value, of shape (n,) or of (n, 1, 1, 1). Noise levels outside the prior's range are clamped to it: deepinv's
    samplers go below sigma_min at their last steps, where D hardly moves the picture. Where sigma is exactly 0 the
    picture is returned as it is. Nothing is clipped, and gradients flow to x.

    Parameters
    ----------
    prior
        A diffusion prior whose decoder is affine with one scale, or missing. Pictures in [0, 1] are its physical
        units.

    Returns
    -------
    deepinv.models.Denoiser
        Holds the prior as ``denoiser.prior``; or, for a prior that `from_deepinv` made, the denoiser it was made of,
        which keeps its own behaviour outside the noise levels.

    Raises
    ------
    CapabilityError
        If the decoder is not affine with one scale: white noise on pictures would not be white on latents.
    """
    import deepinv

    if isinstance(prior, AdaptedPrior) and isinstance(prior.network, deepinv.models.Denoiser):
        plain = isinstance(prior.parametrisation, Denoised)
        if plain and (prior.decoder.scale, prior.decoder.offset) == (1.0, 0.0):
            return prior.network
    scale, offset = _affine(prior)

    class PriorDenoiser(deepinv.models.Denoiser):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.prior = prior

        def forward(self, x: Tensor, sigma: Any, *_: Any, **__: Any) -> Tensor:
            level = _levels(sigma, x) / abs(scale)
            z = (x - offset) / scale
            D = self.prior.denoise(z, level.clamp(self.prior.sigma_min, self.prior.sigma_max))
            clean = (level == 0).reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(clean, x, scale * D + offset)

    return PriorDenoiser()


def _levels(sigma: Any, x: Tensor) -> Tensor:
    """Sigma as a tensor (n,) of the dtype of x; deepinv's samplers give numpy's numbers too."""
    if not isinstance(sigma, Tensor):
        return torch.full((len(x),), float(sigma), dtype=x.dtype, device=x.device)
    flat = sigma.to(x).reshape(-1)
    if len(flat) not in (1, len(x)):
        raise ShapeError(f"sigma must be a float or hold one value a picture, ({len(x)},), got {tuple(sigma.shape)}.")
    return flat.expand(len(x))


def _affine(prior: DiffusionPrior) -> tuple[float, float]:
    """Scale and offset of a prior's decoder."""
    decoder = getattr(prior, "decoder", None)
    if decoder is None:
        return 1.0, 0.0
    if isinstance(decoder, Affine):
        return decoder.scale, decoder.offset
    if isinstance(decoder, Scale):
        return decoder.factor, 0.0
    raise CapabilityError(
        f"deepinv's denoisers see white noise on pictures; through the decoder {type(decoder).__name__} it is not "
        "white in latent units. Only a prior with an affine decoder of one scale can be handed to deepinv."
    )
