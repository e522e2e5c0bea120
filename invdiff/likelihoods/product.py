"""Several independent measurements of one unknown."""

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.likelihoods.base import Likelihood


@final
class Product(Likelihood):
    """Several independent measurements of one unknown: the log-densities add up.

    Parameters
    ----------
    factors
        Likelihoods over the same in_shape with the same number of problems (or one).
    """

    def __init__(self, factors: Sequence[Likelihood]) -> None:
        super().__init__()
        if not factors or len({f.in_shape for f in factors}) != 1:
            raise ShapeError(
                f"Product needs at least one factor and one in_shape, got {[f.in_shape for f in factors]}."
            )
        if len({f.problems for f in factors} - {1}) > 1:
            raise ShapeError(f"The factors hold different numbers of problems: {[f.problems for f in factors]}.")
        self.factors, self.in_shape = nn.ModuleList(factors), factors[0].in_shape

    def _parts(self) -> list[Likelihood]:
        return [f for f in self.factors if isinstance(f, Likelihood)]

    @property
    def problems(self) -> int:
        """Number of measurements held."""
        return max(f.problems for f in self._parts())

    @property
    def measurements(self) -> int:
        """Number of real values in one measurement, all factors together."""
        return sum(f.measurements for f in self._parts())

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Sum of the factors' log-densities."""
        return torch.stack([f.log_prob(x) for f in self._parts()]).sum(0)

    def log_prob_and_grad(self, x: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
        """Sum the factors' log-densities and gradients."""
        values, grads = zip(*(f.log_prob_and_grad(x) for f in self._parts()), strict=True)
        return torch.stack(values).sum(0), torch.stack(grads).sum(0)

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Sum of the factors' deviances."""
        return torch.stack([f.deviance(x) for f in self._parts()]).sum(0)

    def rows(self, index: Tensor) -> "Product":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        return Product([f.rows(index) for f in self._parts()])

    @classmethod
    def stack(cls, parts: Sequence["Product"]) -> "Product":
        """One likelihood with the measurements of all parts, factor by factor."""
        if len({len(p.factors) for p in parts}) != 1:
            raise InputError("Problems that run together have equally many factors; these have not.")
        columns = list(zip(*(p._parts() for p in parts), strict=True))
        if any(len({type(f) for f in column}) != 1 for column in columns):
            raise InputError(
                "Problems that run together have the same kinds of factors in the same order; these have not."
            )
        return cls([column[0].stack(list(column)) for column in columns])
