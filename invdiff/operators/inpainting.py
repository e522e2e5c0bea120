"""Inpainting: some pixels are seen, the others are not."""

from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.kernels import pixelwise
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.caches import Cache
from invdiff.operators.separable import picture_shape


@final
class Inpainting(LinearOperator):
    """Keep the observed entries of a picture, as a flat vector.

    The output holds the observed entries alone, in row-major order of (c, h, w), so that a likelihood counts what was
    measured and nothing else: its evidence is exact, and its memory is that of the data. `fill` puts a measurement back
    into a picture.

    Parameters
    ----------
    mask
        Observed (True or 1) and missing (False or 0) entries; shape (h, w), (1, h, w) or (c, h, w).
    shape
        Shape (c, h, w) of one input; outputs are (m,) for m observed entries.

    Raises
    ------
    ShapeError
        If the mask does not fit the shape.
    InputError
        If the mask holds other values than 0 and 1, or observes nothing.
    """

    mask: Tensor
    _index: Tensor

    def __init__(self, mask: Tensor, shape: tuple[int, int, int]) -> None:
        c, h, w = picture_shape(shape)
        if tuple(mask.shape) not in {(h, w), (1, h, w), (c, h, w)}:
            raise ShapeError(
                f"The mask must be {(h, w)}, {(1, h, w)} or {(c, h, w)} for shape {(c, h, w)}, got {tuple(mask.shape)}."
            )
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError(
                "The mask must hold 0 (missing) and 1 (observed) only; threshold it first, e.g. mask > 0.5."
            )
        observed = mask.detach().bool().expand(c, h, w).contiguous()
        index = observed.flatten().nonzero()[:, 0]
        if len(index) == 0:
            raise InputError("The mask observes nothing: no entry is 1 (True means observed).")
        super().__init__((c, h, w), (len(index),))
        self.register_buffer("mask", observed)
        self.register_buffer("_index", index, persistent=False)
        self._tables = Cache()

    @property
    def _place(self) -> Tensor:
        def build() -> Tensor:
            place = torch.full((self.mask.numel(),), -1, dtype=torch.int32, device=self._index.device)
            place[self._index] = torch.arange(len(self._index), dtype=torch.int32, device=self._index.device)
            return place

        # Not a buffer: it would change the operator's fingerprint, from which the noise of a run follows.
        return self._tables.get(self._index, "place", build)

    def forward(self, x: Tensor) -> Tensor:
        """Observed entries: (n, c, h, w) -> (n, m)."""
        return pixelwise.gather(x.flatten(1), self._index, self._place)

    def adjoint(self, y: Tensor) -> Tensor:
        """Picture with zeros at the missing entries: (n, m) -> (n, c, h, w)."""
        return pixelwise.spread(y, self._index, self._place).reshape(-1, *self.in_shape)

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        """Return the proximal step in closed form, since A A^T = I: x + w / (1 + w) A^T (y - A x)."""
        w: float | Tensor = float(weight) if not isinstance(weight, Tensor) else weight.to(x)
        step = w / (1.0 + w)
        if isinstance(step, Tensor) and step.ndim:
            step = step[:, None]
        return x + self.adjoint(step * (y - self.forward(x)))

    def misfit_and_grad(self, x: Tensor, y: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Chi-square of the residuals and the log-density's gradient in one pass; see `invdiff.operators.Pixelwise`."""
        chi2, grad = pixelwise.misfit(x.flatten(1), y, std, self._index, self._place)
        return chi2, grad.reshape(x.shape)

    def fill(self, y: Tensor, value: float = 0.0) -> Float[Tensor, "n c h w"]:
        """Put measurements (n, m) back into pictures, with ``value`` at the missing entries."""
        flat = y.new_full((len(y), self.mask.numel()), value)
        return flat.index_copy(1, self._index, y).reshape(-1, *self.in_shape)

    @property
    def svd(self) -> SVD:
        """The diagonalisation in the standard basis of the inputs; the singular values are the mask."""

        def same(x: Tensor) -> Tensor:
            return x

        return SVD(self.mask.double(), self.forward, self.adjoint, same, same)


def random_mask(shape: tuple[int, ...], fraction_observed: float, seed: int = 0) -> Bool[Tensor, "..."]:
    """Mask whose observed entries are a uniformly random set of round(fraction_observed * entries).

    Parameters
    ----------
    shape
        (h, w) for one mask shared by the channels, as published benchmarks do, or (c, h, w).
    fraction_observed
        In (0, 1].
    seed
        Seed of the set; the same on every device.

    Raises
    ------
    InputError
        If the fraction is out of range.
    """
    if not 0.0 < fraction_observed <= 1.0:
        raise InputError(f"fraction_observed must be in (0, 1], got {fraction_observed}.")
    mask = torch.zeros(shape, dtype=torch.bool)
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
    mask.view(-1)[order[: max(1, round(fraction_observed * mask.numel()))]] = True
    return mask


def box_mask(
    shape: tuple[int, ...], side: int | tuple[int, int], *, margin: int = 0, seed: int | None = None
) -> Bool[Tensor, "..."]:
    """Mask with one box of missing pixels.

    Parameters
    ----------
    shape
        (h, w) or (c, h, w).
    side
        Side of the box in pixels, or (height, width).
    margin
        Least number of pixels between the box and the picture's edge.
    seed
        Seed of a uniformly random place; None puts the box in the centre.

    Raises
    ------
    InputError
        If the box with its margin does not fit, or would hide everything.
    """
    h, w = shape[-2:]
    bh, bw = (side, side) if isinstance(side, int) else side
    room = (h - bh - 2 * margin, w - bw - 2 * margin)
    if min(bh, bw) < 1 or margin < 0 or min(room) < 0 or (bh, bw) == (h, w):
        raise InputError(
            f"A box of {(bh, bw)} pixels with margin {margin} does not fit into {(h, w)}; make it smaller."
        )
    top, left = (h - bh) // 2, (w - bw) // 2
    if seed is not None:
        place = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        top, left = (margin + int(u * (r + 1)) for u, r in zip(place, room, strict=True))
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., top : top + bh, left : left + bw] = False
    return mask
