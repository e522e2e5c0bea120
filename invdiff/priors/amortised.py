r"""A masked prior tilted by a network: a guess, learnt once, of what a posterior's conditionals are.

    p_theta(x_i = v | known tokens) ~ c_i(v) exp h_theta(known tokens)_i(v),

with c the conditionals of the prior that it began with. h = 0 is that prior; the best h is the logarithm of the twist,
``log E[p(y | x) | known tokens, x_i = v]`` up to a constant in v, and then p_theta is the posterior (the optimum of
Wang et al. 2024, arXiv 2410.13643, for the reward log p(y | x)). What is impossible under c stays so, and nothing else
becomes so: p / p_theta are the weights that correct p_theta, and `samplers.AmortisedSMC` takes them.

`invdiff.training.amortise` fits h. A network's conditionals belong to no single law, so that the law of sequences
depends a little on the order in which tokens are drawn.
"""

import hashlib
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.draws import categorical
from invdiff.errors import ShapeError
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.noise import Noise, stream_key
from invdiff.priors.base import MaskedPrior
from invdiff.priors.masked import check_tokens


@final
class AmortisedPrior(nn.Module):
    """A masked prior and a network that tilts its conditionals.

    Parameters
    ----------
    prior
        The prior that is tilted.
    network
        h, logits of every position's token, of the prior's length and vocabulary.

    Raises
    ------
    ShapeError
        If the network speaks of other sequences.
    """

    def __init__(self, prior: MaskedPrior, network: MaskedTransformer) -> None:
        super().__init__()
        (length,), V = prior.shape, prior.vocabulary_size
        if (network.length, network.vocabulary_size) != (length, V):
            raise ShapeError(
                f"The prior's sequences have {length} tokens of {V} kinds, the network's {network.length} of "
                f"{network.vocabulary_size}."
            )
        self.prior: Any = prior
        self.network = network
        self.shape, self.length, self.vocabulary_size, self.mask_token = (length,), length, V, prior.mask_token
        self.name = f"{getattr(prior, 'name', type(prior).__name__)}, tilted"
        # As the prior has them: a posterior asks for these where they are.
        for member in ("detokeniser", "event"):
            if hasattr(prior, member):
                setattr(self, member, getattr(prior, member))

    @property
    def codebook(self) -> Float[Tensor, "vocabulary c"]:
        """Vector of each token, the prior's."""
        E: Tensor = self.prior.codebook
        return E

    @property
    def key(self) -> str:
        """Hash of the prior and of the network's weights."""
        digest = hashlib.sha256(str(getattr(self.prior, "key", repr(self.prior))).encode())
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        """Name what it is, and which weights it holds: the settings of a sampler that it serves are kept as text."""
        return f"AmortisedPrior({self.name}, key={self.key[:16]})"

    @torch.no_grad()
    def tilt(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Give h, to be added to the prior's log-conditionals, float64; it means nothing where a token is known.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit.
        """
        check_tokens(tokens, self.length, self.mask_token, self.name)
        h: Tensor = self.network(tokens).double()
        return h

    def log_probs(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Log p_theta(x_i = v | known tokens), float64; one-hot where a token is known.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit.
        """
        c: Tensor = self.prior.log_probs(tokens).double()  # which also checks them
        return torch.log_softmax(torch.where((tokens == self.mask_token)[..., None], c + self.tilt(tokens), c), dim=-1)

    def decode_embedding(self, embedding: Float[Tensor, "n length c"]) -> Tensor:
        """Physical units from vectors, those of tokens or means of them."""
        x: Tensor = self.prior.decode_embedding(embedding)
        return x

    def sample(self, n: int, *, seed: int = 0) -> Int[Tensor, "n length"]:
        """Draws of p_theta, one token after the other in an order of each draw's own, as it was trained."""
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=self.codebook.device, dtype=torch.float64)
        u = noise.uniform(noise.slots, (2, self.length))
        order, row = u[:, 0].argsort(-1), torch.arange(n, device=u.device)
        tokens = torch.full_like(order, self.mask_token)
        for k in range(self.length):
            i = order[:, k]
            tokens[row, i] = categorical(self.log_probs(tokens)[row, i], u[:, 1, k])
        return tokens
