"""Problems of linear advection from cards: random cases, solved exactly."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from invdiff.pde.advection_data import AdvectionSetting, advection_cases
from invdiff.pde.trajectory_cases import TrajectoryCase, only_case, replaced
from invdiff.pde.trajectory_files import Axis, Trajectories

if TYPE_CHECKING:
    from invdiff.card_equations import AdvectionTable

_REPLACED = ("points", "states", "duration", "speed", "waves", "highest")


def advection_trajectories(setting: AdvectionSetting, indices: range, *, seed: int = 0) -> Trajectories:
    """Shift random cases, exactly.

    Parameters
    ----------
    setting
        Grid and law.
    indices
        Numbers of the cases, from 0; at least one.
    seed
        As for `advection_cases`; 0 is for training, 1 is held out.

    Returns
    -------
    Trajectories
        "state" (states, points) over time and x, averages in cells, float64, without units.
    """
    x = torch.linspace(0.0, 1.0, setting.points + 1, dtype=torch.float64)
    times = torch.linspace(0.0, setting.duration, setting.states, dtype=torch.float64)
    return Trajectories(
        values={"state": setting.solver()(advection_cases(setting, indices, seed=seed))},
        dims={"state": ("time", "x")},
        axes={"time": Axis(values=times), "x": Axis.between(x)},
        cases=indices,
        attributes={
            "equation": "Advection",
            "speed": setting.speed,
            "boundary": "periodic",
            "seed": seed,
            "setting": repr(setting),
        },
    )


def advection_case(card: "AdvectionTable", index: int) -> TrajectoryCase:
    """Make a case of a card's section ``[equation]``.

    Raises
    ------
    CatalogueError
        If there is no such setting.
    InputError
        If there is no case of that index, or the grid does not resolve the waves.
    """
    one = only_case(card, index)
    setting = replace(AdvectionSetting.named(card.setting), **replaced(card, _REPLACED))
    state = advection_trajectories(setting, one, seed=card.seed).values["state"][0]
    # The shift by nothing goes through a Fourier transform too; who shifts again must begin where the case began.
    initial = advection_cases(setting, one, seed=card.seed)[0]
    return TrajectoryCase(event=setting.event, truth=state, known={"initial": initial, "state": state})
