"""Priors to and from other libraries and other parametrisations; each library is imported when it is used."""

from invdiff.priors.adapters.adapted import AdaptedPrior
from invdiff.priors.adapters.checkpoints import load_edm, load_guided_diffusion
from invdiff.priors.adapters.deepinv import from_deepinv, to_deepinv
from invdiff.priors.adapters.diffusers import from_diffusers
from invdiff.priors.adapters.parametrisations import (
    EDM,
    Denoised,
    Parametrisation,
    RectifiedFlow,
    VarianceExploding,
    VariancePreserving,
)
from invdiff.priors.adapters.schedules import NoiseSchedule

__all__ = [
    "EDM",
    "AdaptedPrior",
    "Denoised",
    "NoiseSchedule",
    "Parametrisation",
    "RectifiedFlow",
    "VarianceExploding",
    "VariancePreserving",
    "from_deepinv",
    "from_diffusers",
    "load_edm",
    "load_guided_diffusion",
    "to_deepinv",
]
