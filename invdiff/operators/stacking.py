"""Several measurements of one truth, as one operator: ``x -> (A_1 x, A_2 x, ...)``."""

from collections.abc import Sequence
from math import prod
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.operators.base import SVD, LinearOperator, Operator


class Stack(Operator):
    """Outputs of several operators on one input, flattened and joined to one vector; made by `stack`.

    `join` makes such a vector of the parts' measurements, `split` takes it apart. Parts with noise of different size
    are a Gaussian likelihood with a diagonal, which `repeat` makes::

        A = operators.stack([blur, mask])
        y = A.join([y_blur[None], y_mask[None]])
        likelihood = likelihoods.Gaussian(A, y, noise_std=A.repeat([0.01, 0.1]))

    Parameters
    ----------
    operators
        Operators of one input shape, at least one. Their outputs are all real, or all complex.

    Raises
    ------
    InputError
        If there is no operator, or some outputs are real and others complex.
    ShapeError
        If their input shapes differ.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        parts = list(operators)
        if not parts:
            raise InputError("A stack needs at least one operator, got none.")
        if any(A.in_shape != parts[0].in_shape for A in parts):
            listing = ", ".join(f"{type(A).__name__} {A.in_shape}" for A in parts)
            raise ShapeError(
                f"Stacked operators measure one truth, so they take one input shape; got {listing}. "
                "Put a Crop or a Downsampling before those that see less of it, with @."
            )
        if len({A.complex_output for A in parts}) > 1:
            raise InputError(
                "Some of the stacked operators give complex outputs, others real ones; write those so that they "
                "give the real and the imaginary part as two channels."
            )
        sizes = tuple(prod(A.out_shape) for A in parts)
        super().__init__(parts[0].in_shape, (sum(sizes),))
        if parts[0].complex_output:
            self.complex_output = True
        self.sizes = sizes
        self.operators = nn.ModuleList(parts)

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.sizes)

    @property
    def parts(self) -> tuple[Operator, ...]:
        """The stacked operators."""
        return tuple(cast(Operator, A) for A in self.operators)

    def forward(self, x: Tensor) -> Tensor:
        r"""Measure with all: (n, \*in_shape) -> (n, size), the sum of the parts' sizes."""
        return torch.cat([A(x).flatten(1) for A in self.parts], 1)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        r"""Parts of a measurement in their own shapes: (n, size) -> (n, \*out_shape) for each.

        Raises
        ------
        ShapeError
            If y is not (n, size).
        """
        if y.ndim != 2 or y.shape[1] != self.out_shape[0]:
            raise ShapeError(f"A stack splits measurements of shape (n, {self.out_shape[0]}), got {tuple(y.shape)}.")
        pieces = torch.split(y, list(self.sizes), 1)
        return tuple(piece.reshape(-1, *A.out_shape) for A, piece in zip(self.parts, pieces, strict=True))

    def join(self, measurements: Sequence[Tensor]) -> Tensor:
        r"""Make one measurement (n, size) of one (n, \*out_shape) for each part: the inverse of `split`.

        Raises
        ------
        ShapeError
            If a measurement does not fit its operator, or there are not as many as parts.
        """
        given, needed = [tuple(y.shape) for y in measurements], [A.out_shape for A in self.parts]
        if [s[1:] for s in given] != needed or len({s[:1] for s in given}) != 1:
            raise ShapeError(f"A stack joins measurements (n, *shape) of shapes {needed}, with one n; got {given}.")
        return torch.cat([y.flatten(1) for y in measurements], 1)

    def repeat(self, values: Sequence[float | Tensor]) -> Float[Tensor, " size"]:
        """Vector (size,) in float64 that holds one value for each part, e.g. the standard deviation of its noise.

        Parameters
        ----------
        values
            One for each part: a number, or a tensor that broadcasts to the part's output.

        Raises
        ------
        ShapeError
            If there are not as many values as parts, or one does not broadcast.
        """
        if len(values) != len(self):
            raise ShapeError(f"repeat needs one value for each of the {len(self)} parts, got {len(values)}.")
        pieces = []
        for A, value in zip(self.parts, values, strict=True):
            v = torch.as_tensor(value, dtype=torch.float64)
            try:
                pieces.append(v.broadcast_to(A.out_shape).flatten())
            except RuntimeError as error:
                raise ShapeError(
                    f"A value of shape {tuple(v.shape)} does not broadcast to the output {A.out_shape} of "
                    f"{type(A).__name__}."
                ) from error
        return torch.cat(pieces)


@final
class LinearStack(Stack, LinearOperator):
    r"""A stack of linear operators; its adjoint is the sum of theirs, ``A^T y = sum_i A_i^T y_i``.

    There is no SVD, since the parts' bases differ, but for one operator alone; the norm, between the largest of the
    parts' and the root of the sum of their squares, is found by power iteration.
    """

    def adjoint(self, y: Tensor) -> Tensor:
        r"""Sum of the parts' adjoints: (n, size) -> (n, \*in_shape)."""
        terms = (A.adjoint(piece) for A, piece in zip(self._linear, self.split(y), strict=True))
        return sum(terms, next(terms))

    @property
    def _linear(self) -> tuple[LinearOperator, ...]:
        return cast(tuple[LinearOperator, ...], self.parts)

    @property
    def svd(self) -> SVD | None:
        """The SVD of one operator alone, else None."""
        svd = self._linear[0].svd if len(self) == 1 else None
        if svd is None:
            return None
        (part,) = self._linear
        u, u_adjoint = svd.u, svd.u_adjoint
        return SVD(
            svd.singular_values,
            lambda c: u(c).flatten(1),
            lambda y: u_adjoint(y.reshape(-1, *part.out_shape)),
            svd.v,
            svd.v_adjoint,
        )

    def norm(self) -> float:
        """Largest singular value."""
        return self._linear[0].norm() if len(self) == 1 else super().norm()


def stack(operators: Sequence[Operator]) -> Stack:
    """Several measurements of one truth as one operator, a `LinearStack` if all are linear.

    Parameters
    ----------
    operators
        Operators of one input shape, at least one.

    Raises
    ------
    InputError
        If there is no operator, or some outputs are real and others complex.
    ShapeError
        If their input shapes differ.
    """
    parts = list(operators)
    return LinearStack(parts) if all(isinstance(A, LinearOperator) for A in parts) else Stack(parts)
