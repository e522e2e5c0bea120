r"""Mixture of product laws of tokens: ``p(x) = sum_k w_k prod_i theta_ki(x_i)``.

Given known tokens U the components have responsibilities ``r_k ~ w_k prod_{i in U} theta_ki(x_i)``, the conditionals
are ``p(x_i = v | U) = sum_k r_k theta_ki(v)``, at any length. One component is a law of independent tokens.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.draws import categorical
from invdiff.errors import ShapeError
from invdiff.noise import Noise
from invdiff.operators.base import Operator
from invdiff.priors.masked import ExactMaskedPrior, as_law


@final
class ProductMixturePrior(ExactMaskedPrior):
    """A mixture of laws under which tokens are independent.

    Parameters
    ----------
    weights
        Probabilities w of the components, shape (k,).
    probabilities
        theta, probability of each token at each position by component, shape (k, length, V).
    codebook, detokeniser
        As in `ExactMaskedPrior`.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    InputError
        If they are not probabilities.
    """

    name: ClassVar[str] = "product-mixture"
    _defining: ClassVar[tuple[str, ...]] = ("log_weights", "log_theta")
    log_weights: Tensor
    log_theta: Tensor

    def __init__(
        self,
        weights: Float[Tensor, " k"],
        probabilities: Tensor,
        *,
        codebook: Tensor | None = None,
        detokeniser: Operator | None = None,
    ) -> None:
        if probabilities.ndim != 3 or len(probabilities) != len(weights):
            raise ShapeError(
                f"For {len(weights)} components the probabilities have shape ({len(weights)}, length, V); got "
                f"{tuple(probabilities.shape)}."
            )
        super().__init__(probabilities.shape[1], probabilities.shape[2], codebook, detokeniser)
        self.register_buffer("log_weights", as_law(weights, "The weights"))
        self.register_buffer("log_theta", as_law(probabilities, "The tokens' probabilities"))

    @classmethod
    def uniform(
        cls,
        length: int,
        vocabulary_size: int,
        *,
        codebook: Tensor | None = None,
        detokeniser: Operator | None = None,
    ) -> "ProductMixturePrior":
        """Independent tokens, all as probable: fair bits, for a vocabulary of two."""
        theta = torch.full((1, length, vocabulary_size), 1.0 / vocabulary_size, dtype=torch.float64)
        return cls(torch.ones(1, dtype=torch.float64), theta, codebook=codebook, detokeniser=detokeniser)

    def _joint(self, tokens: Tensor) -> Tensor:
        """Log of each component's weight times the probability of the known tokens, (n, k)."""
        mask = torch.zeros_like(self.log_theta[..., :1])  # a masked token has probability 1 under each component
        table = torch.cat((self.log_theta, mask), dim=2)
        place = torch.arange(self.length, device=tokens.device)
        return self.log_weights + table[:, place, tokens].sum(2).mT

    def _conditionals(self, tokens: Tensor) -> Tensor:
        r = torch.softmax(self._joint(tokens), dim=1)  # NaN where no component admits the tokens
        return torch.log(torch.einsum("nk,kiv->niv", r, self.log_theta.exp()))

    def log_prob(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """Log-probability of complete sequences, nats."""
        self._complete(tokens)
        return torch.logsumexp(self._joint(tokens), dim=1)

    def _draw(self, noise: Noise) -> Tensor:
        u = noise.uniform(noise.slots, (1 + self.length,))
        k = categorical(self.log_weights[None], u[:, 0])
        return categorical(self.log_theta[k], u[:, 1:])
