"""The front door: a problem and a prior in, posterior draws out."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, fields
from math import prod
from pathlib import Path
from typing import Any

import torch

from invdiff import samplers
from invdiff.driver import Budget, Callback, Sampler
from invdiff.errors import CapabilityError, CatalogueError, InputError, SamplingError
from invdiff.posterior import Posterior
from invdiff.priors.base import DiffusionPrior, MaskedPrior
from invdiff.priors.loading import load_prior
from invdiff.problem import Problem, load_problem
from invdiff.solution import Solution

PARTICLES, MEASURED = 256, 64
"""Fewest draws, and most measured values (and unknowns, if not linear), for which weighted particles are chosen."""
CANDIDATES, FITS = 1024, 16
"""Most tokens times kinds of token of which every candidate is weighed, and fits to the measurement where not."""


def sampler_classes() -> dict[str, type[Sampler]]:
    """Samplers by lower-case name."""
    found = vars(samplers).values()
    return {
        c.__name__.lower(): c
        for c in found
        if inspect.isclass(c) and issubclass(c, Sampler) and not inspect.isabstract(c)
    }


def sampler_by_name(name: str, **settings: Any) -> Sampler:
    """Build a sampler from its name in any case, e.g. ``"daps"``.

    Raises
    ------
    CatalogueError
        If there is no sampler of that name.
    InputError
        If it has no such setting.
    """
    classes = sampler_classes()
    if name.lower() not in classes:
        raise CatalogueError.unknown("sampler", name, classes)
    cls = classes[name.lower()]
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # every concrete sampler is a dataclass
    for key in settings:
        if key not in known:
            raise CatalogueError.unknown(f"setting of {cls.__name__}", key, known)
    return cls(**settings)


def able_samplers(posterior: Posterior) -> list[str]:
    """Names of the samplers that can run on a posterior, with settings at which they can."""
    able = []
    for cls in sampler_classes().values():
        if all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(cls)):  # type: ignore[arg-type]
            sampler = choose_variant(cls, posterior)
            if sampler.requires() <= posterior.capabilities:
                able.append(cls.__name__)
    return sorted(able)


def choose_variant(cls: type[Sampler], posterior: Posterior) -> Sampler:
    """Return a sampler of a class with default settings, PiGDM with the stored covariance where the prior has one."""
    if cls is samplers.PiGDM and "curvature" in posterior.capabilities:
        return samplers.PiGDM(covariance=samplers.Spectral())
    return cls()


def choose_sampler(posterior: Posterior, draws: int) -> tuple[Sampler, str]:
    """Return the sampler that `solve` takes if none is given, and why.

    Weighted particles are right on any number of modes and give the evidence, if they are many and few values were
    measured: log-weights spread as the measured values grow. Elsewhere draws of equal weight are worth more.
    """
    can = posterior.capabilities
    if "masked" in can:
        (length,), kinds = posterior.shape, posterior.vocabulary_size
        if length * kinds <= CANDIDATES:
            return (
                samplers.TwistedSMC(),
                "masked prior: weighted particles of tokens, exact in the limit, with evidence",
            )
        many = f"masked prior of {length} tokens of {kinds} kinds, too many to weigh every candidate"
        if "embedding_gradient" in can and draws < PARTICLES:
            # Measured in docs/decoded.md: weights leave tens of particles with one ancestor, and on validation
            # pictures no other setting of a fit was as near to the best one of every task.
            fit = samplers.APS(steps=50, inner_steps=10, lr=0.9, estimator="soft", sticky=False)
            return fit, f"{many}, and too few draws to carry weights: fits to the measurement, not exact"
        if "embedding_gradient" in can:
            fitted = samplers.AnchoredSMC(every=max(1, length // FITS))
            return fitted, f"{many}: particles proposed by gradients and weighed, exact in the limit, with evidence"
        return samplers.MaskedGibbs(), f"{many}, and no gradient: walkers, exact as moves grow"
    measured = posterior.measurements
    if draws >= PARTICLES and measured <= MEASURED:
        carried = f"{measured} measured values, which {draws} weighted particles can carry"
        if {"denoiser", "linear", "likelihood_gradient"} <= can:
            weighted = samplers.TransportLangevin(resampling=samplers.Systematic(), conditional_ess=0.9)
            return weighted, f"linear-Gaussian problem of {carried}: exact in the limit, with evidence"
        small = prod(posterior.shape) <= MEASURED
        if small and {"denoiser", "denoiser_vjp", "likelihood_gradient"} <= can:
            return samplers.TDS(), f"a problem that is not linear with Gaussian noise, of {carried}: twisted particles"
    if {"denoiser", "linear", "curvature"} <= can:
        return (
            samplers.PiGDM(covariance=samplers.Spectral()),
            "linear-Gaussian problem and known error covariance: moment matching without network gradients",
        )
    if {"denoiser", "denoiser_vjp", "linear"} <= can:
        return samplers.PiGDM(), "linear-Gaussian problem: moment matching with the denoiser's Jacobian"
    if {"denoiser", "denoiser_vjp", "likelihood_gradient"} <= can:
        return samplers.DPS(), "the problem is not linear with Gaussian noise: gradient guidance"
    if "denoiser" in can:
        return (
            samplers.PCN(),
            "the likelihood has no gradient: moves in the prior's noise, accepted by its values alone",
        )
    raise CapabilityError(
        f"No sampler here can run on a posterior with the capabilities {', '.join(sorted(can)) or 'none'}."
    )


def as_device(device: str | torch.device | None) -> torch.device | None:
    """Return a usable device.

    Raises
    ------
    CatalogueError
        If there is no such device.
    """
    if device is None:
        return None
    known = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    ]
    if torch.backends.mps.is_available():
        known.append("mps")
    if str(device) not in known:
        raise CatalogueError.unknown("device", str(device), known)
    return torch.device(device)


def solve(
    problem: Problem | str | Path | Sequence[Problem],
    prior: DiffusionPrior | MaskedPrior | str | Path,
    sampler: Sampler | str | None = None,
    *,
    draws: int = 16,
    seed: int = 0,
    chains: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    micro_batch: int | None = None,
    precision: str = "float32",
    compile: bool = False,  # noqa: A002 torch's word
    together: int | None = None,
    max_evaluations: float | None = None,
    max_seconds: float | None = None,
    progress: bool | str = False,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    distributed: bool = False,
) -> Any:
    """Draw from the posterior of a problem under a prior.

    Parameters
    ----------
    problem
        A problem, the name of a card or a path to one; or a list of problems that share operator, noise level and
        event, which run as one batch with the results of one-by-one calls.
    prior
        A prior, or the name of a shipped one or a path to one.
    sampler
        A sampler; or its name, for its default settings (PiGDM's covariance is Spectral where the prior has a
        curvature); chosen by what the problem, the prior and the number of draws allow if None. The provenance says
        why.
    draws, chains
        Draws in a chain, and independent chains (ensembles).
    seed
        The same seed gives the same draws for any micro-batch and any company.
    device, dtype, micro_batch, precision, compile
        As in `Posterior`.
    together
        Problems in one batch, where there are many; all if None. Batches that are complete are kept when a later one is
        stopped.
    max_evaluations, max_seconds
        Bounds on network evaluations a draw and on the wall time of a batch.
    progress, callback, checkpoint
        As in `invdiff.driver.run`; a checkpoint needs a single batch.
    distributed
        Whether to share the draws of each chain among the processes of torch.distributed, as in `Posterior.sample`;
        every process makes the same call, with a device of its own, and gets the same solutions.

    Returns
    -------
    Solution or list of Solution
        One for each problem.

    Raises
    ------
    CapabilityError
        If the sampler cannot do the problem; names samplers that can.
    SamplingError
        If the run fails or hits a bound before it has draws; ``partial`` holds the solutions of complete batches, as it
        does on a KeyboardInterrupt.
    CatalogueError
        If a name is unknown.
    """
    place = as_device(device)
    if isinstance(problem, (str, Path)):
        problem = load_problem(problem)
    if isinstance(prior, (str, Path)):
        prior = load_prior(prior)
    named = type(sampler_by_name(sampler)) if isinstance(sampler, str) else None
    single = isinstance(problem, Problem)
    problems = [problem] if isinstance(problem, Problem) else list(problem)
    if together is not None and together < 1:
        raise InputError(f"together is a number of problems in a batch, at least 1; got {together}.")
    size = together or max(1, len(problems))
    if checkpoint is not None and size < len(problems):
        raise InputError("A checkpoint holds one batch; leave `together` out, or solve batch by batch.")
    done: list[Solution] = []
    try:
        for i in range(0, len(problems), size):
            batch = problems[i : i + size]
            posterior = Posterior(
                batch, prior, device=place, dtype=dtype, micro_batch=micro_batch, precision=precision, compile=compile
            )
            if named is not None:
                chosen, reason = choose_variant(named, posterior), "given by name"
            elif isinstance(sampler, Sampler):
                chosen, reason = sampler, "given"
            else:
                chosen, reason = choose_sampler(posterior, draws)
            check_able(chosen, posterior)
            solutions = posterior.sample(
                chosen,
                draws,
                seed=seed,
                chains=chains,
                budget=Budget(max_evaluations=max_evaluations, max_seconds=max_seconds),
                progress=progress,
                callback=callback,
                checkpoint=checkpoint,
                distributed=distributed,
            )
            for p, s in zip(batch, solutions if isinstance(solutions, list) else [solutions], strict=True):
                done.append(s.because(reason).with_reference(p.reference))
    except (SamplingError, KeyboardInterrupt) as stop:
        stop.partial = done or None  # type: ignore[union-attr]  # an interruption carries it, too
        raise
    if not problems:
        raise InputError("There is no problem to solve; pass one or several.")
    return done[0] if single else done


def check_able(sampler: Sampler, posterior: Posterior) -> None:
    """Raise CapabilityError, naming samplers that can, unless the sampler can run on the posterior."""
    try:
        posterior.require(sampler)
    except CapabilityError as error:
        able = [name for name in able_samplers(posterior) if name != type(sampler).__name__]
        raise CapabilityError(f"{error} Samplers that can: {', '.join(able) or 'none here'}.") from None
