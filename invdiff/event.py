"""What is unknown: the event, a tuple of named variables with dimensions, shapes, units and coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from invdiff.errors import InputError, ShapeError


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One named unknown on its own grid.

    Parameters
    ----------
    name
        Name of the variable in results, e.g. ``"image"`` or ``"u10"``.
    dims
        Names of the axes after the draws, e.g. ``("channel", "y", "x")``.
    shape
        Their lengths.
    units
        CF units of the values; ``"1"`` for dimensionless, as images in [0, 1] are.
    coords
        Coordinate values by dimension name; a dimension without an entry is counted from zero.

    Raises
    ------
    ShapeError
        If ``dims`` and ``shape`` or a coordinate and its dimension disagree in length.
    InputError
        If an axis is named twice, like the variable, or like an axis of the draws.
    """

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    units: str = "1"
    coords: Mapping[str, tuple[float | str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.shape):
            raise ShapeError(
                f"Variable {self.name!r} has dims {self.dims} but shape {self.shape}; give one name an axis."
            )
        taken = {self.name, "chain", "draw", "particle"} & set(self.dims)
        if taken or len(set(self.dims)) != len(self.dims):
            raise InputError(
                f"Variable {self.name!r} has dims {self.dims}; they must differ from each other, from its name, "
                "and from chain, draw and particle."
            )
        for dim, values in self.coords.items():
            if dim not in self.dims:
                raise ShapeError(f"Variable {self.name!r} has coordinates for {dim!r}, which is not among {self.dims}.")
            if len(values) != self.shape[self.dims.index(dim)]:
                raise ShapeError(
                    f"Variable {self.name!r} has {len(values)} coordinates along {dim!r}, "
                    f"but its length there is {self.shape[self.dims.index(dim)]}."
                )

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


Event = tuple[Variable, ...]


def image_event(shape: tuple[int, ...], name: str = "image") -> Event:
    """Event of a picture of shape (c, h, w) with values in [0, 1]."""
    return (Variable(name=name, dims=("channel", "y", "x"), shape=tuple(shape)),)


def plain_event(shape: tuple[int, ...], name: str = "x") -> Event:
    """Event of any shape: a picture if it has three axes, else numbered axes."""
    if len(shape) == 3:
        return image_event(shape)
    return (Variable(name=name, dims=tuple(f"dim_{i}" for i in range(len(shape))), shape=tuple(shape)),)


def check_agreement(problem: Event, prior: Event) -> None:
    """Raise ShapeError unless the problem's and the prior's events agree in order, shapes and units."""
    ours, theirs = [(v.shape, v.units) for v in problem], [(v.shape, v.units) for v in prior]
    if ours != theirs:
        raise ShapeError(
            "The problem and the prior speak of different unknowns: the problem has "
            f"{[(v.name, v.shape, v.units) for v in problem]}, "
            f"the prior {[(v.name, v.shape, v.units) for v in prior]}. "
            "Use prior.at(shape) for the prior on the problem's grid, or build the operator for the prior's shape."
        )
