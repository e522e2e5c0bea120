"""Differentiable solvers of partial differential equations, one equation a file, and trajectories in files."""

from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_cards import BurgersScore, burgers_judge, burgers_trajectories
from invdiff.pde.burgers_control import BurgersCost, OptimalForcing, TrajectoryCost, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases
from invdiff.pde.pdebench import read_pdebench
from invdiff.pde.trajectory_files import Axis, Trajectories, read_trajectories, write_trajectories

__all__ = [
    "Axis",
    "Burgers",
    "BurgersCost",
    "BurgersScore",
    "BurgersSetting",
    "OptimalForcing",
    "Trajectories",
    "TrajectoryCost",
    "burgers_cases",
    "burgers_judge",
    "burgers_trajectories",
    "optimal_forcing",
    "read_pdebench",
    "read_trajectories",
    "write_trajectories",
]
