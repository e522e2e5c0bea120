"""The contract of a measurement operator: A, its adjoint and, where they exist, its norm, SVD and proximal step."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from invdiff.errors import ShapeError


@dataclass(frozen=True)
class SVD:
    r"""A fast diagonalisation A = U S V^H.

    `v_adjoint` maps a batch of inputs to coefficients and `u_adjoint` a batch of outputs to the same coefficients; both
    are co-isometries on the space where ``singular_values`` is not zero. Coefficients may be complex (Fourier), or more
    than there are real degrees of freedom; functions of A^T A and A A^T act through them exactly:
    ``f(A^T A) x = V f(S^2) V^H x`` needs ``V V^H = 1``, ``f(A A^T) y = U f(S^2) U^H y`` needs ``U U^H = 1``.

    Parameters
    ----------
    singular_values
        Non-negative reals; broadcast against a coefficient batch without its leading axis.
    u, u_adjoint, v, v_adjoint
        Maps between coefficient batches and output or input batches.
    """

    singular_values: Tensor
    u: Callable[[Tensor], Tensor]
    u_adjoint: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    v_adjoint: Callable[[Tensor], Tensor]

    def scaled(self, factor: float) -> "SVD":
        """SVD of ``factor * A`` for a factor that is not zero."""
        sign = 1.0 if factor > 0 else -1.0
        u, u_adjoint = self.u, self.u_adjoint
        return SVD(
            self.singular_values * abs(factor),
            lambda c: sign * u(c),
            lambda y: sign * u_adjoint(y),
            self.v,
            self.v_adjoint,
        )

    def gram(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(A^T A) x for f acting on the squared singular values."""
        c = self.v_adjoint(x)
        return self.v(f(self._squared(c)) * c)

    def outer(self, f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """f(A A^T) y for f acting on the squared singular values."""
        c = self.u_adjoint(y)
        return self.u(f(self._squared(c)) * c)

    def _squared(self, like: Tensor) -> Tensor:
        # In the coefficients' own precision and place: float64 values must not promote a float32 computation.
        return self.singular_values.to(device=like.device, dtype=like.dtype.to_real()) ** 2


class Operator(nn.Module, ABC):
    """A measurement operator from real inputs (n, *in_shape) to outputs (n, *out_shape).

    Parameters
    ----------
    in_shape, out_shape
        Shapes of one input and one output, without the leading axis of draws.

    Attributes
    ----------
    complex_output
        Whether the outputs for real inputs are complex; False unless an operator says so. A likelihood refuses a
        measurement of the other kind.
    differentiable
        Whether autograd passes through it; False for a model that runs elsewhere, e.g. compiled code. Samplers that
        need its gradient then refuse the problem, and `invdiff.solve` takes one that does not.
    """

    complex_output: bool = False
    differentiable: bool = True

    def __init__(self, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_shape, self.out_shape = tuple(in_shape), tuple(out_shape)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply A: (n, *in_shape) -> (n, *out_shape)."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply A after a check of the shape."""
        if tuple(x.shape[1:]) != self.in_shape:
            raise ShapeError(
                f"{type(self).__name__} takes inputs of shape (n, {', '.join(map(str, self.in_shape))}), "
                f"got {tuple(x.shape)}."
            )
        return cast(Tensor, super().__call__(x, *args, **kwargs))

    def __matmul__(self, other: "Operator") -> "Operator":
        """Composition: ``(A @ B)(x) = A(B(x))``; linear if both are."""
        from invdiff.operators.composition import compose

        return compose(self, other)


class LinearOperator(Operator):
    """A linear operator: ``forward`` and ``adjoint`` are each other's transpose in the Euclidean inner product."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Apply A^T: (n, *out_shape) -> (n, *in_shape)."""

    @property
    def svd(self) -> SVD | None:
        """The fast diagonalisation, or None where there is none."""
        return None

    def norm(self) -> float:
        """Largest singular value: from the SVD if there is one, else by power iteration to a relative 1e-6.

        Power iteration starts from a fixed vector, so that the result repeats; it approaches the norm from below.
        """
        if self.svd is not None:
            return float(self.svd.singular_values.max())
        like = next((b for b in [*self.parameters(), *self.buffers()] if b.is_floating_point()), torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *self.in_shape, generator=generator, dtype=torch.float64).to(like.device)
        x = x.to(like.dtype)
        value = 0.0
        with torch.no_grad():
            for _ in range(500):
                x = x / x.norm()
                x = self.adjoint(self.forward(x))
                previous, value = value, float(x.norm())
                if abs(value - previous) <= 1e-6 * value:
                    break
        return float(value**0.5)

    def prox(self, x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
        r"""Proximal step of the data term: ``argmin_z weight / 2 |A z - y|^2 + 1 / 2 |z - x|^2``.

        Closed form through the SVD where there is one, else conjugate gradients on the normal equations.

        Parameters
        ----------
        x, y
            Points (n, *in_shape) and measurements (n, *out_shape).
        weight
            Positive; a scalar, or a tensor (n,).
        """
        from invdiff.operators.solvers import conjugate_gradient

        def along(ndim: int) -> float | Tensor:
            # A number stays one: as a tensor it would have to be copied to the device, which waits for all work there.
            if not isinstance(weight, Tensor):
                return float(weight)
            return weight.to(x).reshape(-1, *[1] * ndim) if weight.ndim else weight.to(x)

        w, svd = along(len(self.in_shape)), self.svd
        b = x + w * self.adjoint(y)
        if svd is not None:
            return svd.gram(lambda s2: 1.0 / (1.0 + along(s2.ndim) * s2), b)
        return conjugate_gradient(lambda z: z + w * self.adjoint(self.forward(z)), b, start=x)


def fingerprint(module: nn.Module) -> str:
    """Hash of a module's class, plain settings and tensors: equal for equal operators and likelihoods."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    for name, value in sorted(vars(module).items()):
        if (
            not name.startswith("_")
            and isinstance(value, (bool, int, float, str, tuple, type(None)))
            and name != "training"
        ):
            digest.update(f"{name}={value!r};".encode())
    for name, tensor in sorted([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if tensor.ndim
            else repr(tensor.item()).encode()
        )
    for name, child in sorted(module.named_children()):
        digest.update(f"{name}({fingerprint(child)})".encode())
    return digest.hexdigest()
