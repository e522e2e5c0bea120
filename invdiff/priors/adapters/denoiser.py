"""The denoiser of a network in any parametrisation."""

from typing import Any

import torch
from torch import Tensor, nn

from invdiff.errors import ShapeError
from invdiff.priors.adapters.parametrisations import Parametrisation


def prediction(output: Any) -> Any:
    """Tensor that a network predicts: its output, the output's ``sample``, or the first of several."""
    found = getattr(output, "sample", output)
    return found[0] if isinstance(found, (tuple, list)) else found


def denoiser(network: nn.Module, parametrisation: Parametrisation, z: Tensor, sigma: Tensor) -> Tensor:
    """D(z, sigma) of a network, in the dtype of z; the network computes in its own.

    Parameters
    ----------
    network
        Called with (input (n, c, ...), time (n,)). Returns a tensor, a tuple that begins with one, or an object with
        the tensor as ``sample``; of c channels, or of 2 c, the first c of which count (the others are learned
        variances).
    parametrisation
        What it predicts.
    z
        Noisy latents (n, c, ...).
    sigma
        Noise levels (n,), latent units, positive.

    Raises
    ------
    ShapeError
        If the network's output does not have the shape of z, the learned variances apart.
    """
    own = next((p.dtype for p in network.parameters() if p.is_floating_point()), z.dtype)
    column = (-1, *[1] * (z.ndim - 1))
    c = parametrisation.coefficients(sigma)
    time = c.time
    if time.is_floating_point():
        time = time.to(torch.promote_types(own, torch.float32) if parametrisation.counts_steps else own)
    out = prediction(network((c.c_in.reshape(column) * z).to(own), time))
    channels = z.shape[1]
    if (
        not isinstance(out, Tensor)
        or out.ndim != z.ndim
        or out.shape[1] not in (channels, 2 * channels)
        or (len(out), *out.shape[2:]) != (len(z), *z.shape[2:])
    ):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(
            f"For z of shape {tuple(z.shape)} the network must return that shape, or twice the channels with learned "
            f"variances; {type(network).__name__} returned {given}."
        )
    return c.c_skip.reshape(column) * z + c.c_out.reshape(column) * out[:, :channels].to(z.dtype)
