"""Differentiable solvers of partial differential equations, one equation a file."""

from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_control import BurgersCost, OptimalForcing, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases

__all__ = ["Burgers", "BurgersCost", "BurgersSetting", "OptimalForcing", "burgers_cases", "optimal_forcing"]
