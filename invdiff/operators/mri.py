r"""Magnetic resonance imaging: Cartesian samples of the Fourier transform of a complex picture, by one coil or several.

    y_c = M F (s_c x) + noise,    c = 1 .. coils

x is the complex picture, s_c the sensitivity of coil c, F the orthonormal 2-D Fourier transform, M the choice of the
observed entries of k-space (SENSE: Pruessmann et al. 1999, Magn. Reson. Med. 42(5), 952-962). Everything is centred:
the picture's origin is pixel (h // 2, w // 2), and frequency zero is entry (h // 2, w // 2) of k-space,

    F = fftshift . fft2(norm="ortho") . ifftshift,

the convention of raw data in the fastMRI set (Zbontar et al. 2018, arXiv:1811.08839), whose k-space goes in as it is.
"""

from typing import final

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.caches import Cache
from invdiff.operators.coil_maps import check_maps
from invdiff.operators.separable import picture_shape

_AXES = (-2, -1)


@final
class MRI(LinearOperator):
    r"""Observed entries of the k-space of a complex picture.

    Pictures and measurements are real tensors with the real and the imaginary part as two channels, so that every
    sampler works on real vectors and noise_std is the standard deviation of each part. An output holds the observed
    entries alone, in row-major order of the mask: `fill` puts them back into a grid of k-space, `select` takes them out
    of one. The adjoint is the zero-filled reconstruction; with coil maps it adds their pictures up, each times the
    conjugate of its map.

    One coil: the SVD is the Fourier transform, its singular values the mask with frequency zero moved to the corner
    (torch.fft's own order); norm and proximal step are closed. Several coils: no SVD; the norm is at most 1 where
    sum_c \|s_c\|^2 = 1, and is found by power iteration; the proximal step is conjugate gradients'.

    Parameters
    ----------
    mask
        Observed (True or 1) and missing (False or 0) entries of k-space, (h, w), frequency zero in the middle, at
        (h // 2, w // 2); or (w,), whole columns (phase-encoding lines). See `cartesian_mask`.
    shape
        Shape (2, h, w) of one input: real and imaginary part. The operator follows its input's dtype, float32 or
        float64.
    coil_maps
        Complex sensitivities (coils, h, w), finite and not all 0, in any unit, see `birdcage_maps`; kept in their own
        precision, as constants: no gradient flows into them. None for a single coil of sensitivity 1.

    Notes
    -----
    Outputs are (2, m) for one coil and (coils, 2, m) with coil maps, m being the number of observed entries.

    Raises
    ------
    ShapeError
        If shape is not (2, h, w), or mask or coil maps do not fit it.
    InputError
        If the mask holds other values than 0 and 1 or observes nothing, or the coil maps are not complex, not finite or
        0 everywhere.
    """

    mask: Tensor
    _index: Tensor
    _maps: Tensor | None

    def __init__(self, mask: Tensor, shape: tuple[int, int, int], *, coil_maps: Tensor | None = None) -> None:
        c, h, w = picture_shape(shape)
        if c != 2:
            raise ShapeError(
                f"MRI takes complex pictures of shape (2, h, w), real and imaginary part, got {(c, h, w)}; "
                "for a complex tensor x of shape (h, w) use torch.stack((x.real, x.imag))."
            )
        if tuple(mask.shape) not in {(h, w), (w,)}:
            raise ShapeError(f"The mask must be {(h, w)} or {(w,)} for shape {(c, h, w)}, got {tuple(mask.shape)}.")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(
                "The mask must hold 0 (missing) and 1 (observed) only; threshold it first, e.g. mask > 0.5."
            )
        observed = mask.detach().bool().expand(h, w).contiguous()
        row, column = observed.nonzero(as_tuple=True)
        if len(row) == 0:
            raise InputError("The mask observes nothing: no entry of k-space is 1 (True means observed).")
        coils = () if coil_maps is None else (check_maps(coil_maps, (h, w)),)
        super().__init__((2, h, w), (*coils, 2, len(row)))
        self.register_buffer("mask", observed)
        # Where torch.fft puts the observed entries: shifting these few numbers once spares shifting k-space each time.
        index = (row - h // 2) % h * w + (column - w // 2) % w
        self.register_buffer("_index", index, persistent=False)
        # Real numbers, since Module.to(dtype) would drop the imaginary part of a complex buffer.
        maps = None if coil_maps is None else torch.view_as_real(coil_maps.detach().resolve_conj()).clone()
        self.register_buffer("_maps", maps)
        self._tables = Cache()

    @property
    def coil_maps(self) -> Complex[Tensor, "coils h w"] | None:
        """Sensitivities of the coils, or None for a single coil."""
        return None if self._maps is None else torch.view_as_complex(self._maps)

    def forward(self, x: Tensor) -> Tensor:
        """Observed k-space: (n, 2, h, w) -> (n, 2, m), or (n, coils, 2, m) with coil maps."""
        picture = _to_corner(_join(x, -3))
        maps = self._shifted_maps(picture.dtype)
        k = torch.fft.fft2(picture if maps is None else picture[:, None] * maps, norm="ortho")
        return self._take(k)

    def adjoint(self, y: Tensor) -> Tensor:
        """Zero-filled reconstruction: (n, 2, m), or (n, coils, 2, m) with coil maps, -> (n, 2, h, w)."""
        picture = torch.fft.ifft2(self._put(y), norm="ortho")
        maps = self._shifted_maps(picture.dtype)
        if maps is not None:
            picture = (picture * maps.conj()).sum(1)
        return _part(_to_middle(picture), -3)

    def fill(self, y: Tensor) -> Complex[Tensor, "n coils h w"]:
        """Put measurements (n, 2, m) or (n, coils, 2, m) into grids of k-space, frequency zero in the middle.

        Missing entries are 0. Without coil maps the result has one coil.
        """
        k = _to_middle(self._put(y))
        return k[:, None] if self._maps is None else k

    def select(self, kspace: Complex[Tensor, "n coils h w"]) -> Tensor:
        """Take the observed entries out of grids of k-space, frequency zero in the middle: the inverse of `fill`.

        This is how raw data become measurements (n, 2, m), or (n, coils, 2, m) with coil maps.

        Raises
        ------
        ShapeError
            If the grids are not (n, coils, h, w), coils being 1 where the operator has no coil maps.
        """
        needed = (1 if self._maps is None else len(self._maps), *self.in_shape[1:])
        if tuple(kspace.shape[1:]) != needed:
            raise ShapeError(f"k-space must be (n, {', '.join(map(str, needed))}), got {tuple(kspace.shape)}.")
        k = _to_corner(kspace)
        return self._take(k[:, 0] if self._maps is None else k)

    @property
    def svd(self) -> SVD | None:
        """The diagonalisation in k-space, coefficients (2, h, w) in torch.fft's order; None with coil maps."""
        if self._maps is not None:
            return None

        def v(c: Tensor) -> Tensor:
            picture = torch.fft.ifft2(_join(c, -3), norm="ortho")
            return _part(_to_middle(picture), -3)

        def v_adjoint(x: Tensor) -> Tensor:
            return _part(torch.fft.fft2(_to_corner(_join(x, -3)), norm="ortho"), -3)

        # On the real channels at once: coefficients and measurements are the same numbers.
        def u(c: Tensor) -> Tensor:
            return c.flatten(2).index_select(2, self._index)

        def u_adjoint(y: Tensor) -> Tensor:
            flat = y.new_zeros(*y.shape[:2], self.mask.numel())
            return flat.index_copy(2, self._index, y).reshape(-1, *self.in_shape)

        values = _to_corner(self.mask).double().expand(self.in_shape)
        return SVD(values, u, u_adjoint, v, v_adjoint)

    def _shifted_maps(self, dtype: torch.dtype) -> Tensor | None:
        """Coil maps in torch.fft's order and a complex dtype."""
        maps = self._maps
        if maps is None:
            return None
        return self._tables.get(maps, dtype, lambda: _to_corner(torch.view_as_complex(maps)).to(dtype))

    def _take(self, k: Tensor) -> Tensor:
        """Observed entries of k-space in torch.fft's order: complex (n, ..., h, w) -> real (n, ..., 2, m)."""
        return _part(k.flatten(-2).index_select(-1, self._index), -2)

    def _put(self, y: Tensor) -> Tensor:
        """Transpose of `_take`."""
        k = _join(y, -2)
        flat = k.new_zeros(*k.shape[:-1], self.mask.numel())
        return flat.index_copy(-1, self._index, k).reshape(*k.shape[:-1], *self.mask.shape)


def cartesian_mask(
    shape: tuple[int, int],
    acceleration: float = 4,
    *,
    centre_fraction: float = 0.08,
    seed: int = 0,
    equispaced: bool = False,
) -> Bool[Tensor, "h w"]:
    """Mask of k-space that observes whole columns: all in the middle, some of the others.

    As the masks of fastMRI (Zbontar et al. 2018, arXiv:1811.08839), but with an exact number of columns in place of an
    expected one: round(w / acceleration) in all, of which round(centre_fraction * w) lie in the middle.

    Parameters
    ----------
    shape
        (h, w) of k-space; frequency zero is in the middle.
    acceleration
        In [1, w]: all columns over observed columns.
    centre_fraction
        In [0, 1]: fraction of all columns that are observed in the middle without a gap.
    seed
        Seed of the other columns' places; the same on every device.
    equispaced
        Whether the other columns are spread evenly from a random start, to the rounding of their places, in place of
        uniformly at random.

    Raises
    ------
    InputError
        If shape, acceleration or centre_fraction is out of range, or the middle alone has more columns than the
        acceleration allows.
    """
    h, w = shape
    if min(h, w) < 1 or not 1 <= acceleration <= w or not 0.0 <= centre_fraction <= 1.0:
        raise InputError(
            f"cartesian_mask needs h, w >= 1, 1 <= acceleration <= w and 0 <= centre_fraction <= 1, "
            f"got shape {(h, w)}, acceleration {acceleration} and centre_fraction {centre_fraction}."
        )
    total, centre = round(w / acceleration), round(centre_fraction * w)
    if centre > total:
        raise InputError(
            f"centre_fraction={centre_fraction} takes {centre} of {w} columns, acceleration={acceleration} "
            f"allows {total}; lower one of the two."
        )
    start, rest, others = (w - centre + 1) // 2, total - centre, w - centre
    generator = torch.Generator().manual_seed(seed)
    if equispaced:
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        # The clamp takes back what rounding may add to the last place; it cannot make two places one.
        chosen = ((torch.arange(rest) + offset) * others / max(1, rest)).long().clamp(max=others - 1)
    else:
        chosen = torch.randperm(others, generator=generator)[:rest]
    columns = torch.zeros(w, dtype=torch.bool)
    columns[start : start + centre] = True
    columns[torch.where(chosen < start, chosen, chosen + centre)] = True
    return columns.expand(h, w).clone()


def _to_corner(c: Tensor) -> Tensor:
    """Move the origin from the middle to the corner, torch.fft's order."""
    shifted: Tensor = torch.fft.ifftshift(c, dim=_AXES)
    return shifted


def _to_middle(c: Tensor) -> Tensor:
    """Inverse of `_to_corner`."""
    shifted: Tensor = torch.fft.fftshift(c, dim=_AXES)
    return shifted


def _join(t: Tensor, dim: int) -> Tensor:
    """Complex tensor whose real and imaginary parts are the two entries of an axis."""
    real, imaginary = t.unbind(dim)
    return torch.complex(real, imaginary)


def _part(c: Tensor, dim: int) -> Float[Tensor, "..."]:
    """Inverse of `_join`."""
    return torch.stack((c.real, c.imag), dim)
