r"""A masked prior of which some tokens are known: infilling.

    p(x_i = v | unmasked tokens, given tokens).

The conditionals of a masked prior hold for any set of known tokens, so that to condition it is to never mask what is
given. Sequences keep their length: a given token counts as unmasked whatever a sampler writes in its place, and every
sampler runs as it is.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.draws import categorical
from invdiff.errors import CatalogueError
from invdiff.noise import Noise, stream_key
from invdiff.priors.base import MaskedPrior
from invdiff.priors.masked import check_tokens

NAME = "tokens"
"""What a problem's ``given`` calls them."""


@final
class GivenTokens(nn.Module):
    """The law of a masked prior's sequences given some of their tokens.

    Parameters
    ----------
    prior
        Of whole sequences.
    tokens
        int64 (length,), the prior's mask where a token is not known.

    Raises
    ------
    ShapeError, InputError
        If the tokens do not fit the prior.
    """

    known: Tensor

    def __init__(self, prior: MaskedPrior, tokens: Int[Tensor, " length"]) -> None:
        super().__init__()
        (length,) = prior.shape
        self.name = f"{getattr(prior, 'name', type(prior).__name__)}, some tokens given"
        check_tokens(tokens, length, prior.mask_token, self.name)
        self.prior: Any = prior
        self.shape, self.length = (length,), length
        self.vocabulary_size, self.mask_token = prior.vocabulary_size, prior.mask_token
        # As the prior has them: a posterior asks for these where they are.
        for member in ("detokeniser", "event", "alphabet"):
            if hasattr(prior, member):
                setattr(self, member, getattr(prior, member))
        self.register_buffer("known", tokens.detach().clone().to(prior.codebook.device))

    @property
    def codebook(self) -> Float[Tensor, "vocabulary c"]:
        """Vector of each token, the prior's."""
        E: Tensor = self.prior.codebook
        return E

    @property
    def key(self) -> str:
        """Hash of the prior and of what is given."""
        digest = hashlib.sha256(str(getattr(self.prior, "key", repr(self.prior))).encode())
        digest.update(self.known.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def fill(self, tokens: Int[Tensor, "*n length"]) -> Int[Tensor, "*n length"]:
        """Sequences with the given tokens in their places."""
        return torch.where(self.known == self.mask_token, tokens, self.known)

    def log_probs(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Log p(x_i = v | unmasked and given tokens); one-hot where a token is known.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit, or those that are known have probability zero under the prior.
        """
        check_tokens(tokens, self.length, self.mask_token, self.name)
        found: Tensor = self.prior.log_probs(self.fill(tokens))
        return found

    def decode_embedding(self, embedding: Float[Tensor, "n length c"]) -> Tensor:
        """Physical units from vectors, those of the given tokens in their places."""
        E = self.codebook.to(embedding)[self.known.clamp_max(self.mask_token - 1)]
        x: Tensor = self.prior.decode_embedding(torch.where((self.known == self.mask_token)[:, None], embedding, E))
        return x

    def decode(self, tokens: Int[Tensor, "n length"]) -> Tensor:
        """Physical units from complete sequences.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit, or one that is not given is still masked.
        """
        filled = self.fill(tokens)
        check_tokens(filled, self.length, self.vocabulary_size - 1, self.name)
        return self.decode_embedding(self.codebook[filled])

    @torch.no_grad()
    def sample(self, n: int, *, seed: int = 0) -> Int[Tensor, "n length"]:
        """Draws, one unknown token after the other in an order of each draw's own; draw i depends on seed and i alone.

        Exact where the prior's conditionals are.
        """
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=self.known.device, dtype=torch.float64)
        u = noise.uniform(noise.slots, (2, self.length))
        unknown = self.known == self.mask_token
        order = torch.where(unknown, u[:, 0], torch.inf).argsort(-1)  # what is given comes last, and is not drawn
        tokens, row = self.fill(torch.full_like(order, self.mask_token)), torch.arange(n, device=u.device)
        for k in range(int(unknown.sum())):
            i = order[:, k]
            tokens[row, i] = categorical(self.log_probs(tokens)[row, i], u[:, 1, k])
        return tokens


def condition_tokens(prior: MaskedPrior, given: Mapping[str, Tensor]) -> GivenTokens:
    """`GivenTokens` from what a problem gives.

    Parameters
    ----------
    prior
        Of whole sequences.
    given
        ``{"tokens": int64 (length,)}``, the prior's mask where a token is not known.

    Raises
    ------
    CatalogueError
        If it gives something else.
    ShapeError, InputError
        If the tokens do not fit the prior.
    """
    for name in given:
        if name != NAME:
            raise CatalogueError.unknown("variable of a masked prior", name, [NAME])
    return GivenTokens(prior, given[NAME])
