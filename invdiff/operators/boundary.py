r"""One axis of a convolution with a boundary: its geometry, its padding with the exact transpose, and its matrix.

Along an axis of ``size`` samples a kernel w of ``taps`` samples gives

    y[i] = sum_m w[m] x[i + origin - m],

with origin = taps // 2 for outputs of the input's size ("circular", "reflect", "zero") and origin = taps - 1 for
"valid", which keeps the size - taps + 1 outputs that touch inside samples only. Outside samples x[j] are x[j mod size]
("circular"), x[-j] and x[2 (size - 1) - j] ("reflect": the edge sample is not repeated), or 0 ("zero").
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from invdiff.errors import InputError, ShapeError

Boundary = Literal["circular", "reflect", "zero", "valid"]
BOUNDARIES: tuple[str, ...] = get_args(Boundary)


def good_length(n: int) -> int:
    """Smallest length of at least n whose prime factors are 2, 3 and 5, for which every FFT library is fast."""
    best, five = 1 << (n - 1).bit_length(), 1
    while five < best:
        three = five
        while three < best:
            rest = -(-n // three)
            best = min(best, three << (rest - 1).bit_length())
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class Axis:
    """Geometry of one axis.

    Parameters
    ----------
    size, taps
        Numbers of input samples and of kernel samples.
    boundary
        What lies outside.

    Raises
    ------
    ShapeError
        If the kernel is too large for the boundary.
    """

    size: int
    taps: int
    boundary: Boundary

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise InputError(f"boundary must be one of {', '.join(BOUNDARIES)}, got {self.boundary!r}.")
        limit = {"circular": 2 * self.size, "reflect": 2 * self.size - 1, "valid": self.size}.get(self.boundary)
        if limit is not None and self.taps > limit:
            raise ShapeError(
                f"A kernel of {self.taps} samples is too large for {self.size} pixels with boundary {self.boundary!r}, "
                f"which takes at most {limit}; crop the kernel or use boundary 'zero'."
            )

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.size - self.taps + 1 if self.boundary == "valid" else self.size

    @property
    def origin(self) -> int:
        """Index of the kernel sample that multiplies x[i] in y[i]."""
        return self.taps - 1 if self.boundary == "valid" else self.taps // 2

    @property
    def pads(self) -> tuple[int, int]:
        """Samples needed before and after the axis so that a plain "valid" convolution gives the outputs."""
        return (0, 0) if self.boundary == "valid" else (self.taps - 1 - self.origin, self.origin)

    def fold(self, p: Tensor, dim: int) -> Tensor:
        """Transpose of the padding along ``dim``: outside samples return to the inside samples that they copy."""
        before, after = self.pads
        if before + after == 0:
            return p
        core = p.narrow(dim, before, self.size)
        if self.boundary == "zero":
            return core
        core, head, tail = core.clone(), p.narrow(dim, 0, before), p.narrow(dim, before + self.size, after)
        if self.boundary == "circular":
            core.narrow(dim, self.size - before, before).add_(head)
            core.narrow(dim, 0, after).add_(tail)
        else:
            core.narrow(dim, 1, before).add_(head.flip(dim))
            core.narrow(dim, self.size - 1 - after, after).add_(tail.flip(dim))
        return core

    def matrix(self, kernel: Tensor) -> Tensor:
        """Dense matrices (c, outputs, size) of the convolutions along this axis with kernels (c, taps)."""
        i, m = torch.arange(self.outputs)[:, None], torch.arange(self.taps)[None]
        j = i + self.origin - m
        inside = torch.ones_like(j, dtype=torch.bool)
        if self.boundary == "circular":
            j = j % self.size
        elif self.boundary == "reflect":
            j = (self.size - 1) - ((self.size - 1) - j.abs()).abs()
        else:
            inside = (j >= 0) & (j < self.size)
        flat = (i * self.size + j)[inside]
        values = kernel.cpu()[:, None, :].expand(-1, self.outputs, -1)[:, inside]
        matrix = values.new_zeros(len(kernel), self.outputs * self.size).index_add_(1, flat, values)
        return matrix.reshape(len(kernel), self.outputs, self.size).to(kernel.device)


def pad(x: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Pad the last two axes of (n, c, h, w) so that a plain "valid" convolution gives the outputs."""
    widths = [*columns.pads, *rows.pads]
    if not any(widths):
        return x
    mode = {"circular": "circular", "reflect": "reflect"}.get(rows.boundary, "constant")
    return torch.nn.functional.pad(x, widths, mode=mode)
