"""Posterior samplers, one a file."""

from invdiff.driver import Sampler
from invdiff.samplers.afdps import AFDPS
from invdiff.samplers.amortised_smc import AmortisedSMC
from invdiff.samplers.anchored_smc import AnchoredSMC
from invdiff.samplers.annealing import Levels
from invdiff.samplers.aps import APS
from invdiff.samplers.daps import DAPS
from invdiff.samplers.ddnm import DDNM
from invdiff.samplers.ddrm import DDRM
from invdiff.samplers.diffpir import DiffPIR
from invdiff.samplers.dmcmc import DMCMC
from invdiff.samplers.dps import DPS
from invdiff.samplers.fk_steering import FKSteering
from invdiff.samplers.fps import FPS
from invdiff.samplers.g2d2 import G2D2
from invdiff.samplers.importance import ImportanceSampling
from invdiff.samplers.inner import ExactInner, Langevin
from invdiff.samplers.masked_gibbs import MaskedGibbs
from invdiff.samplers.mcgdiff import MCGDiff
from invdiff.samplers.particles import BirthDeath, Resampling, Residual, Stratified, Systematic
from invdiff.samplers.pcn import PCN
from invdiff.samplers.pigdm import Isotropic, Jacobian, PiGDM, Spectral
from invdiff.samplers.red_diff import REDDiff
from invdiff.samplers.sgdd import SGDD
from invdiff.samplers.split_gibbs import SplitGibbs
from invdiff.samplers.svdd import SVDD
from invdiff.samplers.tds import TDS
from invdiff.samplers.transport_langevin import TransportLangevin
from invdiff.samplers.twisted_smc import TwistedSMC
from invdiff.samplers.twists import MomentMatched, PlugIn, Twist
from invdiff.samplers.ula import ULA
from invdiff.samplers.wdno import WDNO

__all__ = [
    "AFDPS",
    "APS",
    "DAPS",
    "DDNM",
    "DDRM",
    "DMCMC",
    "DPS",
    "FPS",
    "G2D2",
    "PCN",
    "SGDD",
    "SVDD",
    "TDS",
    "ULA",
    "WDNO",
    "AmortisedSMC",
    "AnchoredSMC",
    "BirthDeath",
    "DiffPIR",
    "ExactInner",
    "FKSteering",
    "ImportanceSampling",
    "Isotropic",
    "Jacobian",
    "Langevin",
    "Levels",
    "MCGDiff",
    "MaskedGibbs",
    "MomentMatched",
    "PiGDM",
    "PlugIn",
    "REDDiff",
    "Resampling",
    "Residual",
    "Sampler",
    "Spectral",
    "SplitGibbs",
    "Stratified",
    "Systematic",
    "TransportLangevin",
    "Twist",
    "TwistedSMC",
]
