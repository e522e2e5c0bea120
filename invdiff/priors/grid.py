r"""Ising and Potts models on small grids with free boundaries, exact by transfer matrices.

    p(x) ~ exp(sum_{neighbours i j} J(x_i, x_j) + sum_i h_i(x_i))

The V^width states of a row form a Markov chain from row to row, with the pairs of two rows in the transitions and all
else in the evidence; the conditionals of tokens are sums over the states of their row. A row may have 1024 states.
"""

from typing import ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from invdiff.errors import CapabilityError, InputError, ShapeError
from invdiff.operators.base import Operator
from invdiff.operators.reshape import Reshape
from invdiff.priors.chain import forward_backward, log_matmul
from invdiff.priors.enumerated import every_sequence
from invdiff.priors.masked import ExactMaskedPrior, known_tokens

_ROW_STATES = 1024


class GridPrior(ExactMaskedPrior):
    """Tokens on a grid that see their neighbours; tokens are numbered row by row.

    Parameters
    ----------
    shape
        (height, width) of the grid.
    pair
        J, symmetric, shape (V, V).
    field
        h, shape (height, width, V).
    codebook, detokeniser
        As in `ExactMaskedPrior`.

    Raises
    ------
    CapabilityError
        If a row has more than 1024 states.
    """

    _defining: ClassVar[tuple[str, ...]] = ("pair", "field")
    pair: Tensor
    field: Tensor
    _rows: Tensor
    _member: Tensor  # (states, width, V): whether a row's state has that token there
    _across: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        pair: Tensor,
        field: Tensor,
        codebook: Tensor | None,
        detokeniser: Operator | None,
    ) -> None:
        h, w = shape
        V = len(pair)
        if min(h, w) < 1:
            raise ShapeError(f"A grid has a height and a width, got {shape}.")
        if V**w > _ROW_STATES:
            raise CapabilityError(
                f"A row of {w} tokens of {V} has {V**w} states, more than {_ROW_STATES}; make width the shorter side, "
                "or take a smaller grid."
            )
        if not bool(torch.isfinite(pair).all()) or not bool(torch.isfinite(field).all()):
            raise InputError("Coupling and field of a grid must be finite.")
        super().__init__(h * w, V, codebook, detokeniser)
        self.grid = (h, w)
        rows = every_sequence(w, V, pair.device)
        self.register_buffer("pair", pair.double())
        self.register_buffer("field", field.double())
        self.register_buffer("_rows", rows, persistent=False)
        self.register_buffer("_member", torch.nn.functional.one_hot(rows, V).double(), persistent=False)
        across = self.pair[rows[:, None], rows[None]].sum(2)  # between a row's states and the next row's
        self.register_buffer("_across", torch.exp(across - across.max()), persistent=False)
        self._shift = float(across.max())

    def _evidence(self, tokens: Tensor) -> Tensor:
        """Log-weight of each row's states within the row, given what is known of it: (n, height, states)."""
        (h, w), n = self.grid, len(tokens)
        single = known_tokens(tokens, self.vocabulary_size).reshape(n, h, w, -1) + self.field
        # A finite number in place of minus infinity, whose product with 0 is not 0.
        alone = single.clamp_min(-1e300).flatten(2) @ self._member.flatten(1).mT
        return alone + self.pair[self._rows[:, :-1], self._rows[:, 1:]].sum(1)

    def _conditionals(self, tokens: Tensor) -> Tensor:
        zero = torch.zeros_like(self._across[0])
        states = forward_backward(zero, self._across, self._evidence(tokens)).exp()
        return torch.log(states @ self._member.flatten(1)).reshape(len(tokens), self.length, -1)

    def _log_sum(self, tokens: Tensor) -> Tensor:
        """Log of the sum of exp(...) over all sequences with the known tokens, (n,)."""
        evidence = self._evidence(tokens)
        forward = evidence[:, 0]
        for i in range(1, self.grid[0]):
            forward = log_matmul(forward, self._across) + self._shift + evidence[:, i]
        return torch.logsumexp(forward, dim=1)

    def log_prob(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
        """Log-probability of complete sequences, nats."""
        self._complete(tokens)
        (h, w), J = self.grid, self.pair
        x = tokens.reshape(-1, h, w)
        alone = self.field.expand(len(x), h, w, -1).gather(3, x[..., None])[..., 0].sum((1, 2))
        pairs = J[x[:, 1:], x[:, :-1]].sum((1, 2)) + J[x[:, :, 1:], x[:, :, :-1]].sum((1, 2))
        blank = torch.full((1, self.length), self.mask_token, device=tokens.device)
        return alone + pairs - self._log_sum(blank)


@final
class IsingPrior(GridPrior):
    """Spins of -1 (token 0) and 1 (token 1), ``p ~ exp(coupling sum s_i s_j + field sum s_i)``.

    In physical units they are a picture (1, height, width) of spins.

    Parameters
    ----------
    shape
        (height, width); 2^width may be 1024 at most.
    coupling
        Positive: neighbours tend to be alike. An infinite grid orders at 0.4407 (Onsager 1944).
    field
        Pull towards 1, a number or one for each place, (height, width).
    codebook, detokeniser
        As in `ExactMaskedPrior`; the spins, and their place on the grid, if None.
    """

    name: ClassVar[str] = "ising"

    def __init__(
        self,
        shape: tuple[int, int],
        coupling: float,
        field: float | Float[Tensor, "h w"] = 0.0,
        *,
        codebook: Tensor | None = None,
        detokeniser: Operator | None = None,
    ) -> None:
        spin = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        local = torch.as_tensor(field, dtype=torch.float64)
        if local.ndim and tuple(local.shape) != tuple(shape):
            raise ShapeError(f"The field is a number, or has the grid's shape {shape}; got {tuple(local.shape)}.")
        if detokeniser is None and codebook is None:
            detokeniser = Reshape((shape[0] * shape[1], 1), (1, *shape))
        super().__init__(
            shape,
            coupling * torch.outer(spin, spin),
            local.expand(*shape)[..., None] * spin,
            spin[:, None] if codebook is None else codebook,
            detokeniser,
        )


@final
class PottsPrior(GridPrior):
    """Colours that tend to be their neighbours': ``p ~ exp(coupling sum [x_i = x_j] + sum_i field(x_i))``.

    Parameters
    ----------
    shape
        (height, width); colours^width may be 1024 at most.
    colours
        V.
    coupling
        Positive: neighbours tend to be alike.
    field
        Pull towards each colour, shape (V,), or (height, width, V); none if None.
    codebook, detokeniser
        As in `ExactMaskedPrior`.
    """

    name: ClassVar[str] = "potts"

    def __init__(
        self,
        shape: tuple[int, int],
        colours: int,
        coupling: float,
        field: Tensor | None = None,
        *,
        codebook: Tensor | None = None,
        detokeniser: Operator | None = None,
    ) -> None:
        local = torch.zeros(colours, dtype=torch.float64) if field is None else field
        if tuple(local.shape) not in ((colours,), (*shape, colours)):
            raise ShapeError(f"The field has shape ({colours},) or {(*shape, colours)}; got {tuple(local.shape)}.")
        pair = coupling * torch.eye(colours, dtype=torch.float64)
        super().__init__(shape, pair, local.expand(*shape, colours).clone(), codebook, detokeniser)
