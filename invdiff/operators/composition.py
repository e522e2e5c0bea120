"""Composition and the affine map: what a prior's decoder and a measurement operator make together."""

import torch
from torch import Tensor

from invdiff.errors import ShapeError
from invdiff.operators.base import SVD, LinearOperator, Operator


class Affine(Operator):
    """The affine map ``x = scale * z + offset`` with scalar coefficients, as between [-1, 1] and [0, 1].

    Parameters
    ----------
    shape
        Shape of one input.
    scale, offset
        Scale, not zero, and offset.
    """

    def __init__(self, shape: tuple[int, ...], scale: float = 1.0, offset: float = 0.0) -> None:
        super().__init__(shape, shape)
        if scale == 0:
            raise ShapeError("An affine map with scale 0 has no inverse; give a scale that is not zero.")
        self.scale, self.offset = float(scale), float(offset)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        return self.scale * x + self.offset

    def inverse(self, x: Tensor) -> Tensor:
        """Apply the inverse map."""
        return (x - self.offset) / self.scale

    @property
    def linear(self) -> "Scale":
        """The map without its offset."""
        return Scale(self.in_shape, self.scale)


class Shifted(Operator):
    """The affine map ``x = L z + offset``, as out of a prior's normalised latent space.

    Parameters
    ----------
    linear
        L.
    offset
        Real values that broadcast to L's outputs. A constant: no gradient flows into it.

    Raises
    ------
    ShapeError
        If the offset does not broadcast.
    """

    offset: Tensor

    def __init__(self, linear: LinearOperator, offset: Tensor) -> None:
        super().__init__(linear.in_shape, linear.out_shape)
        self.linear = linear
        try:
            offset = offset.detach().double().expand(linear.out_shape)
        except RuntimeError as error:
            raise ShapeError(
                f"An offset of shape {tuple(offset.shape)} does not broadcast to the outputs {linear.out_shape}."
            ) from error
        self.register_buffer("offset", offset.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map."""
        return self.linear(x) + self.offset.to(x.dtype)


class Scale(LinearOperator):
    """Multiplication by a scalar that is not zero; ``Scale(shape)`` is the identity."""

    _one: Tensor

    def __init__(self, shape: tuple[int, ...], factor: float = 1.0) -> None:
        super().__init__(shape, shape)
        self.factor = float(factor)
        self.register_buffer("_one", torch.ones(()), persistent=False)  # tells the singular values their device

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return self.factor * x

    def adjoint(self, y: Tensor) -> Tensor:
        """Multiply."""
        return self.factor * y

    @property
    def svd(self) -> SVD:
        """The diagonalisation, in the standard basis."""

        def same(t: Tensor) -> Tensor:
            return t

        return SVD(self._one.expand(self.in_shape), same, same, same, same).scaled(self.factor)


class Composition(Operator):
    """``x -> outer(inner(x))``."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        super().__init__(inner.in_shape, outer.out_shape)
        self.outer, self.inner = outer, inner
        _mark_complex(self, outer, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return self.outer(self.inner(x))


class LinearComposition(LinearOperator):
    """``x -> outer(inner(x))`` of linear operators; has an SVD where one of the two is a multiple of the identity."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        super().__init__(inner.in_shape, outer.out_shape)
        self.outer, self.inner = outer, inner
        _mark_complex(self, outer, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply both adjoints, the outer first."""
        return self.inner.adjoint(self.outer.adjoint(y))

    @property
    def svd(self) -> SVD | None:
        """The SVD of the operator that is not a multiple of the identity, scaled."""
        for scale, rest in ((self.inner, self.outer), (self.outer, self.inner)):
            if isinstance(scale, Scale):
                return rest.svd and rest.svd.scaled(scale.factor)
        return None

    def norm(self) -> float:
        """Largest singular value; exact where one operator is a multiple of the identity."""
        for scale, rest in ((self.inner, self.outer), (self.outer, self.inner)):
            if isinstance(scale, Scale):
                return abs(scale.factor) * rest.norm()
        return super().norm()


def _mark_complex(composed: Operator, outer: Operator, inner: Operator) -> None:
    """Set complex_output where it is True: linear and affine maps keep complex numbers, any other says so itself."""
    if outer.complex_output or (inner.complex_output and isinstance(outer, (LinearOperator, Affine))):
        composed.complex_output = True


def compose(outer: Operator, inner: Operator) -> Operator:
    """``outer @ inner``, linear if both are.

    Raises
    ------
    ShapeError
        If the inner operator's output is not the outer operator's input.
    """
    if inner.out_shape != outer.in_shape:
        raise ShapeError(
            f"Cannot compose: the inner {type(inner).__name__} gives {inner.out_shape}, "
            f"the outer {type(outer).__name__} takes {outer.in_shape}."
        )
    if isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator):
        return LinearComposition(outer, inner)
    return Composition(outer, inner)
