r"""What exact masked priors share: checked tokens, the way out through a codebook, draws, and enumerated posteriors.

A masked diffusion removes tokens one by one and is reversed by the conditionals ``p(x_i | unmasked tokens)``, which do
not depend on time (Ou et al. 2024, arXiv 2406.03736). A prior here knows them exactly, whatever is masked, so that any
error of a sampler is the sampler's own.

Token v is the vector E_v of the codebook; the detokeniser, an operator, leads from the (length, c) vectors of a
sequence to physical units.
"""

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.draws import categorical
from invdiff.errors import InputError, ShapeError
from invdiff.event import Event, plain_event
from invdiff.noise import Noise, stream_key
from invdiff.operators.base import Operator, fingerprint
from invdiff.operators.composition import Scale
from invdiff.priors.base import Measurement
from invdiff.priors.unmasking import unmask

if TYPE_CHECKING:
    from invdiff.priors.enumerated import EnumeratedPosterior


def check_tokens(tokens: Tensor, length: int, largest: int, name: str) -> None:
    """Raise unless tokens (..., length) are integers in [0, largest].

    Raises
    ------
    ShapeError
        If the sequences have another length.
    InputError
        If they are not integers, or one is out of the vocabulary.
    """
    if tokens.ndim == 0 or tokens.shape[-1] != length:
        raise ShapeError(f"{name} takes sequences of {length} tokens, (..., {length}); got {tuple(tokens.shape)}.")
    if tokens.dtype != torch.int64:
        raise InputError(f"Tokens are integers, torch.int64; got {tokens.dtype}. Convert them with tokens.long().")
    if tokens.numel() == 0:
        return
    low, high = torch.stack(tokens.aminmax()).tolist()
    if low < 0 or high > largest:
        raise InputError(f"The tokens of {name} lie in [0, {largest}] here; got {low} to {high}.")


class ExactMaskedPrior(nn.Module, ABC):
    """A masked prior whose conditionals, probabilities, draws and small posteriors are exact; float64.

    Subclasses give `_conditionals` and `log_prob`.

    Parameters
    ----------
    length, vocabulary_size
        Tokens of a sequence, and how many there are; the mask is token number ``vocabulary_size``.
    codebook
        E, vector of each token, shape (vocabulary_size, c), physical units before the detokeniser; one-hot if None.
    detokeniser
        Operator from vectors (length, c) to physical units; the identity if None.

    Raises
    ------
    ShapeError
        If codebook or detokeniser do not fit.
    InputError
        If there is no token, or the codebook is not finite.
    """

    name: ClassVar[str]
    _defining: ClassVar[tuple[str, ...]]  # buffers that define the prior, its codebook apart
    codebook: Tensor
    detokeniser: Operator

    def __init__(
        self, length: int, vocabulary_size: int, codebook: Tensor | None, detokeniser: Operator | None
    ) -> None:
        super().__init__()
        if length < 1 or vocabulary_size < 1:
            raise InputError(f"A sequence needs a token at least, got {length} of a vocabulary of {vocabulary_size}.")
        E = torch.eye(vocabulary_size, dtype=torch.float64) if codebook is None else codebook.detach().double().clone()
        if E.ndim != 2 or len(E) != vocabulary_size:
            raise ShapeError(f"The codebook has shape ({vocabulary_size}, c), a row a token; got {tuple(E.shape)}.")
        if not bool(torch.isfinite(E).all()):
            raise InputError("The codebook holds values that are not finite.")
        self.length, self.vocabulary_size, self.mask_token = length, vocabulary_size, vocabulary_size
        self.shape = (length,)
        self.register_buffer("codebook", E)
        vectors = (length, E.shape[1])
        self.detokeniser = Scale(vectors) if detokeniser is None else detokeniser
        if self.detokeniser.in_shape != vectors:
            raise ShapeError(
                f"The detokeniser takes inputs of shape {self.detokeniser.in_shape}; the vectors of a sequence have "
                f"shape {vectors}."
            )

    @property
    def event(self) -> Event:
        """The unknown in physical units."""
        return plain_event(self.detokeniser.out_shape)

    @property
    def key(self) -> str:
        """Hash of what defines the prior: its tables, codebook and detokeniser."""
        digest = hashlib.sha256(f"{type(self).__qualname__}{self.shape}{fingerprint(self.detokeniser)}".encode())
        for name in (*self._defining, "codebook"):
            tensor = self.get_buffer(name)
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # The contract of a masked prior.

    def log_probs(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Log p(x_i = v | unmasked tokens), exact at any masking; one-hot where a token is known.

        Raises
        ------
        ShapeError, InputError
            If the tokens do not fit, or the unmasked ones have probability zero.
        """
        check_tokens(tokens, self.length, self.mask_token, type(self).__name__)
        out = known_tokens(tokens, self.vocabulary_size)
        masked = tokens == self.mask_token
        rows = masked.any(1)
        if not bool(rows.any()):
            return out
        if bool(rows.all()):
            found = self._conditionals(tokens)
        else:
            found = out.clone()
            found[rows] = self._conditionals(tokens[rows])
        if bool(torch.isnan(found).any()):
            raise InputError(
                f"A sequence has probability zero under {type(self).__name__}, whatever its masked tokens are: there "
                "are no conditionals given it."
            )
        return torch.where(masked[..., None], found, out)

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
        check_tokens(tokens, self.length, self.vocabulary_size - 1, type(self).__name__)
        return self.decode_embedding(self.codebook[tokens])

    # What an exact prior can do beyond.

    @abstractmethod
    def _conditionals(self, tokens: Tensor) -> Tensor:
        """Log-conditionals (n, length, V) of sequences with masked tokens; rows of known tokens are not read.

        NaN where the known tokens have probability zero.
        """

    @abstractmethod
    def log_prob(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """Log-probability of complete sequences, nats; minus infinity where there is none."""

    def sample(self, n: int, *, seed: int = 0, steps: int | None = None) -> Int[Tensor, "n length"]:
        """Independent draws; draw i depends on the seed and i alone.

        Parameters
        ----------
        n, seed
            How many, and their seed.
        steps
            Steps of parallel unmasking, `unmasking.unmask`, whose law is the prior's as steps grow; None is a token
            after the other, which is exact.
        """
        noise = Noise([stream_key(seed, "sample", self.name)], n, device=self.codebook.device, dtype=torch.float64)
        if steps is not None:
            return unmask(self, noise, steps).tokens
        return self._draw(noise)

    def _draw(self, noise: Noise) -> Tensor:
        """Exact draws by the chain rule."""
        u = noise.uniform(noise.slots, (self.length,))
        tokens = torch.full((len(u), self.length), self.mask_token, device=u.device)
        for i in range(self.length):
            tokens[:, i] = categorical(self.log_probs(tokens)[:, i], u[:, i])
        return tokens

    @torch.no_grad()
    def posterior(self, likelihood: Measurement) -> "EnumeratedPosterior":
        """Exact posterior of one measurement, by enumeration.

        Raises
        ------
        CapabilityError
            If there are more than 2^20 sequences.
        InputError
            If the likelihood holds several measurements, or is zero for every sequence.
        """
        from invdiff.priors.enumerated import enumerated_posterior

        return enumerated_posterior(self, likelihood)

    def _complete(self, tokens: Tensor) -> None:
        check_tokens(tokens, self.length, self.vocabulary_size - 1, type(self).__name__)


def known_tokens(tokens: Tensor, vocabulary_size: int) -> Tensor:
    """Log of one-hot rows (..., V) at known tokens, zeros at masked ones, float64: evidence for each position."""
    v = torch.arange(vocabulary_size, device=tokens.device)
    excluded = (tokens[..., None] != v) & (tokens[..., None] != vocabulary_size)
    return torch.zeros(excluded.shape, dtype=torch.float64, device=tokens.device).masked_fill_(excluded, -torch.inf)


def as_law(p: Tensor, what: str) -> Tensor:
    """Return logs, float64, of laws along the last axis, normalised to rounding.

    Raises
    ------
    InputError
        If a value is negative or not finite, or a sum is not 1 to 1e-6.
    """
    p = p.detach().double()
    if not bool(torch.isfinite(p).all()) or bool((p < 0).any()) or bool(((p.sum(-1) - 1.0).abs() > 1e-6).any()):
        raise InputError(f"{what} must be probabilities: not negative, with sums of 1 along the last axis.")
    return (p / p.sum(-1, keepdim=True)).log()
