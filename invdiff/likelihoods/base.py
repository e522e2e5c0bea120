"""The contract of a likelihood: how probable a measurement is, given the unknown in physical units.

A likelihood may hold several measurements made with one operator (the leading axis of ``measurement``); `rows` picks
the measurement that belongs to each particle, so that many problems run as one batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Likelihood(nn.Module, ABC):
    """``log p(y | x)`` as a function of x, for one or several measurements y."""

    in_shape: tuple[int, ...]

    @property
    @abstractmethod
    def problems(self) -> int:
        """Number of measurements held."""

    @property
    @abstractmethod
    def measurements(self) -> int:
        """Number of real values in one measurement."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Normalised log-density of the measurement at x of shape (n, *in_shape), physical units."""

    def log_prob_and_grad(self, x: Tensor) -> tuple[Float[Tensor, " n"], Tensor]:
        """Log-density and its gradient with respect to x, the latter of x's shape."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.log_prob(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad

    @abstractmethod
    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Twice the log-density lost against a perfect fit; a chi-square for Gaussian noise. Non-negative."""

    @abstractmethod
    def rows(self, index: Tensor) -> Self:
        """Return the likelihood whose row i holds measurement ``index[i]``."""

    @classmethod
    @abstractmethod
    def stack(cls, parts: Sequence[Self]) -> Self:
        """One likelihood with the measurements of all parts, which must share everything else (InputError if not)."""
