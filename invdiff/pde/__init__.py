"""Differentiable solvers of partial differential equations, one equation a file."""

from invdiff.pde.advection import Advection
from invdiff.pde.advection_data import AdvectionSetting, advection_cases
from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_control import BurgersCost, OptimalForcing, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases
from invdiff.pde.flow import CompressibleFlow
from invdiff.pde.flow_data import ShockTubeSetting, flow_cases, shock_tubes
from invdiff.pde.riemann import riemann_solution, riemann_star

__all__ = [
    "Advection",
    "AdvectionSetting",
    "Burgers",
    "BurgersCost",
    "BurgersSetting",
    "CompressibleFlow",
    "OptimalForcing",
    "ShockTubeSetting",
    "advection_cases",
    "burgers_cases",
    "flow_cases",
    "optimal_forcing",
    "riemann_solution",
    "riemann_star",
    "shock_tubes",
]
