"""WaveletDecoder: from a network's normalised wavelet coefficients to the variables of an event, and back."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import cast, final

import torch
from torch import Tensor

from invdiff.errors import CatalogueError, InputError, ShapeError
from invdiff.operators.base import LinearOperator
from invdiff.operators.composition import Shifted
from invdiff.operators.diagonal import Diagonal
from invdiff.operators.reshape import Reshape
from invdiff.operators.stacking import stack
from invdiff.operators.wavelet import InverseWaveletTransform, WaveletTransform
from invdiff.operators.window import Window


@final
class WaveletDecoder(Shifted):
    r"""The affine map ``x_v = W_v^{-1} (scale_v P_v z + offset_v)`` for every variable v of an event.

    z is one tensor (channels, \*grid). P_v takes variable v's channels and the corner of the grid that its coefficients
    fill; what lies around them is padding, on which x does not depend and which `inverse` sets to zero. One variable
    comes out in its own shape, several flat, one after the other, as an event's variables stand.

    Parameters
    ----------
    transforms
        Forward transform of every variable, by name, in the event's order; or of a single variable.
    grid
        Sides of z; the longest of the variables' coefficients along every axis if None.
    scales
        By variable: factors, positive, that broadcast to the coefficients, e.g. from ``transform.by_band``; 1 where
        there are none.
    offsets
        By variable: coefficients where z is zero, that broadcast likewise; 0 where there are none.

    Attributes
    ----------
    names
        Names of the variables; "x" for a single one.
    channels
        Channels of z by variable, slices.

    Raises
    ------
    ShapeError
        If the coefficients do not fit the grid, scales or offsets not the coefficients, or `out_shape` not the values
        of the only variable.
    InputError
        If there is no transform, or a scale is not positive.
    CatalogueError
        If a scale or an offset is for no variable.
    """

    def __init__(
        self,
        transforms: WaveletTransform | Mapping[str, WaveletTransform],
        grid: Sequence[int] | None = None,
        *,
        scales: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        out_shape: tuple[int, ...] | None = None,
    ) -> None:
        named = {"x": transforms} if isinstance(transforms, WaveletTransform) else dict(transforms)
        scales = {"x": scales} if isinstance(scales, Tensor) else dict(scales or {})
        offsets = {"x": offsets} if isinstance(offsets, Tensor) else dict(offsets or {})
        if not named:
            raise InputError("A wavelet decoder needs the transform of one variable at least, got none.")
        for name in {*scales, *offsets} - {*named}:
            raise CatalogueError.unknown("variable", name, named)
        shapes = [W.out_shape for W in named.values()]
        if len({len(shape) for shape in shapes}) > 1:
            raise ShapeError(f"The variables' coefficients must have one number of axes, got {shapes}.")
        longest = tuple(map(max, *(s[1:] for s in shapes))) if len(shapes) > 1 else shapes[0][1:]
        grid = longest if grid is None else tuple(grid)
        if len(grid) != len(longest) or any(n < m for n, m in zip(grid, longest, strict=True)):
            raise ShapeError(f"Coefficients of sides {longest} do not fit the grid {grid}.")
        ends = torch.tensor([s[0] for s in shapes]).cumsum(0).tolist()
        latent = (ends[-1], *grid)
        windows, linears, shifts = [], [], []
        for (name, W), end in zip(named.items(), ends, strict=True):
            window = Window(latent, W.out_shape, (end - W.out_shape[0], *[0] * len(grid)))
            scale = Diagonal(scales.get(name, torch.ones(())), W.out_shape)
            if not bool((scale.values > 0).all()):
                raise InputError(f"Scales of coefficients must be positive; those of {name!r} are not.")
            back = InverseWaveletTransform(W.in_shape, W.wavelet, W.levels, W.mode, W.axes)
            offset = offsets.get(name, torch.zeros(())).detach().double()
            try:
                offset = offset.expand(W.out_shape)
            except RuntimeError as error:
                raise ShapeError(f"The offset of {name!r} does not broadcast to {W.out_shape}.") from error
            windows.append(window)
            linears.append(cast(LinearOperator, back @ scale @ window if name in scales else back @ window))
            shifts.append(back(offset[None])[0])
        single = len(linears) == 1
        if out_shape is not None:
            if not single:
                raise ShapeError(f"Several variables come out flat; got out_shape={out_shape} for {list(named)}.")
            linears[0] = cast(LinearOperator, Reshape(linears[0].out_shape, tuple(out_shape)) @ linears[0])
            shifts[0] = shifts[0].reshape(out_shape)
        super().__init__(
            linears[0] if single else cast(LinearOperator, stack(linears)),
            shifts[0] if single else torch.cat([s.flatten() for s in shifts]),
        )
        self.names = tuple(named)
        self.channels = {n: slice(e - s[0], e) for n, e, s in zip(named, ends, shapes, strict=True)}
        self._windows, self._transforms = windows, list(named.values())
        for i, (name, shape) in enumerate(zip(named, shapes, strict=True)):
            self.register_buffer(f"scale_{i}", scales.get(name, torch.ones(())).detach().double().expand(shape).clone())

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the variables, those that their transforms take."""
        return tuple(W.in_shape for W in self._transforms)

    @property
    def filled(self) -> Tensor:
        r"""Where in z there are coefficients, (channels, \*grid), bool; the rest is padding."""
        parts = (w.adjoint(torch.ones(1, *w.out_shape))[0] for w in self._windows)
        return sum(parts, torch.zeros(self.in_shape)) > 0

    def encode(self, name: str, x: Tensor) -> Tensor:
        r"""Put one variable (n, \*shape), physical units, into z, all other channels and the padding zero."""
        i = self.names.index(name)
        W, sizes = self._transforms[i], [prod(shape) for shape in self.shapes]
        offset = self.offset.reshape(-1)[sum(sizes[:i]) : sum(sizes[: i + 1])].reshape(W.in_shape)
        # The transform of the shift differs from the offset where there are more coefficients than values, but x does
        # not tell them apart.
        return self._windows[i].adjoint(W(x - offset.to(x.dtype)) / self.get_buffer(f"scale_{i}").to(x.dtype))

    def inverse(self, x: Tensor) -> Tensor:
        r"""Latents of an event: (n, \*out_shape) -> (n, channels, \*grid); a right inverse, zero in the padding."""
        if len(self.names) == 1:
            return self.encode(self.names[0], x.reshape(-1, *self.shapes[0]))
        parts = torch.split(x, [prod(shape) for shape in self.shapes], 1)
        z = (self.encode(n, p.reshape(-1, *s)) for n, p, s in zip(self.names, parts, self.shapes, strict=True))
        return sum(z, next(z))
