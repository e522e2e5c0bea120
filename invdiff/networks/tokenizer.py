r"""A small tokenizer of pictures: a convolutional autoencoder whose code is a grid of entries of a codebook.

The encoder gives a vector z_i for each place i of the grid, the token is the nearest row of the codebook E,

    tokens_i = argmin_v |z_i - E_v|^2,     x = detokeniser(E[tokens])

(van den Oord et al. 2017, arXiv 1711.00937). It departs from the original, and from Yu et al. 2021 (arXiv 2110.04627),
to serve samplers that are guided through the decoder:

- Codes have few dimensions, as in Yu et al., which keeps all of them in use, but are not normalised to the sphere:
  guidance decodes means of codes, and the mean of unit vectors is shorter than all that a decoder of unit vectors has
  seen. Here means lie in the codes' convex hull, and distances are Euclidean.
- The decoder spends its weights on the coarse grid and rises by pixel shuffle (Shi et al. 2016, arXiv 1609.05158); it
  has no attention.
- Values end in [0, 1] by a clip with soft edges, the difference of two softplus functions: unlike a sigmoid's, its
  slope is near one inside, and at a value of 0.01 still a quarter, so that the gradient of a likelihood passes through
  the black and white of a picture.

Cost of a decoding: 12 million multiply-adds for fashion-28-vq, 224 million for photos-64-vq.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import Operator

_EDGE = 30.0  # inverse width of the soft clip's edges


def _conv(c_in: int, c_out: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)


class Block(nn.Module):
    """GroupNorm - SiLU - 3x3 convolution twice, added to the input; the second convolution starts at zero."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels), _conv(channels, channels)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels), _conv(channels, channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> the same."""
        h: Tensor = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return x + h


def _blocks(channels: int, count: int, groups: int) -> list[nn.Module]:
    return [Block(channels, groups) for _ in range(count)]


def soft_clip(x: Tensor) -> Tensor:
    """Clip to [0, 1] with soft edges: increasing, the identity inside but for some hundredths at the edges."""
    # softplus(v) = -logsigmoid(-v), which unlike torch's softplus has no threshold and so no step. Beyond [-1, 2] the
    # clip is at its ends to 1e-14; the difference of ever larger numbers would only add rounding.
    x = x.clamp(-1.0, 2.0)
    return (F.logsigmoid(-_EDGE * (x - 1.0)) - F.logsigmoid(-_EDGE * x)) / _EDGE


@final
class Detokeniser(Operator):
    """The decoder as an operator: vectors (n, length, c) of the grid's places, row by row, to pictures in [0, 1].

    Differentiable and not linear. Computes in the precision of its weights and returns that of its input.

    Parameters
    ----------
    shape
        Shape (ch, h, w) of a picture.
    code
        Dimensions c of a vector.
    channels, blocks
        Width and residual blocks of each level, finest (half the picture's side) first.
    groups
        Groups of each GroupNorm.
    """

    def __init__(
        self, shape: tuple[int, int, int], code: int, channels: Sequence[int], blocks: Sequence[int], groups: int
    ) -> None:
        stride = 2 ** len(channels)
        self.grid = (shape[1] // stride, shape[2] // stride)
        super().__init__((prod(self.grid), code), shape)
        fine_to_coarse = list(zip(channels, blocks, strict=True))
        layers: list[nn.Module] = [_conv(code, channels[-1]), *_blocks(*fine_to_coarse[-1], groups)]
        for (fine, count), coarse in zip(fine_to_coarse[-2::-1], channels[:0:-1], strict=True):
            layers += [_conv(coarse, 4 * fine, 1), nn.PixelShuffle(2), *_blocks(fine, count, groups)]
        out = _conv(channels[0], 4 * shape[0])
        assert out.bias is not None
        nn.init.constant_(out.bias, 0.5)  # start inside the clip's edges
        self.layers = nn.Sequential(*layers, nn.GroupNorm(groups, channels[0]), nn.SiLU(), out, nn.PixelShuffle(2))

    def forward(self, e: Float[Tensor, "n length c"]) -> Float[Tensor, "n ch h w"]:
        """Decode vectors; those of tokens or means of them."""
        weight = next(self.parameters())
        z = e.to(weight.dtype).reshape(len(e), *self.grid, -1).permute(0, 3, 1, 2)  # a channels-last view, not a copy
        x: Tensor = self.layers(z)
        return soft_clip(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).to(e.dtype)


@final
class Tokenizer(nn.Module):
    """Pictures to tokens and back.

    Parameters
    ----------
    shape
        Shape (ch, h, w) of a picture; h and w divisible by 2 to the number of levels, which leads to the grid.
    vocabulary_size
        Rows V of the codebook.
    code
        Dimensions c of a code.
    encoder_channels, encoder_blocks, decoder_channels, decoder_blocks
        Width and residual blocks of each level, finest (half the picture's side) first; widths divisible by `groups`.
    groups
        Groups of each GroupNorm.

    Attributes
    ----------
    codebook
        E (V, c), a buffer: training moves it by averages, not by gradients.
    detokeniser
        `Detokeniser`, an operator from (length, c) to (ch, h, w).
    grid, length
        Places of the grid (rows, columns), and their number: tokens of a picture, row by row.

    Raises
    ------
    InputError
        If the settings disagree or do not divide.
    """

    codebook: Tensor

    def __init__(
        self,
        shape: Sequence[int] = (3, 64, 64),
        vocabulary_size: int = 512,
        code: int = 8,
        encoder_channels: Sequence[int] = (48, 96),
        encoder_blocks: Sequence[int] = (1, 2),
        decoder_channels: Sequence[int] = (48, 96),
        decoder_blocks: Sequence[int] = (1, 4),
        groups: int = 8,
    ) -> None:
        super().__init__()
        levels = {len(s) for s in (encoder_channels, encoder_blocks, decoder_channels, decoder_blocks)}
        if len(levels) != 1 or levels == {0} or min(*encoder_blocks, *decoder_blocks, 0) < 0:
            raise InputError(
                "Give channels and blocks (not negative) of encoder and decoder for each level, got "
                f"{encoder_channels}, {encoder_blocks}, {decoder_channels}, {decoder_blocks}."
            )
        if any(c < 1 or c % groups for c in (*encoder_channels, *decoder_channels)):
            raise InputError(
                f"Channels {encoder_channels} and {decoder_channels} must be divisible by the {groups} groups."
            )
        stride = 2 ** levels.pop()
        if len(shape) != 3 or min(shape) < 1 or shape[1] % stride or shape[2] % stride:
            raise InputError(f"Pictures have a shape (ch, h, w) with sides divisible by {stride}, got {tuple(shape)}.")
        if vocabulary_size < 2 or code < 1:
            raise InputError(
                f"A codebook needs 2 codes of 1 dimension at least, got {vocabulary_size} of {code} dimensions."
            )
        self.shape, self.vocabulary_size = (shape[0], shape[1], shape[2]), vocabulary_size
        layers = [nn.PixelUnshuffle(2), _conv(4 * shape[0], encoder_channels[0])]
        layers += _blocks(encoder_channels[0], encoder_blocks[0], groups)
        for (fine, coarse), count in zip(pairwise(encoder_channels), encoder_blocks[1:], strict=True):
            layers += [nn.PixelUnshuffle(2), _conv(4 * fine, coarse, 1), *_blocks(coarse, count, groups)]
        last = encoder_channels[-1]
        self.encoder = nn.Sequential(*layers, nn.GroupNorm(groups, last), nn.SiLU(), _conv(last, code, 1))
        self.detokeniser = Detokeniser(self.shape, code, decoder_channels, decoder_blocks, groups)
        self.grid, self.length = self.detokeniser.grid, self.detokeniser.in_shape[0]
        self.register_buffer("codebook", torch.randn(vocabulary_size, code))

    def features(self, x: Float[Tensor, "n ch h w"]) -> Float[Tensor, "n length c"]:
        """Vectors z of pictures in [0, 1], before the nearest codes are taken.

        Raises
        ------
        ShapeError
            If the pictures have another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(f"This tokenizer takes pictures of shape (n, {self.shape}), got {tuple(x.shape)}.")
        z: Tensor = self.encoder(2.0 * x.to(self.codebook.dtype) - 1.0)
        return z.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def nearest(self, z: Float[Tensor, "n length c"]) -> Int[Tensor, "n length"]:
        """Token of the nearest code of each vector; the first of equally near ones."""
        E = self.codebook
        with torch.autocast(z.device.type, enabled=False):  # distances of near codes cancel in half precision
            tokens: Tensor = (0.5 * E.square().sum(1) - z.to(E.dtype) @ E.T).argmin(-1)
        return tokens

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "n ch h w"]) -> Int[Tensor, "n length"]:
        """Tokens of pictures in [0, 1], int64, row by row over the grid."""
        return self.nearest(self.features(x))

    def decode(self, tokens: Int[Tensor, "n length"]) -> Float[Tensor, "n ch h w"]:
        """Pictures in [0, 1] of complete sequences of tokens.

        Raises
        ------
        ShapeError
            If the sequences have another length.
        InputError
            If the tokens are no integers, or one is out of the vocabulary.
        """
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ShapeError(f"This tokenizer takes (n, {self.length}) tokens, got {tuple(tokens.shape)}.")
        if tokens.dtype != torch.int64:
            raise InputError(f"Tokens are integers, torch.int64; got {tokens.dtype}. Convert them with tokens.long().")
        if tokens.numel():
            low, high = torch.stack(tokens.aminmax()).tolist()
            if low < 0 or high >= self.vocabulary_size:
                raise InputError(f"Tokens lie in [0, {self.vocabulary_size - 1}], got {low} to {high}.")
        x: Tensor = self.detokeniser(self.codebook[tokens])
        return x
