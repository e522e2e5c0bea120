"""A likelihood of tokens that is a table: rewards that were measured, variant by variant."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.likelihoods.base import Likelihood

_CHUNK = 2**24  # values of one intermediate tensor


@final
class Tabulated(Likelihood):
    r"""Log-likelihood of short sequences from a table, as a function of their one-hot vectors.

    Between one-hot vectors it is the table's multilinear extension,

        log p(y | x) = log sum_v x_1(v_1) ... x_L(v_L) exp table[v_1, ..., v_L],

    where x_i is a law of token i: the expectation under independent tokens, which makes a plugged-in mean an exact
    guess of the likelihood of incomplete sequences, and which has a gradient. The sum is taken in float64, whatever x
    is: terms that are less than e^-745 of the best sequence's likelihood count as zero in it. At one-hot vectors the
    table itself is read, without that bound.

    Parameters
    ----------
    table
        Log-likelihood of every sequence, of shape (V, ..., V) with an axis a token; minus infinity where there is none.
        For a reward r, r / temperature.

    Raises
    ------
    InputError
        If it has axes of different lengths, holds NaN or plus infinity, or nothing but minus infinity.
    """

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        if table.ndim < 1 or len(set(table.shape)) != 1:
            raise InputError(f"A table has an axis a token, all as long as the vocabulary; got {tuple(table.shape)}.")
        largest = table.max()
        if not bool(torch.isfinite(largest)) or bool(torch.isnan(table).any()):
            raise InputError("A table holds log-likelihoods, finite or minus infinity, and one finite at least.")
        self.largest = float(largest)
        self.in_shape = (table.ndim, len(table))
        self.register_buffer("table", table.detach().double().clone())

    @property
    def problems(self) -> int:
        """One table."""
        return 1

    @property
    def measurements(self) -> int:
        """One number."""
        return 1

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-likelihood at one-hot vectors, or laws, x (n, length, V).

        Raises
        ------
        ShapeError
            If x has another shape.
        """
        length, V = self.in_shape
        if tuple(x.shape[1:]) != self.in_shape:
            raise ShapeError(f"The table takes one-hot vectors (n, {length}, {V}), got {tuple(x.shape)}.")
        tokens = x.argmax(-1)
        if not x.requires_grad and torch.equal(torch.nn.functional.one_hot(tokens, V).to(x.dtype), x):
            return self.table[tuple(tokens.mT)].to(x.dtype)
        weights = torch.exp(self.table.double() - self.largest).reshape(V, -1)
        rows = max(1, _CHUNK // V ** (length - 1))
        parts = []
        for part in torch.split(x.double(), rows):
            found = part[:, 0] @ weights
            for i in range(1, length):
                found = torch.einsum("nv,nvr->nr", part[:, i], found.reshape(len(part), V, -1))
            parts.append(found.reshape(len(part)))
        return (torch.cat(parts).log() + self.largest).to(x.dtype)

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Twice the log-likelihood lost against the best sequence."""
        return 2.0 * (self.largest - self.log_prob(x)).clamp_min(0.0)

    def rows(self, index: Tensor) -> "Tabulated":  # noqa: ARG002 one table serves all rows
        """Itself."""
        return self

    @classmethod
    def stack(cls, parts: Sequence["Tabulated"]) -> "Tabulated":
        """Return the one table, if it is one."""
        if any(p is not parts[0] for p in parts[1:]):
            raise CapabilityError("Several tables cannot run together; solve them one by one.")
        return parts[0]
