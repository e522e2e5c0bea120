r"""A masked transformer: for each position of a sequence, logits of its token given those that are not masked.

    h = E[tokens] + P,   h <- h + attention(norm(h)),  h <- h + mlp(norm(h))   depth times,
    logits = norm(h) W^T + b

It sees all positions at once and takes no time: the clean conditionals of a masked diffusion do not depend on it (Ou et
al. 2024, arXiv 2406.03736). Positions are learned, those of a grid as the sum of a row's and a column's, which takes
fewer weights. Layers are normalised before, not after (Xiong et al. 2020, arXiv 2002.04745).
"""

from collections.abc import Sequence
from math import prod
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.errors import InputError


class Layer(nn.Module):
    """Self-attention and an MLP of four times the width, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        nn.init.zeros_(self.out.weight)  # each layer starts as the identity
        nn.init.zeros_(self.down.weight)

    def forward(self, h: Tensor) -> Tensor:
        """(n, length, width) -> the same."""
        n, length, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        h = h + F.dropout(self.out(mixed), self.dropout, self.training)
        update = self.down(F.gelu(self.up(self.norm2(h))))
        return h + F.dropout(update, self.dropout, self.training)


@final
class MaskedTransformer(nn.Module):
    """Logits of every position's token, of sequences of which some tokens are masked.

    Parameters
    ----------
    axes
        Sides of the grid whose places, row by row, are the sequence; (length,) for a plain one.
    vocabulary_size
        V; the mask is token number V.
    width, depth, heads
        Width of a position's vector, number of layers, and heads of each, which divide the width.
    dropout
        Share of each layer's update that training drops, in [0, 1).

    Raises
    ------
    InputError
        If the settings disagree or are out of range.
    """

    def __init__(
        self,
        axes: Sequence[int],
        vocabulary_size: int,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not axes or min(*axes, vocabulary_size, width, depth, heads) < 1:
            raise InputError(
                "The sides, the vocabulary, width, depth and heads of a transformer are positive; got "
                f"{tuple(axes)}, {vocabulary_size}, {width}, {depth}, {heads}."
            )
        if width % heads:
            raise InputError(f"{heads} heads do not divide a width of {width}.")
        if not 0.0 <= dropout < 1.0:
            raise InputError(f"dropout is a share, in [0, 1); got {dropout}.")
        self.axes, self.length, self.vocabulary_size = tuple(axes), prod(axes), vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size + 1, width)
        self.positions = nn.ParameterList(0.02 * torch.randn(side, width) for side in self.axes)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary_size)

    def forward(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n length vocabulary"]:
        """Logits at every position, known ones too, where they mean nothing."""
        return self._logits(self.embedding(tokens))

    def mixed(self, weights: Float[Tensor, "n length kinds"]) -> Float[Tensor, "n length vocabulary"]:
        """Logits of positions that hold mixtures of the V tokens and the mask, so that a gradient finds its way."""
        return self._logits(weights @ self.embedding.weight)

    def _logits(self, vectors: Tensor) -> Tensor:
        place = torch.zeros((), device=vectors.device)
        for axis, table in enumerate(self.positions):
            later = len(self.axes) - 1 - axis
            place = place + table.reshape(*table.shape[:1], *[1] * later, table.shape[1])
        h = vectors + place.reshape(self.length, -1)
        for layer in self.layers:
            h = layer(h)
        logits: Tensor = self.head(self.norm(h))
        return logits
