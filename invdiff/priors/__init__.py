"""Priors: what is plausible. Analytic ones with exact posteriors, and trained ones."""

from invdiff.priors import adapters
from invdiff.priors.base import Curvature, DiffusionPrior, MaskedPrior
from invdiff.priors.chain import MarkovChainPrior
from invdiff.priors.conditional import ConditionalPrior
from invdiff.priors.diffusion import NetworkPrior
from invdiff.priors.field import FieldPrior
from invdiff.priors.frequency_table import FrequencyTable
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.given_tokens import GivenTokens
from invdiff.priors.grid import IsingPrior, PottsPrior
from invdiff.priors.loading import load_prior
from invdiff.priors.masked_network import MaskedNetworkPrior
from invdiff.priors.mixture import MixturePrior
from invdiff.priors.product_mixture import ProductMixturePrior
from invdiff.priors.tiled import TiledPrior
from invdiff.priors.wavelet import WaveletPrior, gaussian_wavelet_prior

__all__ = [
    "ConditionalPrior",
    "Curvature",
    "DiffusionPrior",
    "FieldPrior",
    "FrequencyTable",
    "GaussianPrior",
    "GivenTokens",
    "IsingPrior",
    "MarkovChainPrior",
    "MaskedNetworkPrior",
    "MaskedPrior",
    "MixturePrior",
    "NetworkPrior",
    "PottsPrior",
    "ProductMixturePrior",
    "TiledPrior",
    "WaveletPrior",
    "adapters",
    "gaussian_wavelet_prior",
    "load_prior",
]
