"""Posterior samplers, one a file."""

from invdiff.driver import Sampler
from invdiff.samplers.annealing import Levels
from invdiff.samplers.daps import DAPS
from invdiff.samplers.dps import DPS
from invdiff.samplers.importance import ImportanceSampling
from invdiff.samplers.inner import ExactInner, Langevin
from invdiff.samplers.pigdm import Isotropic, Jacobian, PiGDM, Spectral

__all__ = [
    "DAPS",
    "DPS",
    "ExactInner",
    "ImportanceSampling",
    "Isotropic",
    "Jacobian",
    "Langevin",
    "Levels",
    "PiGDM",
    "Sampler",
    "Spectral",
]
