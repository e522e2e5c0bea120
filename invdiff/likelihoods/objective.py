"""A control objective as a likelihood."""

from collections.abc import Callable, Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from invdiff.errors import CapabilityError, InputError
from invdiff.likelihoods.base import Likelihood


@final
class Objective(Likelihood):
    """A control objective as a likelihood, ``exp(-J(x) / temperature)`` (Levine 2018, arXiv 1805.00909).

    Parameters
    ----------
    objective
        J: (n, *in_shape) -> (n,), bounded below by 0, in the objective's units.
    temperature
        Positive, in the objective's units; the lower, the closer the draws lie to a minimiser.
    in_shape
        Shape of one x.
    """

    def __init__(self, objective: Callable[[Tensor], Tensor], temperature: float, in_shape: tuple[int, ...]) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"The temperature must be positive, got {temperature}.")
        self.objective, self.temperature, self.in_shape = objective, float(temperature), tuple(in_shape)

    @property
    def problems(self) -> int:
        """One objective."""
        return 1

    @property
    def measurements(self) -> int:
        """One number."""
        return 1

    def log_prob(self, x: Tensor) -> Float[Tensor, " n"]:
        """-J / temperature; its normalising constant is not known."""
        return -self.objective(x) / self.temperature

    def deviance(self, x: Tensor) -> Float[Tensor, " n"]:
        """2 J / temperature."""
        return -2.0 * self.log_prob(x)

    def rows(self, index: Tensor) -> "Objective":  # noqa: ARG002 one objective serves all rows
        """Itself."""
        return self

    @classmethod
    def stack(cls, parts: Sequence["Objective"]) -> "Objective":
        """Return the one objective, if it is one."""
        if any(p is not parts[0] for p in parts[1:]):
            raise CapabilityError("Several objectives cannot run together; solve them one by one.")
        return parts[0]
