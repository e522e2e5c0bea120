"""Problems of one-dimensional compressible flow from cards: random shock tubes, solved on finer cells."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from invdiff.errors import InputError
from invdiff.pde.flow import conserved, primitive
from invdiff.pde.flow_data import ShockTubeSetting, flow_cases
from invdiff.pde.trajectory_cases import TrajectoryCase, only_case, replaced
from invdiff.pde.trajectory_files import Axis, Trajectories

if TYPE_CHECKING:
    from invdiff.card_equations import FlowTable

_REPLACED = ("points", "states", "duration", "gamma", "viscosity", "steps")


def flow_trajectories(setting: ShockTubeSetting, indices: range, *, seed: int = 0, refine: int = 4) -> Trajectories:
    """Solve random cases.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        As for `flow_cases`; 0 is for training, 1 is held out.
    refine
        The solver's cells in a cell of the grid, at least 1. Density, momentum and energy are averaged over them.

    Returns
    -------
    Trajectories
        "density", "velocity" and "pressure", each (states, points) over time and x, float64, without units: those of
        the averages of density, momentum and energy in cells. Density and pressure are positive.

    Raises
    ------
    InputError
        If `refine` is less than 1, or the setting's steps are too few to be stable.
    """
    if refine < 1:
        raise InputError(f"A cell has at least 1 cell of the solver, got refine={refine}.")
    fine = replace(setting, points=refine * setting.points)
    with torch.no_grad():
        states = conserved(setting.solver(refine)(flow_cases(fine, indices, seed=seed)), setting.gamma)
    found = primitive(states.reshape(*states.shape[:-1], setting.points, refine).mean(-1), setting.gamma)
    x = torch.linspace(-1.0, 1.0, setting.points + 1, dtype=torch.float64)
    times = torch.linspace(0.0, setting.duration, setting.states, dtype=torch.float64)
    names = ("density", "velocity", "pressure")
    return Trajectories(
        values=dict(zip(names, found.unbind(2), strict=True)),
        dims=dict.fromkeys(names, ("time", "x")),
        axes={"time": Axis(values=times), "x": Axis.between(x)},
        cases=indices,
        attributes={
            "equation": "Flow",
            "gamma": setting.gamma,
            "viscosity": setting.viscosity,
            "boundary": "outflow",
            "seed": seed,
            "refine": refine,
            "setting": repr(setting),
        },
    )


def flow_case(card: "FlowTable", index: int) -> TrajectoryCase:
    """Make and solve a case of a card's section ``[equation]``.

    Raises
    ------
    CatalogueError
        If there is no such setting.
    InputError
        If there is no case of that index, a vacuum may open, or the card's steps are too few to be stable.
    """
    one = only_case(card, index)
    setting = replace(ShockTubeSetting.named(card.setting), **replaced(card, _REPLACED))
    state = torch.cat(list(flow_trajectories(setting, one, seed=card.seed, refine=card.refine).values.values()))
    # The first of the solver's states is the case's to rounding; who solves again must begin where the case began.
    initial = flow_cases(setting, one, seed=card.seed)[0]
    return TrajectoryCase(event=setting.event, truth=state.flatten(), known={"initial": initial, "state": state})
