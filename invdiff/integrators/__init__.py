"""Reverse-time steppers, one a file, and the noise levels they walk down."""

from invdiff.integrators.ancestral import Ancestral
from invdiff.integrators.base import Integrator, karras_levels
from invdiff.integrators.dpm_solver import DPMSolver2M
from invdiff.integrators.euler import Euler
from invdiff.integrators.heun import Heun

__all__ = ["Ancestral", "DPMSolver2M", "Euler", "Heun", "Integrator", "karras_levels"]
