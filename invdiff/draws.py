"""What a sampler hands over, and the resampling that makes weighted draws equal."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Draws in latent units.

    Parameters
    ----------
    z
        Draws, shape (ensemble, draw, *event); tokens are integers.
    log_weights
        Unnormalised log-weights within each ensemble, float64, or None where draws have equal weight.
    log_evidence
        Estimate of log p(y) from each ensemble, float64, or None.
    is_chain
        Whether the draws of an ensemble are states of one Markov chain, so that R-hat has a meaning.
    """

    z: Tensor
    log_weights: Float[Tensor, "ensemble draw"] | None = None
    log_evidence: Float[Tensor, " ensemble"] | None = None
    is_chain: bool = False


def systematic_resample(
    log_weights: Float[Tensor, "ensemble n"], uniform: Float[Tensor, " ensemble"], draws: int | None = None
) -> Int[Tensor, "ensemble draws"]:
    """Ancestors by systematic resampling, one uniform an ensemble (Kitagawa 1996).

    Parameters
    ----------
    log_weights
        Unnormalised log-weights.
    uniform
        One uniform in [0, 1) for each ensemble.
    draws
        Number of ancestors; as many as particles if None.

    Returns
    -------
        Sorted ancestor indices within each ensemble.

    Raises
    ------
    InputError
        If an ensemble has no finite largest log-weight.
    """
    if not bool(torch.isfinite(log_weights.max(dim=-1).values).all()):
        raise InputError(
            "The log-weights of an ensemble are NaN, infinite or all minus infinity: no particle explains y."
        )
    e, n = log_weights.shape
    draws = n if draws is None else draws
    cumulative = torch.softmax(log_weights.double(), dim=-1).cumsum(-1)
    cumulative = cumulative / cumulative[:, -1:]
    points = (torch.arange(draws, device=log_weights.device, dtype=torch.float64) + uniform[:, None]) / draws
    points = points.reshape(e, draws).clamp(max=1.0 - 2.0**-53)  # (draws - 1 + uniform) / draws may round to 1
    # The first particle whose cumulative weight exceeds the point: one of no weight is never taken.
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=n - 1)


def categorical(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """One index of each law along the last axis, by inversion of its cumulative weights.

    Parameters
    ----------
    log_weights
        Logs of weights, which need not sum to 1, shape (..., v); minus infinity is never drawn.
    uniform
        Values in [0, 1), float64, one for each law, broadcasting against (...).

    Returns
    -------
        Indices, int64, of the shape that the two broadcast to; 0 where all weights vanish or one is NaN.
    """
    cumulative = torch.softmax(log_weights.double(), dim=-1).cumsum(-1)
    total = cumulative[..., -1:]
    # Below the total also after rounding: what has no weight is never drawn.
    point = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= point).sum(-1)
