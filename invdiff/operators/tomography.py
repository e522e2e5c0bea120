r"""Parallel-beam tomography: line integrals of every channel of a picture, along many directions.

With the pixel's side as the unit of length, pixel (i, j) lies at u = j - w // 2 to the right and v = h // 2 - i up from
the axis of rotation, and detector k at s = k - detectors // 2. Its ray at the angle theta is the line

    u cos(theta) + v sin(theta) = s,

perpendicular to the direction theta of the detector; at 0 degrees detectors count columns, and rays run along them.
Axis, angles and detectors are those of skimage.transform.radon, whose detectors are the output's rows.

The discretisation is Joseph's (1982): a ray steps along the picture's axis that it follows more closely, interpolates
linearly between the two pixels that it passes there, and each step has the length 1 / m, m = max(|cos|, |sin|). So a
pixel p whose centre lies at s = t_p has, in the ray at s, the weight

    A[s, p] = max(0, 1 - |s - t_p| / m) / m.

Its error is of second order in the pixel's side over the width of what is seen; lengths of intersection with square
pixels (Siddon 1985) are of first order where a ray runs along a row of pixels off their centres. The matrix has less
than two entries for every pixel and angle.

References
----------
Joseph, An improved algorithm for reprojecting rays through pixel images, IEEE Trans. Med. Imaging 1(3), 1982.
Siddon, Fast calculation of the exact radiological path for a three-dimensional CT array, Med. Phys. 12(2), 1985.
Kak & Slaney, Principles of Computerized Tomographic Imaging, IEEE Press 1988, section 3.3.
"""

import warnings
from dataclasses import dataclass
from math import ceil, hypot, pi
from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import LinearOperator
from invdiff.operators.boundary import good_length
from invdiff.operators.caches import Cache
from invdiff.operators.separable import picture_shape


@final
class Tomography(LinearOperator):
    """Line integrals of every channel along parallel rays: a sinogram for each.

    Values are those of the picture times a length in pixels; for a pixel of side a, multiply them by a. The matrix and
    its transpose are kept as two sparse tables (CSR), so that the operator and its adjoint both gather: each output is
    one thread's sum in a fixed order, and results repeat bitwise. At 256 x 256 pixels and 60 angles the two tables take
    0.11 GB in float32, and making them some seconds, once.

    There is no fast diagonalisation: the norm is by power iteration and the proximal step by conjugate gradients.

    Parameters
    ----------
    shape
        Shape (c, h, w) of one input; outputs are (c, angles, detectors). The operator follows its input's dtype,
        float32 or float64.
    angles
        Number of angles, uniform in [0, 180) degrees from 0, or the angles themselves: a 1-D tensor, degrees, any order
        and range.
    detectors
        Number of detectors, a pixel's side apart, the axis of rotation at number detectors // 2. None takes the
        picture's diagonal, which sees every pixel whole at every angle; fewer cut the sinogram off.

    Raises
    ------
    ShapeError
        If shape is no picture's, or the angles are not 1-D.
    InputError
        If there are no angles, some are not finite real numbers, or detectors is no integer of at least 1.
    """

    angles: Tensor

    def __init__(self, shape: tuple[int, int, int], angles: int | Tensor = 60, *, detectors: int | None = None) -> None:
        c, h, w = picture_shape(shape)
        degrees = _degrees(angles)
        # The farthest centre, the first pixel's, lies at most this far from the axis, and its weights reach less than
        # one detector farther.
        size = 2 * ceil(hypot(h // 2, w // 2)) + 1 if detectors is None else detectors
        if int(size) != size or size < 1:
            raise InputError(f"detectors must be an integer of at least 1, or None for the diagonal, got {detectors}.")
        super().__init__((c, h, w), (c, len(degrees), int(size)))
        self.register_buffer("angles", degrees)
        self._tables = Cache()

    def _projector(self, dtype: torch.dtype) -> "_Projector":
        return self._tables.get(
            self.angles,
            dtype,
            lambda: _joseph(self.in_shape[1:], self.angles, self.out_shape[2], dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Integrate along the rays: (n, c, h, w) -> (n, c, angles, detectors)."""
        y = _Product.apply(x.reshape(-1, x.shape[-2] * x.shape[-1]), self._projector(x.dtype))
        return cast(Tensor, y).reshape(-1, *self.out_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        """Exact transpose, back projection without a filter: (n, c, angles, detectors) -> (n, c, h, w)."""
        x = _Product.apply(y.reshape(-1, y.shape[-2] * y.shape[-1]), self._projector(y.dtype).transposed)
        return cast(Tensor, x).reshape(-1, *self.in_shape)

    def filtered_back_projection(self, y: Float[Tensor, "n c angles detectors"]) -> Float[Tensor, "n c h w"]:
        r"""Invert by the ramp filter and back projection: a first look, not a posterior.

        The discrete form of ``x = \int_0^\pi (|omega| * y)(t_p(theta), theta) d theta``, with the ramp band-limited to
        the detectors (Kak & Slaney, eq. 61), applied without wrapping around, linear interpolation between detectors,
        and each angle's share of the half circle as its weight: half the gaps to its two neighbours, angles 180 degrees
        apart being the same. A gap counts as at most twice the mean, so that a missing wedge is left empty.

        Parameters
        ----------
        y
            Sinograms, the operator's outputs. Noise is amplified; nothing is clipped.

        Returns
        -------
        Tensor
            Pictures in the operator's input units.

        Raises
        ------
        ShapeError
            If y is not a batch of outputs.
        """
        if tuple(y.shape[1:]) != self.out_shape:
            raise ShapeError(
                f"Sinograms must be (n, {', '.join(map(str, self.out_shape))}), the operator's outputs, "
                f"got {tuple(y.shape)}."
            )
        (_, h, w), (_, count, detectors) = self.in_shape, self.out_shape
        length = good_length(2 * detectors)
        q = torch.fft.irfft(torch.fft.rfft(y, n=length) * _ramp(length, y), n=length)[..., :detectors]
        q = pad(q, (1, 1)) * _shares(self.angles).to(y.dtype)[:, None]
        rows, columns = (torch.arange(n, device=y.device, dtype=torch.float64) - n // 2 for n in (h, w))
        x = torch.zeros((), dtype=y.dtype, device=y.device)
        for a in range(count):
            # Outside the detectors there is the zero that q was padded with.
            t = 1.0 + _position(rows[:, None], columns, self.angles[a], detectors).clamp(-1.0, detectors).flatten()
            left = t.floor().clamp_max(detectors)
            index, part = left.long(), (t - left).to(y.dtype)
            x = x + torch.lerp(q[..., a, :].index_select(-1, index), q[..., a, :].index_select(-1, index + 1), part)
        return x.reshape(-1, *self.in_shape)


@dataclass(frozen=True)
class _Projector:
    """A sparse matrix and its transpose, both CSR; never written to."""

    matrix: Tensor
    transpose: Tensor

    @property
    def transposed(self) -> "_Projector":
        return _Projector(self.transpose, self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """Matrix times columns."""
        M = self.matrix
        if x.device.type == "cpu":
            return M @ x
        # CUDA's sparse product adds parts of a row in any order, so that its last bits change from call to call. Here
        # one thread sums one row for one column, in order, in about the same time for a batch of 16.
        return embedding_bag(
            M.col_indices(),
            x.contiguous(),
            M.crow_indices(),
            mode="sum",
            per_sample_weights=M.values(),
            include_last_offset=True,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Projector":
        # torch cannot copy a CSR tensor; one that never changes can be shared.
        return self


class _Product(torch.autograd.Function):
    """Rows of x times the matrix, ``y = x M^T``; its gradient is the same with the transpose, to any order.

    torch's own gradient would form the transpose at every call, and one for the matrix too.
    """

    @staticmethod
    def forward(x: Tensor, projector: _Projector) -> Tensor:
        return projector(x.T).T.contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Projector], output: Tensor) -> None:  # noqa: ARG004 torch's
        ctx.projector = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _Product.apply(gradients[0], ctx.projector.transposed)), None


def _degrees(angles: int | Tensor) -> Tensor:
    if not isinstance(angles, Tensor):
        if int(angles) != angles or angles < 1:
            raise InputError(f"angles must be an integer of at least 1, or a 1-D tensor of degrees, got {angles}.")
        return torch.arange(int(angles), dtype=torch.float64) * (180.0 / int(angles))
    if angles.ndim != 1:
        raise ShapeError(f"angles must be one number or a 1-D tensor of degrees, got the shape {tuple(angles.shape)}.")
    if len(angles) == 0 or angles.is_complex() or not bool(torch.isfinite(angles).all()):
        raise InputError("angles must be finite real numbers, degrees, and at least one.")
    return angles.detach().double().clone()


def _position(rows: Tensor, columns: Tensor, degrees: Tensor, detectors: int) -> Tensor:
    """Detector onto which pixels project, counted from 0 and not rounded."""
    theta = torch.deg2rad(degrees)
    return columns * theta.cos() - rows * theta.sin() + detectors // 2


def _joseph(size: tuple[int, ...], degrees: Tensor, detectors: int, dtype: torch.dtype) -> _Projector:
    """Joseph's matrix, from the formula of this module's text; a row of pixels at a time, which bounds the memory."""
    (h, w), count = size, len(degrees)
    device, degrees = degrees.device, degrees.double().cpu()
    theta = torch.deg2rad(degrees)
    m = torch.maximum(theta.cos().abs(), theta.sin().abs())[:, None]
    first = torch.arange(count)[:, None] * detectors
    # 32 bits where they suffice: half the memory, and what the sparse products of CPUs take without a copy.
    integer = torch.int32 if count * max(2 * h * w, detectors) < 2**31 else torch.int64
    columns = torch.arange(w, dtype=torch.float64)[:, None] - w // 2
    rays, weights, counts = [], [], [torch.zeros(1, dtype=torch.long)]
    for i in range(h):
        t = _position(torch.tensor(i - h // 2), columns, degrees, detectors)[..., None]
        # As m <= 1, only the detectors on either side of t see the pixel.
        s = t.floor() + torch.arange(2)
        weight = (1.0 - (s - t).abs() / m) / m
        # What is only the rounding of, say, cos(90 degrees) is no entry.
        seen = (weight > 1e-12) & (s >= 0) & (s < detectors)
        rays.append((first + s.long())[seen].to(integer))
        weights.append(weight[seen].to(dtype))
        counts.append(seen.sum((1, 2)))
    starts, shape = torch.cat(counts).cumsum(0).to(integer), (h * w, count * detectors)
    with warnings.catch_warnings():
        # torch calls CSR "beta" once a process; all that is used of it here is the product with a dense matrix.
        warnings.filterwarnings("ignore", "Sparse", UserWarning)
        transpose = torch.sparse_csr_tensor(starts, torch.cat(rays), torch.cat(weights), shape, check_invariants=False)
        flipped = transpose.to_sparse_csc()
        matrix = torch.sparse_csr_tensor(
            flipped.ccol_indices(), flipped.row_indices(), flipped.values(), shape[::-1], check_invariants=False
        )
        return _Projector(matrix.to(device), transpose.to(device))


def _ramp(length: int, like: Tensor) -> Tensor:
    """Frequency response (length // 2 + 1,) of the band-limited ramp, from its samples in space."""
    n = torch.arange(length, device=like.device, dtype=torch.float64)
    n = torch.minimum(n, length - n)
    samples = torch.where(n % 2 == 1, -1.0 / (pi * n.clamp_min(1.0)) ** 2, torch.where(n == 0, 0.25, 0.0))
    response: Tensor = torch.fft.rfft(samples).real
    return response.to(like.dtype)


def _shares(degrees: Tensor) -> Tensor:
    """Weight of every angle in an integral over the half circle, radians."""
    sorted_angles, order = (degrees.double() % 180.0).sort()
    gaps = torch.cat([sorted_angles[1:], sorted_angles[:1] + 180.0]) - sorted_angles
    gaps = gaps.clamp_max(2.0 * 180.0 / len(degrees))
    shares = torch.empty_like(gaps)
    shares[order] = torch.deg2rad(0.5 * (gaps + gaps.roll(1)))
    return shares
