"""Exact priors of tokens from the cards of problems that bring their own."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invdiff.operators.reshape import Reshape
from invdiff.priors.chain import MarkovChainPrior
from invdiff.priors.grid import IsingPrior
from invdiff.priors.masked import ExactMaskedPrior
from invdiff.priors.product_mixture import ProductMixturePrior

if TYPE_CHECKING:
    from invdiff.card_models import PriorTable


def prior_from_card(card: "PriorTable") -> ExactMaskedPrior:
    """Make the prior of a problem's section ``[prior]``, float64.

    Raises
    ------
    ShapeError, InputError
        If its tables do not fit each other, or are no probabilities.
    """
    if card.type == "Ising":
        return IsingPrior(card.shape, card.coupling)
    codebook = None if card.codebook is None else _float64(card.codebook)
    if card.type == "MarkovChain":
        return MarkovChainPrior(_float64(card.initial), _float64(card.transition), card.length, codebook=codebook)
    theta = _float64(card.probabilities)
    vectors = (theta.shape[1], theta.shape[2] if codebook is None else codebook.shape[1])
    out = None if card.shape is None else Reshape(vectors, card.shape)
    return ProductMixturePrior(_float64(card.weights), theta, codebook=codebook, detokeniser=out)


def _float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
