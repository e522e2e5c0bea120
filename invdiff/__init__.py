"""invdiff: posterior samples for inverse problems with diffusion priors, with units and honest uncertainty.

    solution = invdiff.solve(problem, prior)

`import invdiff` loads torch and numpy; files, pictures and results load their libraries where they begin.
"""

from invdiff import integrators, likelihoods, metrics, operators, priors, samplers
from invdiff.driver import Budget, Sampler
from invdiff.errors import (
    CapabilityError,
    CatalogueError,
    ChecksumError,
    InputError,
    InvdiffError,
    SamplingError,
    ShapeError,
)
from invdiff.event import Variable
from invdiff.posterior import Posterior
from invdiff.priors.loading import load_prior
from invdiff.problem import Problem, load_problem
from invdiff.solution import Solution
from invdiff.solve import solve

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "CapabilityError",
    "CatalogueError",
    "ChecksumError",
    "InputError",
    "InvdiffError",
    "Posterior",
    "Problem",
    "Sampler",
    "SamplingError",
    "ShapeError",
    "Solution",
    "Variable",
    "__version__",
    "integrators",
    "likelihoods",
    "load_prior",
    "load_problem",
    "metrics",
    "operators",
    "priors",
    "samplers",
    "solve",
]
