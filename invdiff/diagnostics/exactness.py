r"""How right a sampler is: its draws against exact posteriors, as its steps grow.

Against a Gaussian posterior N(m, S) in d dimensions, N draws are summed up by four figures, each of which is 1 (or 0.9)
for exact draws:

    mean error   |m^ - m| sqrt(N / tr S), in units of the floor that N exact draws leave
    variance     mean over values of the sample variance over the exact one
    whitened     mean over draws of |L^{-1} (z - m)|^2 / d, with S = L L^T: sees what the marginal variances do not
    mass         mean over values of the exact mass inside the draws' central 90 % interval (Weibull positions: 0.9)

and by |S^ - S|_F in units of its floor sqrt((tr S)^2 + tr S^2) / sqrt(N). The bounds that exact draws keep follow from
N and S: four standard deviations of each figure (its chi-square's quantile, for the two that are norms), and an
allowance of 2 % for the discretisation that is left at the largest number of steps. Weighted draws have the bounds of
their effective number.

A singular S, as of a trajectory that its initial state determines, is whitened on its support, the r directions with
variance, in place of d. What draws have outside is a figure of its own, off support: its root mean square over
sqrt(tr S), at most the allowance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from invdiff import metrics
from invdiff.driver import Sampler
from invdiff.errors import CapabilityError
from invdiff.operators import Blur, Downsampling, Inpainting, gaussian_kernel, random_mask
from invdiff.operators.base import SVD, LinearOperator
from invdiff.priors.exact import GaussianPosterior
from invdiff.priors.field import FieldPrior
from invdiff.priors.gaussian import GaussianPrior
from invdiff.priors.wavelet import WaveletPrior
from invdiff.problem import Problem
from invdiff.solution import Solution
from invdiff.solve import solve

ALLOWANCE = 0.02
"""Relative error that the discretisation may leave at the largest number of steps."""
_SINGULAR = 1e-12
"""Directions with less of the largest eigenvalue than this have no variance: rounding leaves 1e-15."""


@dataclass(frozen=True, kw_only=True)
class ExactProblem:
    """A problem whose posterior is known.

    Parameters
    ----------
    name
        Name in reports.
    prior, problem, exact
        Analytic prior, measurement, and the posterior of the event in physical units.
    """

    name: str
    prior: FieldPrior | GaussianPrior | WaveletPrior
    problem: Problem
    exact: GaussianPosterior


def exact_problem(
    name: str, prior: FieldPrior | GaussianPrior, operator: LinearOperator, noise_std: float, seed: int = 0
) -> ExactProblem:
    """Draw a truth from the prior, measure it, and work out the posterior."""
    truth = prior.sample(1, seed=seed + 1).double()
    problem = Problem.simulate(operator, truth, noise_std=noise_std, seed=seed, name=name)
    exact = prior.posterior(operator, problem.likelihood.measurement[0], noise_std)  # type: ignore[index]
    return ExactProblem(name=name, prior=prior, problem=problem, exact=exact)


def field_problems(side: int = 12) -> list[ExactProblem]:
    """Inpainting, blur and down-sampling of a Gaussian field about grey, with values like a picture's; noise 0.05."""
    shape = (1, side, side)
    prior = FieldPrior.power_law(shape, exponent=3.0, std=0.2, mean=0.5)
    return [
        exact_problem("field-inpainting", prior, Inpainting(random_mask(shape, 0.5, seed=1), shape), 0.05),
        exact_problem("field-blur", prior, Blur(gaussian_kernel(5, 1.0), shape, boundary="reflect"), 0.05),
        exact_problem("field-downsampling", prior, Downsampling(shape, 2), 0.05),
    ]


def plane_problem() -> ExactProblem:
    """Two correlated values, their sum measured weakly: for samplers whose cost grows with the dimension."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    prior = GaussianPrior(torch.tensor([0.3, -0.2], dtype=torch.float64), covariance)
    return exact_problem("plane", prior, _Sum(), 0.7)


class _Sum(LinearOperator):
    """The sum of two values."""

    def __init__(self) -> None:
        super().__init__((2,), (1,))

    def forward(self, x: Tensor) -> Tensor:
        """Sum."""
        return x.sum(1, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """Repeat."""
        return y.expand(-1, 2)

    @property
    def svd(self) -> SVD:
        """Sum and difference, over the square root of two."""

        def turned(c: Tensor) -> Tensor:
            return torch.stack((c[:, 0] + c[:, 1], c[:, 0] - c[:, 1]), dim=1) / sqrt(2.0)

        values = torch.tensor([sqrt(2.0), 0.0], dtype=torch.float64)
        return SVD(values, lambda c: c[:, :1], lambda y: torch.cat((y, torch.zeros_like(y)), dim=1), turned, turned)


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """Figures of one run against the exact posterior; see the module's text.

    Parameters
    ----------
    draws
        Number of draws, the effective number where they have weights.
    mean_error, covariance_error
        In units of the floor.
    variance_ratio, whitened, mass
        1, 1 and 0.9 for exact draws.
    log_evidence_error
        Estimate less the exact log-evidence, nats, and its standard error, or None.
    off_support
        Root mean square of what the draws have in directions without variance, over that of all values about the mean;
        None where there are no such directions.
    bounds
        The figures' admitted range for exact draws, by name.
    """

    draws: float
    mean_error: float
    covariance_error: float
    variance_ratio: float
    whitened: float
    mass: float
    log_evidence_error: float | None
    off_support: float | None = None
    bounds: dict[str, tuple[float, float]]

    @property
    def failures(self) -> list[str]:
        """Figures outside their bounds, in words."""
        values = {name: getattr(self, name) for name in self.bounds}
        return [
            f"{name} {value:.3f} not in [{low:.3f}, {high:.3f}]"
            for name, value in values.items()
            for low, high in [self.bounds[name]]
            if value is not None and not low <= value <= high
        ]


def measure(z: Tensor, exact: GaussianPosterior, log_weights: Tensor | None = None) -> Exactness:
    """Compare draws (n, *event) with a Gaussian posterior; weighted draws by their weighted moments."""
    x, m, S = z.flatten(1).double(), exact.mean.flatten(), exact.covariance
    n = len(x)
    w = torch.full((n,), 1.0 / n, dtype=x.dtype) if log_weights is None else torch.softmax(log_weights.double(), 0)
    size = float(1.0 / (w**2).sum())
    mean = w @ x
    centred = x - mean
    cov = (centred * w[:, None]).T @ centred / (1.0 - 1.0 / size)
    trace, trace2, trace4 = float(S.trace()), float((S**2).sum()), float(((S @ S) ** 2).sum())
    std = S.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(S)
    has = values > _SINGULAR * values[-1]
    d = int(has.sum())
    c = (x - m) @ vectors
    whitened = (c[:, has].square() / values[has]).sum(1) / d
    off_support = None if bool(has.all()) else sqrt(float(w @ c[:, ~has].square().sum(1)) / trace)
    equal = x
    if log_weights is not None:
        equal = x[torch.multinomial(w, n, replacement=True, generator=torch.Generator().manual_seed(0))]
    low, high = metrics.interval(equal, 0.9) if n >= 19 else (x.amin(0), x.amax(0))
    mass = (torch.special.ndtr((high - m) / std) - torch.special.ndtr((low - m) / std)).mean()
    correlation2 = float(((S / std[:, None] / std) ** 2).mean())
    a = ALLOWANCE

    def around(center: float, spread: float) -> tuple[float, float]:
        return center - 4.0 * spread - a, center + 4.0 * spread + a

    # The squared errors are weighted sums of chi-squares: |m^ - m|^2 N has the variance 2 tr S^2, |S^ - S|^2 N the
    # variance 4 ((tr S^2)^2 + tr S^4) and, for few draws, 8 (tr S)^2 tr S^2 / N more, from the spread of the draws'
    # lengths. A systematic error of `a` std adds a^2 N tr S to the first, one of `a` S adds a^2 N tr S^2 to the second.
    floor2 = trace**2 + trace2
    mean_high = sqrt(_chi_square(trace**2 / trace2) + a**2 * size)
    cov_freedom = floor2**2 / (2.0 * (trace2**2 + trace4) + 4.0 * trace**2 * trace2 / size)
    cov_high = sqrt(_chi_square(cov_freedom)) + a * sqrt(size * trace2 / floor2)
    return Exactness(
        draws=size,
        mean_error=float((mean - m).norm()) * sqrt(size / trace),
        covariance_error=float((cov - S).norm()) * sqrt(size / floor2),
        variance_ratio=float((cov.diagonal() / S.diagonal()).mean()),
        whitened=float(w @ whitened),
        mass=float(mass),
        log_evidence_error=None,
        off_support=off_support,
        bounds={
            "mean_error": (0.0, mean_high),
            "covariance_error": (0.0, cov_high),
            "variance_ratio": around(1.0, sqrt(2.0 * correlation2 / size)),
            "whitened": around(1.0, sqrt(2.0 / (size * d))),
            "mass": around(0.9, sqrt(0.09 * sqrt(correlation2) / size)),
            **({} if off_support is None else {"off_support": (0.0, a)}),
        },
    )


def _chi_square(freedom: float) -> float:
    """Quantile of chi-square / freedom at four standard deviations (Wilson & Hilferty 1931)."""
    spread = 2.0 / (9.0 * freedom)
    return (1.0 - spread + 4.0 * sqrt(spread)) ** 3


def measure_solution(solution: Solution, case: ExactProblem) -> Exactness:
    """Compare a solution with the exact posterior, its evidence too.

    The evidence's standard error is that between chains; with a single chain, that of its weights (delta method), which
    knows of no resampling before the last step.
    """
    if solution.particles is not None and solution.log_weights is not None:
        name = case.problem.event[0].name
        found = measure(solution.particles[name].flatten(0, 1), case.exact, solution.log_weights.flatten())
    else:
        draws = solution.draws
        if not isinstance(draws, Tensor):
            raise CapabilityError("Exactness is measured on problems with one variable.")
        found = measure(draws, case.exact)
    if solution.log_evidence is None:
        return found
    error = solution.log_evidence - case.exact.log_evidence
    se = solution.log_evidence_se
    if se is None and solution.log_weights is not None:
        se = sqrt(max(0.0, 1.0 / found.draws - 1.0 / solution.log_weights.numel()))
    bound = 4.0 * (se or 0.0) + ALLOWANCE
    return replace(found, log_evidence_error=error, bounds={**found.bounds, "log_evidence_error": (-bound, bound)})


@dataclass(frozen=True, kw_only=True)
class SamplerReport:
    """What `check_sampler` measured.

    Parameters
    ----------
    sampler
        The settings checked.
    exact
        Whether the sampler declares itself exact.
    steps
        Numbers of steps tried.
    rows
        Figures by problem, one for each number of steps.
    """

    sampler: Sampler
    exact: bool
    steps: tuple[int, ...]
    rows: dict[str, list[Exactness]]

    @property
    def failures(self) -> list[str]:
        """Why the sampler is not exact, in words; empty if it is."""
        found = []
        for name, row in self.rows.items():
            found += [f"{name} at {self.steps[-1]} steps: {text}" for text in row[-1].failures]
            ends = (row[0], row[-1])
            first, last = (abs(r.whitened - 1.0) + abs(r.variance_ratio - 1.0) + r.mean_error for r in ends)
            if len(row) > 1 and row[0].failures and last >= first:
                found.append(
                    f"{name}: the error does not fall from {self.steps[0]} to {self.steps[-1]} steps "
                    f"({first:.3f} to {last:.3f})"
                )
        return found

    def __str__(self) -> str:
        lines = [f"{self.sampler!r}"]
        for name, row in self.rows.items():
            for steps, r in zip(self.steps, row, strict=True):
                evidence = "" if r.log_evidence_error is None else f", log evidence {r.log_evidence_error:+.3f}"
                lines.append(
                    f"  {name}, {steps} steps: mean {r.mean_error:.2f} floors, "
                    f"covariance {r.covariance_error:.2f} floors, variance {r.variance_ratio:.3f}, "
                    f"whitened {r.whitened:.3f}, mass {r.mass:.3f}{evidence}"
                )
        return "\n".join(lines)


def check_sampler(
    sampler: Sampler,
    *,
    problems: Sequence[ExactProblem] | None = None,
    steps: Sequence[int] = (10, 30, 90),
    draws: int = 400,
    chains: int = 1,
    seed: int = 0,
    variant: Callable[[Sampler, int], Sampler] | None = None,
) -> SamplerReport:
    """Run a sampler on problems with known posteriors at growing numbers of steps, float64.

    Parameters
    ----------
    sampler
        Settings; a sampler with the field ``steps``, unless `variant` is given.
    problems
        Problems; inpainting, blur and down-sampling of a Gaussian field if None.
    steps
        Growing numbers of steps.
    draws, chains, seed
        Of each run.
    variant
        (sampler, steps) -> sampler with that many steps; replaces the field ``steps`` if None.

    Returns
    -------
        The figures.

    Raises
    ------
    AssertionError
        If the sampler declares itself exact and, at the largest number of steps, a figure lies outside what exact draws
        give, or the error does not fall as steps grow.
    """
    cases = list(problems) if problems is not None else field_problems()
    with_steps = variant or (lambda s, k: replace(s, steps=k))
    rows: dict[str, list[Exactness]] = {case.name: [] for case in cases}
    for case in cases:
        for k in steps:
            solution = solve(
                case.problem,
                case.prior,
                with_steps(sampler, k),
                draws=draws,
                chains=chains,
                seed=seed,
                dtype=torch.float64,
            )
            rows[case.name].append(measure_solution(solution, case))
    report = SamplerReport(sampler=sampler, exact=sampler.exact, steps=tuple(steps), rows=rows)
    if report.exact and report.failures:
        raise AssertionError(
            f"{type(sampler).__name__} declares itself exact, but:\n" + "\n".join(report.failures) + f"\n{report}"
        )
    return report
