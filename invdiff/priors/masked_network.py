r"""A masked prior made of a network: tokens of pictures through a tokenizer, or symbols as they are.

The network gives the conditionals ``p(x_i | tokens that are not masked)``. Drawn one after the other in any order they
make a law of sequences; a network's conditionals fit together only nearly, so that the law depends a little on the
order. What held-out sequences cost under a random order bounds their cost under the mean of these laws,

    -log p(x) <= E_k (L / k) E_{k masked} sum_masked -log p(x_i | the others),   k uniform on 1, ..., L

(Ou et al. 2024, arXiv 2406.03736; the any-order loss of Uria et al. 2014, arXiv 1310.1757).
"""

import hashlib
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.event import Event, image_event, plain_event
from invdiff.networks.masked_transformer import MaskedTransformer
from invdiff.networks.tokenizer import Tokenizer
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator
from invdiff.operators.composition import Scale
from invdiff.priors.masked import check_tokens
from invdiff.priors.unmasking import unmask


@final
class MaskedNetworkPrior(nn.Module):
    """A trained masked prior.

    Parameters
    ----------
    network
        Logits of every position's token; its ``length`` and ``vocabulary_size`` are the prior's.
    tokenizer
        Its codes are the codebook, and its decoder the way out; one-hot vectors and the identity if None.
    alphabet
        Symbols of the tokens, one character each, for priors without a tokenizer; may be empty.
    name, key
        Name, and a hash of what defines the prior; that of the weights if empty.

    Raises
    ------
    ShapeError
        If network and tokenizer speak of other sequences.
    InputError
        If the alphabet has another number of symbols.
    """

    _symbols: Tensor
    detokeniser: Operator

    def __init__(
        self,
        network: MaskedTransformer,
        tokenizer: Tokenizer | None = None,
        *,
        alphabet: str = "",
        name: str = "masked network",
        key: str = "",
    ) -> None:
        super().__init__()
        length, V = network.length, network.vocabulary_size
        if tokenizer is not None and (tokenizer.length, tokenizer.vocabulary_size) != (length, V):
            raise ShapeError(
                f"The network takes {length} tokens of {V} kinds, the tokenizer makes {tokenizer.length} of "
                f"{tokenizer.vocabulary_size}."
            )
        if alphabet and len(set(alphabet)) != V:
            raise InputError(f"The alphabet {alphabet!r} does not name {V} kinds of token, one character each.")
        self.network, self.tokenizer, self.alphabet, self.name = network, tokenizer, alphabet, name
        self.shape, self.length, self.vocabulary_size, self.mask_token = (length,), length, V, V
        self.register_buffer("_symbols", torch.eye(V if tokenizer is None else 0), persistent=False)
        self.detokeniser = Scale((length, V)) if tokenizer is None else tokenizer.detokeniser
        self._key = key

    @property
    def codebook(self) -> Float[Tensor, "vocabulary c"]:
        """Vector of each token."""
        return self._symbols if self.tokenizer is None else self.tokenizer.codebook

    @property
    def event(self) -> Event:
        """A picture with values in [0, 1], or the one-hot vectors of a sequence."""
        shape = self.detokeniser.out_shape
        return plain_event(shape) if self.tokenizer is None else image_event(shape)

    @property
    def key(self) -> str:
        """Hash of what defines the prior."""
        if not self._key:
            digest = hashlib.sha256(self.alphabet.encode())
            for name, tensor in self.state_dict().items():
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._key = digest.hexdigest()
        return self._key

    def eval_only(self) -> "MaskedNetworkPrior":
        """Freeze the weights."""
        return self.eval().requires_grad_(requires_grad=False)

    # The contract of a masked prior.

    @torch.no_grad()
    def log_probs(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Log p(x_i = v | tokens that are not masked), float32; one-hot where a token is known.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit.
        """
        check_tokens(tokens, self.length, self.mask_token, self.name)
        # Logits in half precision would draw as from a lower temperature.
        found = torch.log_softmax(self.network(tokens).float(), dim=-1)
        known = torch.full_like(found, -torch.inf).scatter_(2, tokens.clamp_max(self.mask_token - 1)[..., None], 0.0)
        return torch.where((tokens == self.mask_token)[..., None], found, known)

    def decode_embedding(self, embedding: Float[Tensor, "n length c"]) -> Tensor:
        """Physical units from vectors, those of tokens or means of them."""
        x: Tensor = self.detokeniser(embedding)
        return x

    def decode(self, tokens: Int[Tensor, "n length"]) -> Tensor:
        """Physical units from complete sequences.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit, or one is still masked.
        """
        check_tokens(tokens, self.length, self.vocabulary_size - 1, self.name)
        return self.decode_embedding(self.codebook[tokens])

    # What a trained prior can do beyond.

    def encode(self, x: Tensor) -> Int[Tensor, "n length"]:
        """Tokens of pictures in [0, 1].

        Raises
        ------
        CapabilityError
            If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise CapabilityError(f"The prior {self.name!r} has no tokenizer; its sequences are tokens already.")
        return self.tokenizer.encode(x)

    def sample(self, n: int, *, seed: int = 0, steps: int | None = None) -> Int[Tensor, "n length"]:
        """Draws in a number of steps of parallel unmasking, `unmasking.unmask`; draw i depends on the seed and i alone.

        As many steps as tokens if None; the steps that draw any then draw 1 / (1 - 1 / e) = 1.6 tokens each on average.
        More steps come nearer to one by one, at up to one evaluation a token.
        """
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=self.codebook.device, dtype=torch.float64)
        return unmask(self, noise, self.length if steps is None else steps).tokens

    @torch.no_grad()
    def log_prob_bound(
        self, tokens: Int[Tensor, "n length"], *, samples: int = 32, seed: int = 0, batch: int = 256
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Bound on log p of complete sequences from below, nats, by Monte Carlo; and its standard error.

        Parameters
        ----------
        tokens
            Complete sequences.
        samples
            Masks of each, at least 2; their numbers of masked tokens are stratified over 1, ..., L, so that the
            standard error is too large rather than too small.
        seed
            Of the masks.
        batch
            Sequences in one pass through the network.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit, one is masked, or there is one sample only.
        """
        check_tokens(tokens, self.length, self.vocabulary_size - 1, self.name)
        if samples < 2:
            raise InputError(f"A standard error needs at least two samples, got {samples}.")
        L = self.length
        noise = Noise([stream_key(seed, "bound", self.name)], len(tokens), device=tokens.device, dtype=torch.float64)
        values = torch.empty(samples, len(tokens), dtype=torch.float64, device=tokens.device)
        for s in range(samples):
            u = noise.uniform(noise.slots, (L + 1,))
            k = ((s + u[:, L]) / samples * L).long().clamp_max(L - 1) + 1
            masked = u[:, :L].argsort(-1).argsort(-1) < k[:, None]
            for rows in torch.split(torch.arange(len(tokens), device=tokens.device), batch):
                seen = torch.where(masked[rows], self.mask_token, tokens[rows])
                c = torch.log_softmax(self.network(seen).double(), dim=-1).gather(2, tokens[rows][..., None])[..., 0]
                values[s, rows] = torch.where(masked[rows], c, 0.0).sum(-1) * (L / k[rows])
        return values.mean(0), values.std(0) / samples**0.5
