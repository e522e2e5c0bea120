r"""A small U-Net for denoising, fully convolutional, in the line of ADM and EDM.

Each level runs residual blocks (GroupNorm - SiLU - 3x3 convolution, twice) with scale and shift from an embedding of
the noise level, and on coarse levels self-attention without positions, so that pictures of any size whose sides are
divisible by the total stride are served. Sums of two branches are scaled by 1/sqrt(2), and the last convolution of
each branch starts at zero (Karras et al. 2022, arXiv:2206.00364, table 7 and appendix F.2; Dhariwal & Nichol 2021,
arXiv:2105.05233).

It departs from both to spend a small budget where denoising at moderate noise needs it, on the finest levels: the
encoder hands over one skip a level, not one a block, and the coarsest level has no decoder half.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invdiff.errors import InputError

_FUSED_TOKENS = (
    1024  # from here on attention is fused; below it is written out, which can be differentiated twice and forwards
)
_FREQUENCIES = (
    0.25,
    16.0,
)  # radians per unit of c_noise = ln(sigma) / 4: waves no shorter than a factor of 4.8 in sigma


def _conv(c_in: int, c_out: int, kernel: int = 3, *, zero: bool = False) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight) if zero else nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class NoiseEmbedding(nn.Module):
    """Sines and cosines of c_noise at fixed frequencies, then two linear layers: (n,) -> (n, width)."""

    frequencies: Tensor

    def __init__(self, width: int, waves: int = 32) -> None:
        super().__init__()
        low, high = _FREQUENCIES
        self.register_buffer("frequencies", low * (high / low) ** torch.linspace(0, 1, waves), persistent=False)
        self.first, self.second = nn.Linear(2 * waves, width), nn.Linear(width, width)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Embed noise levels given as ln(sigma) / 4."""
        phase = c_noise[:, None] * self.frequencies
        waves = sqrt(2.0) * torch.cat((phase.cos(), phase.sin()), dim=1)
        return F.silu(self.second(F.silu(self.first(waves))))


class ResidualBlock(nn.Module):
    """GroupNorm - SiLU - convolution twice, the second norm scaled and shifted by the noise embedding."""

    def __init__(self, c_in: int, c_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), _conv(c_in, c_out)
        self.affine = nn.Linear(embedding, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), _conv(c_out, c_out, zero=True)
        self.skip = nn.Identity() if c_in == c_out else _conv(c_in, c_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c_in, h, w) and (n, embedding) -> (n, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(torch.addcmul(shift, self.norm2(h), 1 + scale)))
        out: Tensor = (self.skip(x) + h) * sqrt(0.5)
        return out


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, with a scaled residual."""

    def __init__(self, channels: int, groups: int, head: int = 32) -> None:
        super().__init__()
        if channels % head:
            raise InputError(f"Attention splits channels into heads of {head}; {channels} channels do not divide.")
        self.heads = channels // head
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(groups, channels),
            _conv(channels, 3 * channels, 1),
            _conv(channels, channels, 1, zero=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, c, h, w)."""
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        if h * w >= _FUSED_TOKENS:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = torch.softmax(q @ (k * (c // self.heads) ** -0.5).transpose(-1, -2), dim=-1) @ v
        out: Tensor = (x + self.out(a.transpose(-1, -2).reshape(n, c, h, w))) * sqrt(0.5)
        return out


class Stage(nn.Module):
    """The residual blocks of one level on one side, attention after the first of them where asked."""

    def __init__(self, c_in: int, channels: int, blocks: int, embedding: int, groups: int, *, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(channels if i else c_in, channels, embedding, groups) for i in range(blocks)
        )
        self.attention = Attention(channels, groups) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(n, c_in, h, w) and (n, embedding) -> (n, channels, h, w)."""
        for i, block in enumerate(self.blocks):
            x = block(x, embedding)
            x = self.attention(x) if i == 0 else x
        return x


class UNet(nn.Module):
    """A U-Net conditioned on the noise level.

    Parameters
    ----------
    in_channels
        Channels of the picture, in and out.
    channels
        Width of each level, finest first; each must be divisible by `groups`, and by 32 where there is attention.
    blocks
        Residual blocks of each level, on the way down and again on the way up; one number for all levels, or one a
        level.
    attention
        Whether a level has self-attention.
    embedding
        Width of the noise embedding.
    groups
        Groups of each GroupNorm.

    Raises
    ------
    InputError
        If the settings disagree in length or do not divide.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (64, 96, 128, 160),
        blocks: int | Sequence[int] = (3, 4, 2, 1),
        attention: Sequence[bool] = (False, False, True, True),
        embedding: int = 96,
        groups: int = 16,
    ) -> None:
        super().__init__()
        per_level = (blocks,) * len(channels) if isinstance(blocks, int) else tuple(blocks)
        if not len(channels) == len(per_level) == len(attention) or min(per_level, default=0) < 1:
            raise InputError(
                f"Give channels, blocks (at least 1) and attention for each level, got {tuple(channels)}, {per_level}, "
                f"{tuple(attention)}."
            )
        if any(c % groups for c in channels):
            raise InputError(f"Channels {tuple(channels)} must be divisible by the {groups} groups.")
        levels = list(zip(channels, per_level, attention, strict=True))
        self.stride = 2 ** (len(levels) - 1)
        self.embed = NoiseEmbedding(embedding)
        self.conv_in = _conv(in_channels, channels[0])
        self.encoder = nn.ModuleList(Stage(c, c, b, embedding, groups, attention=a) for c, b, a in levels)
        self.decoder = nn.ModuleList(Stage(2 * c, c, b, embedding, groups, attention=a) for c, b, a in levels[:-1])
        steps = list(pairwise(channels))
        self.down = nn.ModuleList(_conv(fine, coarse) for fine, coarse in steps)
        self.up = nn.ModuleList(_conv(coarse, fine) for fine, coarse in steps)
        self.norm_out, self.conv_out = nn.GroupNorm(groups, channels[0]), _conv(channels[0], in_channels, zero=True)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        x
            Pictures (n, in_channels, h, w) of about unit variance; h and w divisible by `stride`.
        c_noise
            ln(sigma) / 4 of each picture, shape (n,).

        Returns
        -------
            Shape (n, in_channels, h, w).
        """
        embedding = self.embed(c_noise)
        h = self.conv_in(x)
        skips = []
        for i, stage in enumerate(self.encoder):
            h = stage(h, embedding)
            if i < len(self.down):
                skips.append(h)
                h = self.down[i](F.avg_pool2d(h, 2))
        for i in reversed(range(len(self.decoder))):
            h = self.up[i](F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = self.decoder[i](torch.cat((h, skips[i]), dim=1), embedding)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
