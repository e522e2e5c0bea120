r"""Compressed sensing: a few random linear measurements of a whole picture.

Two ensembles, x being the flattened picture of d values and m the number of measurements:

- "fourier": ``A = R H D``, with D random signs, H the orthonormal Hartley transform and R a random choice of m of the d
  coefficients. H is the real form of the Fourier transform, ``(H x)_k = d^{-1/2} sum_j (cos + sin)(2 pi j k / d) x_j``;
  it is its own inverse and transpose and takes one real FFT of any length. The signs spread every picture over all
  frequencies alike, so that no coefficient matters more than another (Do et al. 2012). The rows of A are orthonormal:
  ``A A^T = 1``, and ``E |A x|^2 = m / d |x|^2``.
- "gaussian": a dense matrix of independent N(0, 1 / m) entries: ``E |A x|^2 = |x|^2``, the textbook case (Candes & Tao
  2006), for small pictures.

References
----------
Candes & Tao, Near-optimal signal recovery from random projections, IEEE Trans. Inf. Theory 52(12), 2006.
Do, Gan, Nguyen & Tran, Fast and efficient compressive sensing using structurally random matrices, IEEE Trans. Signal
Process. 60(1), 2012 (arXiv:1106.5037).
Bracewell, Discrete Hartley transform, J. Opt. Soc. Am. 73(12), 1983.
"""

from math import prod
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from invdiff.errors import InputError
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.caches import Cache
from invdiff.operators.separable import picture_shape

Kind = Literal["fourier", "gaussian"]

_ENTRIES = 2**28  # Of a dense matrix: 2 GiB in float64.


@final
class CompressedSensing(LinearOperator):
    """Random measurements of the flattened picture, all channels together, as a flat vector.

    Parameters
    ----------
    shape
        Shape (c, h, w) of one input, d = c h w values; outputs are (measurements,). The operator follows its input's
        dtype, float32 or float64.
    measurements
        Integer m in [1, d].
    kind
        "fourier": signs, a fast transform and a random subset; orthonormal rows, d log d operations, a few values a
        pixel of memory. "gaussian": a dense matrix, m d values, variance 1 / m; its SVD, made on first use, costs some
        m^2 d operations and as much memory again.
    seed
        Seed of the signs, the subset or the matrix, which are drawn on the CPU and are the same on every device.

    Raises
    ------
    ShapeError
        If shape is no picture's.
    InputError
        If measurements is out of range, kind is unknown, or a dense matrix would pass 2^28 entries.
    """

    _signs: Tensor
    _index: Tensor
    matrix: Tensor | None

    def __init__(
        self, shape: tuple[int, int, int], measurements: int, *, kind: Kind = "fourier", seed: int = 0
    ) -> None:
        c, h, w = picture_shape(shape)
        size = c * h * w
        if kind not in get_args(Kind):
            raise InputError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}.")
        if int(measurements) != measurements or not 1 <= measurements <= size:
            raise InputError(
                f"measurements must be an integer from 1 to {size}, the number of values of {(c, h, w)}, "
                f"got {measurements}; for a ratio r, give round(r * {size})."
            )
        m = int(measurements)
        if kind == "gaussian" and m * size > _ENTRIES:
            raise InputError(
                f"kind='gaussian' would need a dense matrix of {m} x {size} entries, more than {_ENTRIES}; use "
                "kind='fourier', which stores none, or fewer measurements of a smaller picture."
            )
        super().__init__((c, h, w), (m,))
        self.kind, self.seed = kind, seed
        generator = torch.Generator().manual_seed(seed)
        if kind == "gaussian":
            self.register_buffer("matrix", torch.randn(m, size, generator=generator, dtype=torch.float64) / m**0.5)
        else:
            # Small integers, which conversions to another dtype leave alone.
            signs = 2 * torch.randint(2, (size,), generator=generator, dtype=torch.int8) - 1
            self.register_buffer("_signs", signs)
            self.register_buffer("_index", torch.randperm(size, generator=generator)[:m].sort().values)
            self.matrix = None
        self._tables = Cache()

    def _matrix(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return self._tables.get(matrix, dtype, lambda: matrix.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Measure: (n, c, h, w) -> (n, m)."""
        if self.matrix is None:
            return self._spread(x).index_select(1, self._index)
        return x.flatten(1) @ self._matrix(self.matrix, x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """Exact transpose: (n, m) -> (n, c, h, w)."""
        if self.matrix is None:
            return self._gather(self._fill(y))
        return (y @ self._matrix(self.matrix, y.dtype)).reshape(-1, *self.in_shape)

    def _spread(self, x: Tensor) -> Tensor:
        """H D: pictures to all d coefficients."""
        return hartley(x.flatten(1) * self._signs)

    def _gather(self, c: Tensor) -> Tensor:
        """(H D)^T: all d coefficients to pictures."""
        return (hartley(c) * self._signs).reshape(-1, *self.in_shape)

    def _fill(self, y: Tensor) -> Tensor:
        return y.new_zeros(len(y), prod(self.in_shape)).index_copy(1, self._index, y)

    @property
    def svd(self) -> SVD:
        """All d coefficients with singular values 0 and 1 ("fourier"), or a dense SVD ("gaussian").

        The dense one has m + d coefficients: the m along the right singular vectors, then the rest of the picture as
        it is, with singular values 0. So V V^T = 1 needs no basis of the null space, which would be d x d.
        """
        matrix = self.matrix
        if matrix is None:
            chosen = torch.zeros(prod(self.in_shape), dtype=torch.float64, device=self._index.device)
            chosen = chosen.index_fill(0, self._index, 1.0)
            return SVD(chosen, lambda c: c.index_select(1, self._index), self._fill, self._gather, self._spread)
        m, d = matrix.shape
        exact = self._tables.get(matrix, "svd", lambda: torch.linalg.svd(matrix.double(), full_matrices=False))

        def sides(t: Tensor) -> tuple[Tensor, Tensor]:
            return self._tables.get(matrix, ("svd", t.dtype), lambda: (exact[0].to(t.dtype), exact[2].to(t.dtype)))

        def rest(x: Tensor) -> Tensor:
            vt = sides(x)[1]
            return x - (x @ vt.mT) @ vt

        def v(c: Tensor) -> Tensor:
            return (c[:, :m] @ sides(c)[1] + rest(c[:, m:])).reshape(-1, *self.in_shape)

        def v_adjoint(x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return torch.cat([flat @ sides(x)[1].mT, rest(flat)], 1)

        return SVD(
            pad(exact[1], (0, d)),
            lambda c: c[:, :m] @ sides(c)[0].mT,
            lambda y: pad(y @ sides(y)[0], (0, d)),
            v,
            v_adjoint,
        )


def hartley(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Orthonormal discrete Hartley transform of the last axis; its own inverse and transpose."""
    d = x.shape[-1]
    f = torch.fft.rfft(x, norm="ortho")
    # With F the Fourier transform, H = Re F - Im F; the upper half of F is the lower one's conjugate, backwards.
    return torch.cat([f.real - f.imag, (f.real + f.imag)[:, 1 : (d + 1) // 2].flip(1)], 1)
