"""Problems of Burgers' equation from cards: the case, its event and cost, and the judge of a forcing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from invdiff.errors import InputError
from invdiff.event import Event
from invdiff.pde.burgers_control import BurgersCost
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases
from invdiff.pde.trajectory_cases import only_case, replaced
from invdiff.pde.trajectory_files import Axis, Trajectories

if TYPE_CHECKING:
    from invdiff.card_equations import BurgersTable, ControlTable

_REPLACED = ("points", "windows", "duration", "viscosity", "narrow", "scale")


def burgers_trajectories(setting: BurgersSetting, indices: range, *, seed: int = 0, refine: int = 4) -> Trajectories:
    """Solve random cases.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        As for `burgers_cases`; 0 is for training, 1 is held out.
    refine
        The solver's cells in a cell of the control grid.

    Returns
    -------
    Trajectories
        "state" (windows + 1, points) over time and x, and "forcing" (windows, points) over window and x, float64, in
        the units of the equation, which has none.
    """
    initial, forcing = burgers_cases(setting, indices, seed=seed)
    with torch.no_grad():
        state = setting.solver(refine)(initial, forcing)
    times = torch.linspace(0.0, setting.duration, setting.windows + 1, dtype=torch.float64)
    x = torch.linspace(0.0, 1.0, setting.points + 1, dtype=torch.float64)
    return Trajectories(
        values={"state": state, "forcing": forcing},
        dims={"state": ("time", "x"), "forcing": ("window", "x")},
        axes={"time": Axis(values=times), "window": Axis.between(times), "x": Axis.between(x)},
        cases=indices,
        attributes={
            "equation": "Burgers",
            "viscosity": setting.viscosity,
            "boundary": "wall",
            "seed": seed,
            "refine": refine,
            "setting": repr(setting),
        },
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class BurgersCase:
    """A case of a card.

    Parameters
    ----------
    setting
        Grid and law.
    initial
        Averages at the start, (points,).
    state, forcing
        The case's own, (windows + 1, points) and (windows, points).
    """

    setting: BurgersSetting
    initial: Float64[Tensor, " points"]
    state: Float64[Tensor, "states points"]
    forcing: Float64[Tensor, "windows points"]

    @property
    def event(self) -> Event:
        """The unknown: "state" and "forcing"."""
        return self.setting.event

    @property
    def truth(self) -> Float64[Tensor, " size"]:
        """State and forcing, flat, as the event's variables stand behind one tensor."""
        return torch.cat((self.state.flatten(), self.forcing.flatten()))

    @property
    def known(self) -> Mapping[str, Tensor]:
        """What a problem may give, by name; states are zero in cells that are not seen."""
        states = {"initial": self.initial, "target": self.state[-1], "state": self.state}
        seen = self.setting.observed
        return {name: torch.where(seen, u, 0.0) for name, u in states.items()} | {"forcing": self.forcing}


def burgers_case(card: "BurgersTable", index: int) -> BurgersCase:
    """Make and solve a case of a card's section ``[equation]``.

    Raises
    ------
    CatalogueError
        If there is no such setting.
    InputError
        If there is no case of that index.
    """
    one = only_case(card, index)
    setting = replace(BurgersSetting.named(card.setting, card.partial), **replaced(card, _REPLACED))
    solved = burgers_trajectories(setting, one, seed=card.seed, refine=card.refine)
    state, forcing = (value[0] for value in solved.values.values())
    # The solver's first state is that of the case to rounding; who solves again must begin where it began.
    initial, _ = burgers_cases(setting, one, seed=card.seed)
    return BurgersCase(setting=setting, initial=initial[0], state=state, forcing=forcing)


def burgers_cost(card: "ControlTable", case: BurgersCase, refine: int) -> BurgersCost:
    """Cost of a forcing: from the case's initial state, in full, to where its own forcing leads."""
    setting = case.setting
    return BurgersCost(
        setting.solver(refine),
        case.initial,
        case.state[-1],
        weight=card.weight,
        observed=setting.observed,
        controlled=setting.controlled,
    )


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class BurgersScore:
    """What forcings cost, as the judge's solver has it.

    Parameters
    ----------
    J
        Misfit and weighted energy, (n,).
    misfit
        Mean squared distance of the final state from the target over the observed cells, (n,).
    energy
        Sum of the squared forcing, (n,).
    """

    J: Tensor
    misfit: Tensor
    energy: Tensor


def burgers_judge(card: Mapping[str, Any], forcing: Float[Tensor, "n windows points"]) -> BurgersScore:
    """Judge forcings by the solver of a problem's card, whatever the problem was solved with.

    The case is made anew from the card, so that neither a method's idea of the final state nor a coarser solver has a
    say: ``burgers_judge(problem.card, solution.draws["forcing"])``. In cells that are not controlled a forcing counts
    as zero.

    Parameters
    ----------
    card
        ``problem.card``, or the same from a solution's provenance: a problem of control.
    forcing
        Drawn or found; computed in float64.

    Raises
    ------
    InputError
        If the card is none of control of Burgers' equation.
    ShapeError
        If the forcing does not have the grid's shape.
    SolverError
        If a forcing leads to a state that is not finite.
    """
    from invdiff.card_equations import BurgersTable, EquationCard
    from invdiff.card_models import validate

    values = {name: value for name, value in card.items() if name not in ("index", "hash")}
    found = validate(values, "problems", "the problem's card")
    table = found.equation if isinstance(found, EquationCard) else None
    control = found.control if isinstance(found, EquationCard) else None
    if not isinstance(table, BurgersTable) or control is None:
        raise InputError(f"Problems of control of Burgers' equation are judged; {values.get('name')!r} is none.")
    cost = burgers_cost(control, burgers_case(table, int(card["index"])), table.refine)
    f = forcing.detach().double().cpu()
    with torch.no_grad():
        misfit, energy = cost.misfit(f), cost.energy(f)
    return BurgersScore(J=misfit + cost.weight * energy, misfit=misfit, energy=energy)
