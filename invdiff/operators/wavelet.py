r"""Discrete wavelet transforms over the last one, two or three axes, forward and inverse, with true adjoints.

One level takes every axis into a low and a high band, so a channel of k transformed axes becomes 2^k channels of about
half the sides, in the order of the bands' names: "aa", "ad", "da", "dd" for two axes, the first letter the first axis,
a for low and d for high (PyWavelets' keys). Channel c's bands follow one another: channels c 2^k to (c + 1) 2^k - 1.

Several levels keep that shape. In place of the lowest band stands its own transform, in Mallat's arrangement: along
every axis the low band first, then the high band, and in the corner of low bands again the next level. Where the
boundary makes a level longer than its place, the grid grows to hold it, and what no coefficient fills is zero. With
"periodization" and sides divisible by 2^levels nothing is left empty, and there are as many coefficients as values.

The inverse reads the same places. For orthogonal wavelets under these conditions it is the adjoint; for others the
adjoint is another operator, and both are given.

References: Mallat 1989, IEEE Trans. Pattern Anal. 11:674; boundaries and names as in PyWavelets, Lee et al. 2019, JOSS
4:1237.
"""

from collections.abc import Sequence
from itertools import product
from math import log2, prod
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels.wavelet import Bank, Mode, banks, check_mode, coefficients, filter_bank, merge, split
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.caches import Cache

_DENSE = 1024  # longest axis whose matrix is decomposed for the norm
Place = tuple[int | slice, ...]


class Pyramid:
    """Sizes, places and filter banks of a transform of several levels.

    Parameters
    ----------
    shape
        Shape of one signal; the axes before the transformed ones count as channels.
    wavelet, levels, mode, axes
        As for `WaveletTransform`.
    """

    def __init__(self, shape: Sequence[int], wavelet: str, levels: int, mode: Mode, axes: int | None) -> None:
        shape = tuple(int(n) for n in shape)
        axes = min(3, len(shape) - 1) if axes is None else axes
        if not 1 <= axes <= 3 or len(shape) <= axes or min(shape, default=0) < 1:
            raise ShapeError(
                f"A wavelet transform over the last 1, 2 or 3 axes needs a shape with channels before them, such as "
                f"(c, height, width); got {shape} and axes={axes}."
            )
        check_mode(mode)
        taps = filter_bank(wavelet)[0]
        self.shape, self.wavelet, self.levels, self.mode, self.axes = shape, wavelet, levels, mode, axes
        sides, size = shape[-axes:], taps.shape[1]
        most = max(1, int(log2(max(1.0, min(sides) / (size - 1)))))
        if not 1 <= levels <= most:
            raise InputError(
                f"{wavelet} on sides {sides} takes 1 to {most} levels, got {levels}: at more, all coefficients would "
                "see the ends. Take fewer levels or a shorter wavelet."
            )
        self.sides = [tuple(sides)]  # by level: the sides that go into it, and at the end the last low band's
        for _ in range(levels):
            self.sides.append(tuple(coefficients(n, size, mode) for n in self.sides[-1]))
        self._packed = self.sides[-1]  # sides of the lowest band's place, from the last level on
        self._starts = []  # by level but the first, from the last on: where high bands begin
        for low in reversed(self.sides[2:]):
            start = tuple(map(max, low, self._packed))
            self._starts.append(start)
            self._packed = tuple(a + b for a, b in zip(start, low, strict=True))
        self._starts.reverse()
        self._low: Place = (slice(None), 0, *map(slice, self._packed))
        self.grid = tuple(map(max, self.sides[1], self._packed))
        self.bands = 2**axes
        self.lead = shape[:-axes]
        self.out_shape = (*self.lead[:-1], self.lead[-1] * self.bands, *self.grid)
        even = all(n % 2 == 0 for level in self.sides[:-1] for n in level)
        self.orthonormal = mode == "periodization" and even and _orthonormal(wavelet)
        self.cache = Cache()

    def made(self, one: Tensor, like: Tensor) -> list[list[tuple[Bank, Bank]]]:
        """Analysis and synthesis bank of every level and axis, for tensors like one; kept."""

        def build() -> list[list[tuple[Bank, Bank]]]:
            kept = {n: banks(n, self.wavelet, self.mode, like.dtype, like.device) for n in {*sum(self.sides[:-1], ())}}
            return [[kept[n] for n in level] for level in self.sides[:-1]]

        return self.cache.get(one, (like.dtype, like.device), build)

    def decompose(self, x: Tensor, one: Tensor, which: int) -> Tensor:
        """Coefficients of signals by the analysis (0) or the transposed synthesis (1)."""
        made = [[pair[which] for pair in level] for level in self.made(one, x)]
        o = prod((len(x), *self.lead))
        packed = _split_level(x.reshape(o, *self.sides[0]), made[0])
        if self.levels > 1:
            inner, first = self._nest(packed[:, 0], made, 1), packed
            packed = first.new_zeros(o, self.bands, *self.grid)
            packed[(slice(None), slice(1, None), *map(slice, self.sides[1]))] = first[:, 1:]
            packed[self._low] = inner
        return packed.reshape(len(x), *self.out_shape)

    def _nest(self, low: Tensor, made: list[list[Bank]], level: int) -> Tensor:
        """Transform a low band into Mallat's arrangement."""
        c = _split_level(low, made[level])
        inner = self._nest(c[:, 0], made, level + 1) if level + 1 < self.levels else c[:, 0]
        start, sides = self._starts[level - 1], self.sides[level + 1]
        out = c.new_zeros(len(c), *(a + b for a, b in zip(start, sides, strict=True)))
        out[(slice(None), *map(slice, inner.shape[1:]))] = inner
        for band, high in enumerate(product((False, True), repeat=self.axes)):
            if band:
                out[(slice(None), *_block(high, start, sides))] = c[:, band]
        return out

    def recompose(self, c: Tensor, one: Tensor, which: int) -> Tensor:
        """Signals of coefficients by the transposed analysis (0) or the synthesis (1)."""
        made = [[pair[which] for pair in level] for level in self.made(one, c)]
        o = prod((len(c), *self.lead))
        packed = c.reshape(o, self.bands, *self.grid)
        if self.levels > 1:
            low = self._unnest(packed[self._low], made, 1)
            high = packed[(slice(None), slice(1, None), *map(slice, self.sides[1]))]
            packed = torch.cat((low[:, None], high), 1)
        return _merge_level(packed, made[0], self.sides[0]).reshape(len(c), *self.shape)

    def _unnest(self, out: Tensor, made: list[list[Bank]], level: int) -> Tensor:
        start, sides = self._starts[level - 1], self.sides[level + 1]
        c = [out[(slice(None), *_block(high, start, sides))] for high in product((False, True), repeat=self.axes)]
        if level + 1 < self.levels:
            c[0] = self._unnest(out[(slice(None), *map(slice, self._next(level)))], made, level + 1)
        return _merge_level(torch.stack(c, 1), made[level], self.sides[level])

    def _next(self, level: int) -> tuple[int, ...]:
        """Sides of the next level's arrangement inside this level's."""
        return tuple(a + b for a, b in zip(self._starts[level], self.sides[level + 2], strict=True))

    def places(self) -> dict[tuple[int, str], Place]:
        """Place of every band of one channel, (2^k, *grid), by level (1 is the finest) and name; the lowest first."""
        names = ["".join("ad"[h] for h in high) for high in product((0, 1), repeat=self.axes)]
        found: dict[tuple[int, str], Place] = {(self.levels, names[0]): (0, *map(slice, self.sides[self.levels]))}
        for level in reversed(range(1, self.levels)):
            for name in names[1:]:
                high = [letter == "d" for letter in name]
                found[level + 1, name] = (0, *_block(high, self._starts[level - 1], self.sides[level + 1]))
        for band, name in enumerate(names[1:], start=1):
            found[1, name] = (band, *map(slice, self.sides[1]))
        return found

    def norms(self, which: int) -> float | None:
        """Largest singular value of one level: the product of those of its axes; None where that is not known."""
        if self.orthonormal:
            return 1.0
        if self.levels > 1 or max(self.sides[0]) > _DENSE:
            return None
        value = 1.0
        for n in self.sides[0]:
            bank = banks(n, self.wavelet, self.mode, torch.float64, torch.device("cpu"))[which]
            eye = torch.eye(n, dtype=torch.float64)[None, None]
            value *= float(torch.linalg.matrix_norm(split(eye, bank).reshape(-1, n), ord=2))
        return value


def _block(high: Sequence[bool], start: Sequence[int], sides: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(s, s + n) if h else slice(n) for h, s, n in zip(high, start, sides, strict=True))


def _split_level(x: Tensor, made: list[Bank]) -> Tensor:
    """(o, *sides) -> (o, 2^k, *coarse), the last axis first."""
    o, sides, bands, inner = len(x), list(x.shape[1:]), 1, 1
    for axis in reversed(range(len(sides))):
        x = split(x.reshape(o, bands * prod(sides[:axis]), sides[axis], inner), made[axis])
        bands, inner, sides[axis] = 2 * bands, inner * made[axis].size, made[axis].size
    return x.reshape(o, bands, *sides)


def _merge_level(c: Tensor, made: list[Bank], sides: Sequence[int]) -> Tensor:
    """(o, 2^k, *coarse) -> (o, *sides), the first axis first."""
    o, bands, before = len(c), c.shape[1], 1
    for axis, bank in enumerate(made):
        inner = prod(b.size for b in made[axis + 1 :])
        bands //= 2
        c = merge(c.reshape(o, 2, bands * before, bank.size, inner), bank)
        before *= bank.length
    return c.reshape(o, *sides)


def _orthonormal(wavelet: str) -> bool:
    """Whether the filters and their even shifts are orthonormal, and the synthesis is the transpose, to rounding."""
    dec, rec = filter_bank(wavelet)
    size = dec.shape[1]
    shifts = torch.stack([dec.roll(2 * s, 1) * (torch.arange(size) >= 2 * s) for s in range(size // 2)])
    gram = torch.einsum("bf,scf->sbc", dec, shifts)
    gram[0] -= torch.eye(2, dtype=gram.dtype)
    return float(gram.abs().max()) < 1e-11 and float((dec - rec.flip(1)).abs().max()) < 1e-14


class WaveletOperator(LinearOperator):
    """What both directions share: where bands lie in the coefficients, and numbers by band.

    Parameters
    ----------
    pyramid
        Sizes, places and filter banks.
    in_shape, out_shape
        Shapes of one input and one output.
    """

    _one: Tensor

    def __init__(self, pyramid: Pyramid, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, out_shape)
        self.wavelet, self.levels, self.mode, self.axes = pyramid.wavelet, pyramid.levels, pyramid.mode, pyramid.axes
        self._pyramid = pyramid
        self.register_buffer("_one", torch.ones(()), persistent=False)  # tells the device, for the norm

    @property
    def places(self) -> dict[tuple[int, str], Place]:
        """Place of every band in the coefficients of one channel, (2^axes, *grid), by level (1 is the finest) and name.

        Names have a letter an axis: a for the low band, d for the high one. The lowest band comes first, then the
        others from the coarsest level on.
        """
        return self._pyramid.places()

    def by_band(self, values: Float[Tensor, "*c bands"], fill: float = 1.0) -> Tensor:
        r"""Coefficients that are one value a band: a number for each of `places`, in its order.

        Parameters
        ----------
        values
            Shape (bands,), or (channels, bands) for channels of their own.
        fill
            Value where there is no coefficient.

        Returns
        -------
        Tensor
            Of the coefficients' shape.

        Raises
        ------
        ShapeError
            If the values are not as many as the bands.
        """
        pyramid, places = self._pyramid, list(self.places.values())
        channels = prod(pyramid.lead)
        if values.shape[-1] != len(places) or values.ndim > 2 or (values.ndim == 2 and len(values) != channels):
            raise ShapeError(
                f"Give {len(places)} values, or ({channels}, {len(places)}), one a band; got {tuple(values.shape)}."
            )
        values = values.expand(channels, -1)
        out = values.new_full((channels, pyramid.bands, *pyramid.grid), fill)
        for i, place in enumerate(places):
            out[(slice(None), *place)] = values[:, i].reshape(-1, *[1] * pyramid.axes)
        return out.reshape(pyramid.out_shape)

    def measure(self, c: Tensor) -> Float[Tensor, "c bands"]:
        """Root-mean-square of coefficients (n, ...) by channel and band: what `by_band` takes as a scale."""
        packed = c.reshape(len(c), prod(self._pyramid.lead), self._pyramid.bands, *self._pyramid.grid)
        rms = [
            packed[(slice(None), slice(None), *place)].square().transpose(0, 1).flatten(1).mean(1).sqrt()
            for place in self.places.values()
        ]
        return torch.stack(rms, 1)


@final
class WaveletTransform(WaveletOperator):
    """Wavelet coefficients of signals, pictures or volumes, in one tensor whose bands are channels.

    How levels and bands are packed is said at the head of this module.

    Parameters
    ----------
    shape
        Shape (c, *sides) of one signal; all axes before the transformed ones are channels.
    wavelet
        Name of an orthogonal or biorthogonal wavelet of PyWavelets, e.g. "db4" or "bior2.4".
    levels
        Levels, at least one.
    mode
        What lies beyond the ends: "zero", "constant", "symmetric", "reflect", "periodic", or "periodization", which
        alone has no more coefficients than values (one more an axis where a side is odd).
    axes
        How many of the last axes are transformed, 1 to 3; all but the first, at most three, if None.

    Raises
    ------
    CatalogueError
        If there is no such wavelet or mode; the message holds the nearest names.
    ShapeError
        If the shape has no channels before the transformed axes.
    InputError
        If there are more levels than the shortest side allows.
    """

    def __init__(
        self,
        shape: Sequence[int],
        wavelet: str = "db4",
        levels: int = 1,
        mode: Mode = "periodization",
        axes: int | None = None,
    ) -> None:
        pyramid = Pyramid(shape, wavelet, levels, mode, axes)
        super().__init__(pyramid, pyramid.shape, pyramid.out_shape)

    def forward(self, x: Tensor) -> Tensor:
        r"""Coefficients: (n, \*in_shape) -> (n, \*out_shape)."""
        return self._pyramid.decompose(x, self._one, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Apply the transpose, the inverse of orthogonal transforms only: (n, \*out_shape) -> (n, \*in_shape)."""
        return self._pyramid.recompose(y, self._one, 0)

    def inverse(self, c: Tensor) -> Tensor:
        r"""Signals of coefficients: (n, \*out_shape) -> (n, \*in_shape)."""
        return self._pyramid.recompose(c, self._one, 1)

    @property
    def svd(self) -> SVD | None:
        """That of an orthogonal matrix where the transform is one, else None."""
        if not self._pyramid.orthonormal:
            return None
        return SVD(self._one.expand(self.out_shape), lambda c: c, lambda y: y, self.adjoint, self.forward)

    def norm(self) -> float:
        """Largest singular value: exact for one level, else by power iteration."""
        value = self._pyramid.norms(0)
        return super().norm() if value is None else value


@final
class InverseWaveletTransform(WaveletOperator):
    """Signals of wavelet coefficients: the inverse of the `WaveletTransform` with the same parameters.

    Parameters
    ----------
    shape, wavelet, levels, mode, axes
        As for `WaveletTransform`; the shape is that of one signal, the output.

    Raises
    ------
    CatalogueError, ShapeError, InputError
        As there.
    """

    def __init__(
        self,
        shape: Sequence[int],
        wavelet: str = "db4",
        levels: int = 1,
        mode: Mode = "periodization",
        axes: int | None = None,
    ) -> None:
        pyramid = Pyramid(shape, wavelet, levels, mode, axes)
        super().__init__(pyramid, pyramid.out_shape, pyramid.shape)

    def forward(self, x: Tensor) -> Tensor:
        r"""Signals: (n, \*in_shape) -> (n, \*out_shape)."""
        return self._pyramid.recompose(x, self._one, 1)

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Apply the transpose, the forward transform of orthogonal ones only: (n, \*out_shape) -> (n, \*in_shape)."""
        return self._pyramid.decompose(y, self._one, 1)

    def inverse(self, x: Tensor) -> Tensor:
        r"""Coefficients of signals; a right inverse where there are more coefficients than values."""
        return self._pyramid.decompose(x, self._one, 0)

    @property
    def svd(self) -> SVD | None:
        """That of an orthogonal matrix where the transform is one, else None."""
        if not self._pyramid.orthonormal:
            return None
        return SVD(self._one.expand(self.in_shape), self.forward, self.adjoint, lambda c: c, lambda x: x)

    def norm(self) -> float:
        """Largest singular value: exact for one level, else by power iteration."""
        value = self._pyramid.norms(1)
        return super().norm() if value is None else value
