"""Differentiable solvers of partial differential equations, one equation a file."""

from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases

__all__ = ["Burgers", "BurgersSetting", "burgers_cases"]
