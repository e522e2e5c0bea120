r"""Anti-aliased down-sampling by an integer factor, as two small dense matrices: ``Y = W_h X W_w^T``.

Output i looks at the position s = factor (i + 1/2) - 1/2 of the input and weighs sample j by f((j - s) / factor), f
being Keys' cubic (a = -1/2), the triangle or the box. Every row is normalised to sum 1. This is what Pillow, MATLAB's
imresize and torch's ``interpolate(antialias=True)`` do; they differ at the borders only:

- "truncate": samples outside do not exist and the row is normalised over the inside ones (Pillow, torch);
- "symmetric": samples outside mirror the inside ones, the edge sample repeated (MATLAB; the resizer used by DPS and
  DAPS).
"""

from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import SVD, LinearOperator
from invdiff.operators.kernels import keys_cubic
from invdiff.operators.separable import Separable, picture_shape

Filter = Literal["bicubic", "bilinear", "box"]
Edge = Literal["truncate", "symmetric"]


def resize_matrix(size: int, factor: int, filter: Filter, boundary: Edge) -> Float[Tensor, "outputs inputs"]:  # noqa: A002
    """Matrix (size / factor, size), float64, of down-sampling along one axis; every row sums to 1."""
    reach = 2 * factor
    i = torch.arange(size // factor)[:, None]
    j = factor * i + factor // 2 + torch.arange(-reach - 1, reach + 1)[None]
    t = (j - (factor * (i + 0.5) - 0.5)) / factor
    t = t.double()
    if filter == "bicubic":
        weights = keys_cubic(t)
    elif filter == "bilinear":
        weights = (1.0 - t.abs()).clamp_min(0.0)
    else:
        weights = (t.abs() < 0.5).double()
    if boundary == "truncate":
        weights = weights * ((j >= 0) & (j < size))
    j = j % (2 * size)
    j = torch.where(j < size, j, 2 * size - 1 - j)
    matrix = torch.zeros(size // factor, size, dtype=torch.float64).scatter_add_(1, j, weights)
    return matrix / matrix.sum(1, keepdim=True)


@final
class Downsampling(LinearOperator):
    """Down-sampling of pictures by an integer factor, with anti-aliasing.

    Costs two dense matrix products (see `Separable`), about 2 w (1 + 1 / factor) operations an output-row pixel; its
    SVD is exact.

    Parameters
    ----------
    shape
        Shape (c, h, w) of one input; outputs are (c, h / factor, w / factor). The operator follows its input's dtype.
    factor
        Integer of at least 1 that divides h and w.
    filter
        "bicubic" (Keys, a = -1/2), "bilinear" or "box" (means of factor x factor pixels).
    boundary
        "truncate" or "symmetric"; see this module's text.

    Raises
    ------
    ShapeError
        If the factor does not divide the picture's sides.
    InputError
        If the factor, filter or boundary is not one of the above.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        factor: int,
        filter: Filter = "bicubic",  # noqa: A002
        boundary: Edge = "truncate",
    ) -> None:
        c, h, w = picture_shape(shape)
        for name, value, known in (("filter", filter, get_args(Filter)), ("boundary", boundary, get_args(Edge))):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if int(factor) != factor or factor < 1:
            raise InputError(f"factor must be an integer of at least 1, got {factor}.")
        if h % factor or w % factor:
            raise ShapeError(
                f"factor {factor} does not divide the picture's sides {(h, w)}; crop the picture to multiples of it."
            )
        super().__init__((c, h, w), (c, h // factor, w // factor))
        self.factor, self.filter, self.boundary = int(factor), filter, boundary
        left, right = (resize_matrix(n, self.factor, filter, boundary) for n in (h, w))
        self._sides = Separable(left, right, shape=(c, h, w))

    def forward(self, x: Tensor) -> Tensor:
        """Down-sample: (n, c, h, w) -> (n, c, h / factor, w / factor)."""
        return self._sides.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Exact transpose (not an interpolation): (n, c, h / factor, w / factor) -> (n, c, h, w)."""
        return self._sides.adjoint(y)

    @property
    def svd(self) -> SVD:
        """The Kronecker product of two dense SVDs."""
        return self._sides.svd
