"""What problems of all equations share that are made from cards: one case, and sensors of its state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from invdiff.errors import InputError
from invdiff.event import Event
from invdiff.noise import Noise
from invdiff.operators.base import LinearOperator
from invdiff.pde.burgers_control import picked

if TYPE_CHECKING:
    from invdiff.card_equations import EquationTable, SensorsTable


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class TrajectoryCase:
    r"""A case of an equation without forcing.

    Parameters
    ----------
    event
        The unknown: each variable of the state over time and x.
    truth
        The case's own trajectory, as the event's variables stand behind one tensor: (states, points) of one variable,
        flat of several, one after the other.
    known
        What a problem may give, by name: "initial", (\*variables, points), and "state", (\*variables, states, points).
    """

    event: Event
    truth: Tensor
    known: Mapping[str, Tensor]


def only_case(card: "EquationTable", index: int) -> range:
    """Return the range of one case of a card's section ``[equation]``; InputError if it has no such case."""
    if not 0 <= index < card.cases:
        raise InputError(f"The card has the cases 0 to {card.cases - 1}, got index {index}.")
    return range(index, index + 1)


def replaced(card: "EquationTable", names: Sequence[str]) -> dict[str, Any]:
    """Return what a card's section ``[equation]`` says in place of its setting."""
    return {name: getattr(card, name) for name in names if getattr(card, name) is not None}


def state_sensors(card: "SensorsTable", event: Event, key: int) -> LinearOperator:
    """Read states in some cells at some times: trajectories to (variables * times * cells,), time by time.

    Parameters
    ----------
    card
        The card's section ``[sensors]``.
    event
        The unknown. Variables over time and x, all on one grid, are read; others, such as a forcing, are not.
    key
        Of the stream that places the sensors, in different cells; the same for all variables and times.

    Raises
    ------
    InputError
        If there are more sensors than cells, or no state is read.
    """
    states, points = event[0].shape
    count, last = card.count or points, states - 1 if card.last is None else card.last
    times = range(card.first, last + 1, card.every)
    if count > points or last >= states or not times:
        raise InputError(
            f"Sensors stand in at most {points} cells and read the states 0, the initial one, to {states - 1}; got "
            f"{count} sensors read from {card.first} to {last}."
        )
    noise = Noise([key], 1, dtype=torch.float64)
    cells = noise.uniform(noise.slots, (points,))[0].argsort()[:count]
    read = torch.zeros(states, points, dtype=torch.bool)
    read[torch.tensor(times)[:, None], cells] = True
    rows = [read if v.dims == ("time", "x") else torch.zeros(v.shape, dtype=torch.bool) for v in event]
    return picked(torch.cat(rows), event[0].shape if len(event) == 1 else None)
