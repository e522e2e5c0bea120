"""Who meets on Gaussian fields: every sampler of the library and deepinv's, each with some settings, by network passes.

Where a sampler has a strength that must suit the noise, several are run, its default among them, so that none is judged
by one that does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from invdiff.bench.deepinv_samplers import Settings
from invdiff.samplers import (
    AFDPS,
    DAPS,
    DDNM,
    DDRM,
    DMCMC,
    DPS,
    FPS,
    PCN,
    TDS,
    ULA,
    DiffPIR,
    ExactInner,
    FKSteering,
    ImportanceSampling,
    Isotropic,
    Jacobian,
    Levels,
    MCGDiff,
    PiGDM,
    REDDiff,
    Sampler,
    Spectral,
    SplitGibbs,
    Systematic,
    TransportLangevin,
)

EXACT, MATCHING, GUIDED, SPLIT, PARTICLES, SPECTRAL, PLUGGED, CHAINS = range(8)
"""Kinds of samplers, a colour each: refreshed transport, moment matching, guidance by gradients, splitting, weighted
particles, projections in the operator's basis, plug-and-play, and Markov chains."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A sampler on the frontier.

    Parameters
    ----------
    name
        In the file and the figure.
    kind
        One of the constants above.
    ours
        Settings of a sampler of the library, of which `at` changes the steps.
    theirs
        Passes -> settings of deepinv's sampler ``peer``, or None where it takes more; by name of the settings.
    peer
        Name in `invdiff.bench.deepinv_samplers`.
    """

    name: str
    kind: int
    ours: tuple[Sampler, ...] = ()
    theirs: tuple[Callable[[int], Settings | None], ...] = ()
    peer: str = ""

    @property
    def library(self) -> str:
        """Where it comes from."""
        return "deepinv" if self.peer else "invdiff"


def at(sampler: Sampler, passes: int) -> Sampler | None:
    """Return a sampler with the most steps that take at most that many passes, forward and backward; None if none do.

    Every sampler's step takes one pass at least.
    """

    def cost(steps: int) -> tuple[Sampler, int]:
        chosen: Any = replace(sampler, steps=steps)
        return chosen, chosen.cost().forward + chosen.cost().backward

    low, high = 0, passes + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle)[1] <= passes else (low, middle)
    return cost(low)[0] if low else None


def recommended(largest_std: float) -> TransportLangevin:
    """Transport with momentum as the gate runs it: 3 evaluations a level.

    Levels begin at five times the largest standard deviation of any direction, where a Gaussian start errs by 4e-4 nats
    a direction, and are nearly even in log sigma: what carries the evidence lies between there and the noise.
    """
    return TransportLangevin(
        refreshes=2, step_size=0.5, momentum=0.6, levels=Levels(rho=-10.0, sigma_max=5.0 * largest_std)
    )


def contenders(largest_std: float, value_std: float) -> tuple[Contender, ...]:
    """All of them, for a field whose widest direction and whose single values have these standard deviations."""
    best = recommended(largest_std)

    def steps_of(name: str, each: float, **fixed: Any) -> Callable[[int], Settings | None]:
        def settings(passes: int) -> Settings | None:
            steps = int(passes / each)
            return {**fixed, name: steps} if steps >= 3 else None

        return settings

    matching = {"fidelity": "MomentMatching", "denoise_output": False, "times": "quadratic"}
    return (
        Contender(name="TransportLangevin, momentum", kind=EXACT, ours=(best,)),
        Contender(name="TransportLangevin", kind=EXACT, ours=(TransportLangevin(),)),
        Contender(name="TransportLangevin, weighted", kind=EXACT, ours=(TransportLangevin(resampling=Systematic()),)),
        # Solved to a thousandth of the posterior's width: in float64 the default, 1e-11, is there for other checks.
        Contender(name="PiGDM, Spectral", kind=MATCHING, ours=(PiGDM(covariance=Spectral(atol=1e-3)),)),
        Contender(
            name="PiGDM, Jacobian",
            kind=MATCHING,
            ours=tuple(PiGDM(covariance=Jacobian(max_iterations=k)) for k in (3, 10)),
        ),
        Contender(
            name="PiGDM, Isotropic",
            kind=MATCHING,
            ours=tuple(PiGDM(covariance=Isotropic(prior_std=s * value_std)) for s in (0.3, 1.0)),
        ),
        Contender(name="DPS", kind=GUIDED, ours=tuple(DPS(scale=z) for z in (0.03, 0.1, 0.3))),
        Contender(name="DAPS, Langevin", kind=SPLIT, ours=(DAPS(),)),
        Contender(name="DAPS, ExactInner", kind=SPLIT, ours=(DAPS(inner=ExactInner()),)),
        Contender(name="SplitGibbs", kind=SPLIT, ours=(SplitGibbs(),)),
        Contender(name="DDRM", kind=SPECTRAL, ours=(DDRM(), DDRM(eta=1.0))),
        Contender(name="DDNM", kind=SPECTRAL, ours=(DDNM(), DDNM(eta=0.85))),
        Contender(name="DiffPIR", kind=PLUGGED, ours=(DiffPIR(), DiffPIR(zeta=0.3), DiffPIR(zeta=1.0))),
        Contender(name="RED-diff", kind=PLUGGED, ours=(REDDiff(), REDDiff(lam=1.0))),
        Contender(name="ULA", kind=CHAINS, ours=(ULA(),)),
        Contender(name="DMCMC", kind=CHAINS, ours=(DMCMC(keep=8), DMCMC(rungs=24, burn_in=60, keep=8))),
        Contender(name="AFDPS", kind=PARTICLES, ours=(AFDPS(),)),
        Contender(name="FPS", kind=PARTICLES, ours=(FPS(),)),
        Contender(name="MCGDiff", kind=PARTICLES, ours=(MCGDiff(),)),
        Contender(name="TDS", kind=PARTICLES, ours=(TDS(),)),
        Contender(name="FK steering", kind=PARTICLES, ours=(FKSteering(),)),
        Contender(name="PCN", kind=PARTICLES, ours=(PCN(), PCN(moves=1))),
        Contender(name="importance sampling", kind=PARTICLES, ours=(ImportanceSampling(),)),
        Contender(
            name="deepinv DPS",
            kind=GUIDED,
            peer="DPS",
            theirs=tuple(steps_of("num_steps", 2, weight=w) for w in (1.0, 100.0, 1000.0)),
        ),
        Contender(name="deepinv DDRM", kind=SPECTRAL, peer="DDRM", theirs=(steps_of("num_steps", 1),)),
        Contender(
            name="deepinv DiffPIR",
            kind=PLUGGED,
            peer="DiffPIR",
            theirs=(steps_of("max_iter", 1), steps_of("max_iter", 1, lambda_=1.0, zeta=1.0)),
        ),
        Contender(
            name="deepinv MomentMatching",
            kind=MATCHING,
            peer="PosteriorDiffusion",
            # Beside the passes of the conjugate gradients, three a step.
            theirs=tuple(steps_of("num_steps", k + 3, cg_max_iter=k, **matching) for k in (5, 25)),
        ),
    )
