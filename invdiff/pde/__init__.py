"""Differentiable solvers of partial differential equations, one equation a file, and trajectories in files."""

from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_control import BurgersCost, OptimalForcing, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases
from invdiff.pde.trajectory_files import Axis, Trajectories, read_pdebench, read_trajectories, write_trajectories

__all__ = [
    "Axis",
    "Burgers",
    "BurgersCost",
    "BurgersSetting",
    "OptimalForcing",
    "Trajectories",
    "burgers_cases",
    "optimal_forcing",
    "read_pdebench",
    "read_trajectories",
    "write_trajectories",
]
