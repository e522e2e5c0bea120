"""Operators to and from deepinv's `Physics`.

deepinv adds noise in ``physics(x)``; an invdiff operator is noiseless, as ``physics.A``, and the noise belongs to the
likelihood. So noise and sensor models are not carried over, in either direction.
"""

from typing import Any, cast

import torch
from torch import Tensor

from invdiff.errors import CapabilityError
from invdiff.operators.base import LinearOperator, Operator


def to_deepinv(operator: Operator) -> Any:
    """Make a deepinv physics that computes with an invdiff operator.

    Parameters
    ----------
    operator
        Any operator. A linear one becomes a `deepinv.physics.LinearPhysics` with the operator's adjoint and proximal
        step, and with an exact pseudo-inverse where it has an SVD; any other becomes a `deepinv.physics.Physics`.

    Returns
    -------
    deepinv.physics.Physics
        Noiseless; holds the operator itself as ``physics.operator``, which moves with it.
    """
    import deepinv

    if not isinstance(operator, LinearOperator):
        physics = deepinv.physics.Physics(A=lambda x, **_: operator(x))
        physics.operator = operator
        return physics
    linear = operator

    class OperatorPhysics(deepinv.physics.LinearPhysics):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(img_size=linear.in_shape)
            self.operator = linear

        def A(self, x: Tensor, **_: Any) -> Tensor:
            return self.operator(x)

        def A_adjoint(self, y: Tensor, **_: Any) -> Tensor:
            return self.operator.adjoint(y)

        def prox_l2(self, z: Tensor | float | None, y: Tensor, gamma: float | Tensor, *_: Any, **__: Any) -> Tensor:
            start = (
                z
                if isinstance(z, Tensor)
                else torch.full_like(self.operator.adjoint(y), 0.0 if z is None else float(z))
            )
            # deepinv passes one gamma a picture as (n, 1, 1, 1).
            weight = gamma.reshape(-1) if isinstance(gamma, Tensor) and gamma.numel() > 1 else float(gamma)
            return self.operator.prox(start, y, weight)

        def A_dagger(self, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            svd = self.operator.svd
            if svd is None:
                return cast(Tensor, super().A_dagger(y, *args, **kwargs))
            c = svd.u_adjoint(y)
            s = svd.singular_values.to(device=c.device, dtype=c.real.dtype if c.is_complex() else c.dtype)
            null = s <= 10 * torch.finfo(s.dtype).eps * s.max()
            return svd.v(c * torch.where(null, 0.0, 1.0 / torch.where(null, 1.0, s)))

    return OperatorPhysics()


def from_deepinv(physics: Any, shape: tuple[int, ...]) -> Operator:
    """Operator that computes with a deepinv physics.

    Parameters
    ----------
    physics
        A `deepinv.physics.Physics`; a `LinearPhysics` gives a LinearOperator, whose adjoint is ``physics.A_adjoint``.
        It keeps its own dtype and device: move the operator, and the physics moves with it.
    shape
        Shape of one input, without the batch. The output's shape, and whether it is complex, is found by one
        call on zeros.

    Raises
    ------
    CapabilityError
        If the argument is not a physics, or its measurement is not one tensor (stacked physics: make an operator of
        each, and a `likelihoods.Product`).
    """
    import deepinv

    if not isinstance(physics, deepinv.physics.Physics):
        raise CapabilityError(f"from_deepinv takes a deepinv.physics.Physics, got {type(physics).__name__}.")
    inner = getattr(physics, "operator", None)
    if isinstance(inner, Operator) and inner.in_shape == tuple(shape):
        return inner
    tensors = [t for t in [*physics.parameters(), *physics.buffers()] if t.is_floating_point()]
    like = tensors[0] if tensors else torch.zeros(())
    with torch.no_grad():
        y = physics.A(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))
    if not isinstance(y, Tensor):
        raise CapabilityError(
            f"{type(physics).__name__} measures a {type(y).__name__}, not one tensor; "
            "make an operator of each part and use a Product of likelihoods."
        )
    kind = DeepinvLinear if isinstance(physics, deepinv.physics.LinearPhysics) else DeepinvOperator
    operator = kind(physics, tuple(shape), tuple(y.shape[1:]))
    if y.is_complex():
        operator.complex_output = True
    return operator


class DeepinvOperator(Operator):
    """A deepinv physics as an operator; made by `from_deepinv`."""

    def __init__(self, physics: Any, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, out_shape)
        self.physics = physics

    def forward(self, x: Tensor) -> Tensor:
        """Apply ``physics.A``, without noise."""
        return cast(Tensor, self.physics.A(x))


class DeepinvLinear(LinearOperator):
    """A linear deepinv physics as a linear operator; made by `from_deepinv`."""

    def __init__(self, physics: Any, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> None:
        super().__init__(in_shape, out_shape)
        self.physics = physics

    def forward(self, x: Tensor) -> Tensor:
        """Apply ``physics.A``, without noise."""
        return cast(Tensor, self.physics.A(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply ``physics.A_adjoint``."""
        return cast(Tensor, self.physics.A_adjoint(y))
