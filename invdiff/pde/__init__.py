"""Differentiable solvers of partial differential equations, one equation a file, and trajectories in files."""

from invdiff.pde.advection import Advection
from invdiff.pde.advection_cards import advection_trajectories
from invdiff.pde.advection_data import AdvectionSetting, advection_cases
from invdiff.pde.burgers import Burgers
from invdiff.pde.burgers_cards import BurgersScore, burgers_judge, burgers_trajectories
from invdiff.pde.burgers_control import BurgersCost, OptimalForcing, TrajectoryCost, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, burgers_cases
from invdiff.pde.flow import CompressibleFlow
from invdiff.pde.flow_cards import flow_trajectories
from invdiff.pde.flow_data import ShockTubeSetting, flow_cases, shock_tubes
from invdiff.pde.pdebench import read_pdebench
from invdiff.pde.pid import pid_forcing
from invdiff.pde.prior_solver import PriorSolver
from invdiff.pde.riemann import riemann_solution, riemann_star
from invdiff.pde.trajectory_files import Axis, Trajectories, read_trajectories, write_trajectories

__all__ = [
    "Advection",
    "AdvectionSetting",
    "Axis",
    "Burgers",
    "BurgersCost",
    "BurgersScore",
    "BurgersSetting",
    "CompressibleFlow",
    "OptimalForcing",
    "PriorSolver",
    "ShockTubeSetting",
    "Trajectories",
    "TrajectoryCost",
    "advection_cases",
    "advection_trajectories",
    "burgers_cases",
    "burgers_judge",
    "burgers_trajectories",
    "flow_cases",
    "flow_trajectories",
    "optimal_forcing",
    "pid_forcing",
    "read_pdebench",
    "read_trajectories",
    "riemann_solution",
    "riemann_star",
    "shock_tubes",
    "write_trajectories",
]
