r"""Proportional, integral and derivative control of Burgers' equation, cell by cell: the engineer's baseline.

    f_k = K_p e_k + K_i dt sum_{j <= k} e_j + K_d (e_k - e_{k - 1}) / dt,   e_k = target - u(t_k)

with e zero in cells that are not observed, and f in cells that are not controlled. It is a closed loop: the state at
the end of each window is measured (here: solved) before the next window's forcing is chosen. It knows neither the
equation nor the cost.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError
from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_control import BurgersCost


def pid_forcing(
    cost: BurgersCost, proportional: float, integral: float = 0.0, derivative: float = 0.0
) -> Float[Tensor, "windows points"]:
    """Steer by the distance from the target.

    Parameters
    ----------
    cost
        Start, target and masks; its solver is the plant, which is run once, window by window.
    proportional, integral, derivative
        K_p, K_i, K_d; per unit of time, its square, and none.

    Returns
    -------
    Tensor
        The forcing that was chosen, float64.

    Raises
    ------
    InputError
        If the cost's solver does not solve the equation.
    """
    solver = cost.solver
    if not isinstance(solver, Burgers):
        raise InputError(f"The plant is a solver of the equation, invdiff.pde.Burgers; got {type(solver).__name__}.")
    dt = solver.duration / solver.windows
    plant = Burgers(
        solver.points,
        1,
        dt,
        viscosity=solver.viscosity,
        length=solver.length,
        boundary=solver.boundary,
        refine=solver.refine,
    )
    u = cost.initial.double()[None]
    total, before, rows = torch.zeros_like(u), None, []
    with torch.no_grad():
        for _ in range(solver.windows):
            error = torch.where(cost.observed, cost.target.double() - u, 0.0)
            total = total + dt * error
            slope = torch.zeros_like(error) if before is None else (error - before) / dt
            f = torch.where(cost.controlled, proportional * error + integral * total + derivative * slope, 0.0)
            rows.append(f)
            before, u = error, plant(u, f[:, None])[:, -1]
    return torch.cat(rows)
