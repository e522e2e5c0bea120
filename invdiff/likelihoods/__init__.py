"""Likelihoods: what was measured and how, in physical units."""

from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.binary_symmetric import BinarySymmetric
from invdiff.likelihoods.gaussian import Gaussian
from invdiff.likelihoods.objective import Objective
from invdiff.likelihoods.poisson import Poisson
from invdiff.likelihoods.product import Product
from invdiff.likelihoods.symmetric_channel import SymmetricChannel
from invdiff.likelihoods.tabulated import Tabulated

__all__ = [
    "BinarySymmetric",
    "Gaussian",
    "Likelihood",
    "Objective",
    "Poisson",
    "Product",
    "SymmetricChannel",
    "Tabulated",
]
