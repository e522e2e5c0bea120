"""Symbols through a noisy channel that may lose some of them."""

from collections.abc import Sequence
from math import log
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from invdiff.errors import InputError, ShapeError
from invdiff.likelihoods.base import Likelihood
from invdiff.likelihoods.measurements import flat_sum, pick


@final
class SymmetricChannel(Likelihood):
    r"""Symbols of a sequence, each read wrong with the same probability, as any other symbol; some are not read at all.

    ``p(y_i | x) = (1 - f) x_i(y_i) + f / (V - 1) (1 - x_i(y_i))`` for one-hot vectors x_i, and 1 where nothing was
    read. Taken as linear in x_i between one-hot vectors it is the expectation under the law x_i, so that a plugged-in
    mean of independent tokens is an exact guess of the likelihood of incomplete sequences.

    Parameters
    ----------
    measurement
        Symbols that were read, int64 in [0, V], V where none was; shape (length,) or (problems, length).
    vocabulary_size
        V, at least 2.
    error_rate
        f, probability of a wrong symbol, in [0, 1 - 1 / V).

    Raises
    ------
    ShapeError
        If the measurement is not one sequence or several.
    InputError
        If it holds other values, or a setting lies out of its range.
    """

    measurement: Tensor

    def __init__(self, measurement: Tensor, vocabulary_size: int, error_rate: float) -> None:
        super().__init__()
        if vocabulary_size < 2 or not 0.0 <= error_rate < 1.0 - 1.0 / vocabulary_size:
            raise InputError(
                f"A channel has two symbols or more and errs in [0, 1 - 1 / V), since beyond it the symbol that is "
                f"read would be the least likely; got vocabulary_size={vocabulary_size}, error_rate={error_rate}."
            )
        y = measurement[None] if measurement.ndim == 1 else measurement
        if y.ndim != 2 or y.numel() == 0:
            raise ShapeError(f"Symbols have shape (length,) or (problems, length), got {tuple(measurement.shape)}.")
        if y.dtype != torch.int64 or bool((y < 0).any()) or bool((y > vocabulary_size).any()):
            raise InputError(
                f"Symbols are int64 in [0, {vocabulary_size}], {vocabulary_size} where none was read; got {y.dtype}"
                f" from {y.min().item()} to {y.max().item()}."
            )
        self.vocabulary_size, self.error_rate = vocabulary_size, float(error_rate)
        self.in_shape = (y.shape[1], vocabulary_size)
        self.register_buffer("measurement", y.clone())

    @property
    def problems(self) -> int:
        """Number of sequences held."""
        return len(self.measurement)

    @property
    def measurements(self) -> int:
        """Number of symbols in one sequence, those that were not read among them."""
        return self.in_shape[0]

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """Log-probability of the symbols at one-hot vectors, or laws, x (n, length, V).

        Raises
        ------
        ShapeError
            If x has another shape.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise ShapeError(f"The channel takes one-hot vectors (n, *{self.in_shape}), got {tuple(x.shape)}.")
        y = self.measurement.expand(len(x), -1)
        agree = x.gather(2, y.clamp_max(self.vocabulary_size - 1)[..., None])[..., 0]
        other = self.error_rate / (self.vocabulary_size - 1)
        p = other + (1.0 - self.error_rate - other) * agree
        return flat_sum(torch.log(torch.where(y < self.vocabulary_size, p, 1.0)))

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """Twice the log-probability lost against symbols that all agree."""
        read = (self.measurement < self.vocabulary_size).sum(1).double()
        return (2.0 * (read * log(1.0 - self.error_rate) - self.log_prob(x))).clamp_min(0.0)

    def rows(self, index: Tensor) -> "SymmetricChannel":
        """Return the likelihood whose row i holds measurement ``index[i]``."""
        if self.problems == 1:
            return self
        new = SymmetricChannel.__new__(SymmetricChannel)  # a look at the symbols would wait for the device
        nn.Module.__init__(new)
        new.vocabulary_size, new.error_rate, new.in_shape = self.vocabulary_size, self.error_rate, self.in_shape
        new.register_buffer("measurement", pick(self.measurement, index))
        return new

    @classmethod
    def stack(cls, parts: Sequence["SymmetricChannel"]) -> "SymmetricChannel":
        """One likelihood with the measurements of all parts."""
        if any((p.in_shape, p.error_rate) != (parts[0].in_shape, parts[0].error_rate) for p in parts[1:]):
            raise InputError("Problems that run together share length, symbols and error rate. Solve them one by one.")
        return cls(torch.cat([p.measurement for p in parts]), parts[0].vocabulary_size, parts[0].error_rate)
