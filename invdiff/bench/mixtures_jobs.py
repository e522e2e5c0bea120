"""The rows of `invdiff.bench.mixtures`: which sampler runs on which problem, with how many particles, how often."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from invdiff.bench.mixtures_table import EXACT, UNWEIGHTED, WEIGHTED
from invdiff.diagnostics.mixtures import random_mixture
from invdiff.diagnostics.ring import ring_prior
from invdiff.integrators import Heun
from invdiff.potential import Noised, Tempered
from invdiff.priors.mixture import MixturePrior
from invdiff.samplers import (
    AFDPS,
    DAPS,
    DMCMC,
    DPS,
    FPS,
    TDS,
    FKSteering,
    ImportanceSampling,
    Langevin,
    MCGDiff,
    PiGDM,
    Sampler,
    Systematic,
    TransportLangevin,
)

RING_STD = 0.2
OVERLAPPING, PARTED = 2.5, 6.0
"""Distances of the modes on which chains are measured, in standard deviations."""
CHAINS = 4
"""Chains of a run, which split R-hat compares."""
HEUN = TransportLangevin(steps=20, integrator=Heun(), resampling=Systematic())
"""119 evaluations: the weights follow the flow, and Euler's steps along it would bias the evidence."""
EULER = TransportLangevin(steps=24, resampling=Systematic())
"""120 evaluations, by the default transport."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to do: runs a row, particles of each, and what is varied."""

    dimensions: tuple[int, ...] = (2, 4, 8)
    runs: int = 16
    few: int = 4
    particles: int = 4096
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384)
    steps: tuple[int, ...] = (30, 60, 120, 240)
    many: int = 16384
    wide: int = 2048
    draws: int = 2000
    chain_runs: int = 8


QUICK = Plan(
    dimensions=(2,), runs=2, few=2, particles=128, sizes=(64, 128), steps=(10, 20), many=128, wide=32, draws=120,
    chain_runs=1,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row: a sampler, or exact draws if None, on a problem; ``runs`` of its ensembles or of its measurements."""

    part: str
    problem: str
    label: str
    sampler: Sampler | None
    particles: int
    runs: int

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What tells rows apart."""
        steps = 0 if self.sampler is None else int(self.sampler.steps)  # type: ignore[attr-defined]
        return self.part, self.problem, self.label, steps, self.particles


def jobs(plan: Plan) -> list[Job]:
    """All rows in order."""
    return [*_mixtures(plan), *_others(plan), *_varied(plan), *_wide(plan), *_ring(plan), *_chains(plan)]


def _mixtures(plan: Plan) -> Iterator[Job]:
    """Everything on one measurement of each mixture, about 120 evaluations."""
    for d in plan.dimensions:
        tau = _std(random_mixture(d).prior)
        gates: list[tuple[str, Sampler | None]] = [
            (EXACT, None),
            (WEIGHTED, HEUN),
            ("TransportLangevin, weighted", EULER),
            (UNWEIGHTED, replace(HEUN, resampling=None)),
            ("AFDPS, half", AFDPS(steps=120)),
            ("TDS, prior's tau", TDS(steps=120, prior_std=tau)),
        ]
        others: list[tuple[str, Sampler | None]] = [
            ("TDS, tau 1", TDS(steps=120)),
            ("AFDPS, half, lam 2", AFDPS(steps=120, stochasticity=2.0)),
            ("AFDPS, half, 30 steps", AFDPS(steps=30)),
            ("AFDPS, laplacian", AFDPS(steps=120, form="laplacian")),
            ("AFDPS, laplacian, lam 0.3", AFDPS(steps=120, form="laplacian", stochasticity=0.3)),
            ("AFDPS, ode", AFDPS(steps=60, form="ode")),
            ("MCGDiff", MCGDiff(steps=120)),
            ("MCGDiff, bridge False", MCGDiff(steps=120, bridge=False)),
            ("FPS, averaged", FPS(steps=120)),
            ("FPS, drawn", FPS(steps=120, trajectory="drawn")),
            ("FKSteering, difference", FKSteering(steps=120, prior_std=tau)),
            ("FKSteering, maximum", FKSteering(steps=120, prior_std=tau, potential="maximum")),
            ("FKSteering, plain", FKSteering(steps=120, prior_std=tau, path=Noised(kappa=0.0))),
            ("ImportanceSampling", ImportanceSampling(steps=120)),
            ("DMCMC, 20 evaluations", DMCMC()),
            *((f"DPS, scale {z:g}", DPS(steps=120, scale=z)) for z in (0.03, 0.1, 0.3, 1.0)),
            ("PiGDM, Jacobian", PiGDM(steps=120)),
            ("DAPS", DAPS(steps=60)),
        ]
        for chosen, runs in ((gates, plan.runs), (others, plan.few)):
            for label, sampler in chosen:
                yield Job(
                    part="mixtures", problem=f"mixture-{d}", label=label, sampler=sampler, particles=plan.particles,
                    runs=runs,
                )  # fmt: skip


def _others(plan: Plan) -> Iterator[Job]:
    """Other measurements of the same mixtures, those of draws of the prior."""
    for d in plan.dimensions:
        for label, sampler in (
            (EXACT, None),
            (WEIGHTED, HEUN),
            (UNWEIGHTED, replace(HEUN, resampling=None)),
        ):
            yield Job(
                part="other measurements", problem=f"mixture-{d}", label=label, sampler=sampler,
                particles=plan.particles, runs=plan.runs,
            )  # fmt: skip


def _varied(plan: Plan) -> Iterator[Job]:
    """Particles, and steps."""
    for d in plan.dimensions:
        for n in plan.sizes:
            for label, sampler in ((EXACT, None), (WEIGHTED, HEUN)):
                yield Job(
                    part="particles", problem=f"mixture-{d}", label=label, sampler=sampler, particles=n, runs=plan.runs
                )
    d = 4 if 4 in plan.dimensions else plan.dimensions[0]
    for steps in plan.steps:
        yield Job(
            part="steps", problem=f"mixture-{d}", label="AFDPS, half", sampler=AFDPS(steps=steps), particles=plan.many,
            runs=plan.runs,
        )  # fmt: skip


def _wide(plan: Plan) -> Iterator[Job]:
    """Live modes in 64 dimensions, ``runs`` measurements."""
    for label, sampler in (
        (EXACT, None),
        ("TransportLangevin, weighted", replace(EULER, steps=60)),
        (WEIGHTED, HEUN),
        (UNWEIGHTED, replace(HEUN, resampling=None)),
    ):
        yield Job(part="wide", problem="mixture-64", label=label, sampler=sampler, particles=plan.wide, runs=plan.runs)


def _ring(plan: Plan) -> Iterator[Job]:
    """Every sampler that needs no linear problem."""
    path, inner, tau = Tempered(scale=RING_STD), Langevin(slope=1.0), _std(ring_prior())
    rows: list[tuple[str, Sampler | None]] = [
        (EXACT, None),
        (WEIGHTED, replace(HEUN, path=path, slope=1.0)),
        ("TransportLangevin, weighted", replace(EULER, path=path, slope=1.0)),
        (UNWEIGHTED, replace(HEUN, resampling=None, path=path, slope=1.0)),
        ("AFDPS, half", AFDPS(steps=120)),
        ("AFDPS, laplacian, lam 0.3", AFDPS(steps=120, form="laplacian", stochasticity=0.3)),
        ("AFDPS, ode", AFDPS(steps=60, form="ode")),
        ("TDS, prior's tau", TDS(steps=120, prior_std=tau)),
        ("FKSteering, difference", FKSteering(steps=120, prior_std=tau)),
        ("ImportanceSampling", ImportanceSampling(steps=120)),
        ("DMCMC, 20 evaluations", DMCMC(path=path, slope=1.0)),
        ("DPS, scale 0.03", DPS(steps=120, scale=0.03)),
        ("DPS, scale 0.3", DPS(steps=120, scale=0.3)),
        ("DAPS", DAPS(steps=60, inner=inner)),
    ]
    for label, sampler in rows:
        yield Job(
            part="ring", problem="ring", label=label, sampler=sampler, particles=plan.particles,
            runs=plan.few if label == "DAPS" else plan.runs,
        )  # fmt: skip


def _chains(plan: Plan) -> Iterator[Job]:
    """DMCMC where modes overlap and where they are parted, and with too few rungs."""
    for apart in (OVERLAPPING, PARTED):
        rows: list[tuple[str, Sampler | None]] = [(EXACT, None), ("DMCMC", DMCMC())]
        rows += [("DMCMC, 2 rungs", DMCMC(rungs=2))] if apart == PARTED else []
        for label, sampler in rows:
            yield Job(
                part="chains", problem=f"modes-{apart:g}-apart", label=label, sampler=sampler, particles=plan.draws,
                runs=CHAINS * plan.chain_runs,
            )  # fmt: skip


def _std(prior: MixturePrior) -> float:
    return float(prior.covariance.diagonal().mean().sqrt())
