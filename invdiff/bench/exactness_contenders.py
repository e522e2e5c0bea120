"""Who meets on the exactness benchmark: our samplers and deepinv's, with their settings and numbers of steps."""

from typing import Any

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

Row = tuple[str, Sampler, tuple[int, ...]]
"""Label, settings and the numbers of steps to run."""
Peer = tuple[str, str, dict[str, Any], int]
"""Label, name, settings and steps of one of deepinv's."""


def ours(*, quick: bool) -> list[Row]:
    """Our samplers by label, with the numbers of steps to run."""
    few = (10, 30) if quick else (10, 30, 90)
    rows: list[Row] = [
        ("PiGDM, Jacobian, 30 CG iterations", PiGDM(covariance=Jacobian(max_iterations=30)), few),
        ("PiGDM, Spectral", PiGDM(covariance=Spectral()), few),
        ("PiGDM, Isotropic, prior_std 1", PiGDM(covariance=Isotropic()), few[1:]),
        ("PiGDM, Isotropic, prior_std 0.2", PiGDM(covariance=Isotropic(prior_std=0.2)), few[1:]),
        *((f"DPS, scale {z:g}", DPS(scale=z), (50,) if quick else (1000,)) for z in (0.03, 0.1, 0.3, 1.0)),
        ("DAPS, Langevin", DAPS(), (5,) if quick else (25, 100)),
        ("DAPS, ExactInner", DAPS(inner=ExactInner()), few[:1] if quick else (25, 100, 400)),
        ("DAPS, ExactInner, ode_steps 5", DAPS(inner=ExactInner(), ode_steps=5), few[:1] if quick else (100, 400)),
        ("TransportLangevin, 4 refreshes", TransportLangevin(), (4,) if quick else (6, 20, 60)),
        (
            "TransportLangevin, 4 refreshes, resampled",
            TransportLangevin(resampling=Systematic()),
            (4,) if quick else (20, 60),
        ),
        ("SplitGibbs", SplitGibbs(), few if quick else (10, 30, 100, 400)),
        ("SplitGibbs, prior_steps 4", SplitGibbs(prior_steps=4), few[:1] if quick else (25, 100)),
        ("DDRM", DDRM(), few[:1] if quick else (20, 100)),
        ("DDRM, eta 1", DDRM(eta=1.0), few[:1] if quick else (100,)),
        ("DDNM", DDNM(), few[:1] if quick else (20, 100)),
        ("DDNM, eta 0.85", DDNM(eta=0.85), few[:1] if quick else (100,)),
        ("DiffPIR", DiffPIR(), few[:1] if quick else (20, 100)),
        ("DiffPIR, zeta 1", DiffPIR(zeta=1.0), few[:1] if quick else (100,)),
        ("RED-diff", REDDiff(), few[:1] if quick else (100, 400)),
        ("ULA", ULA(), (100,) if quick else (100, 1000, 4000)),
    ]
    return rows


def peers(*, quick: bool) -> list[Peer]:
    """Deepinv's samplers: label, name, settings and steps."""
    matching: dict[str, Any] = {"fidelity": "MomentMatching", "cg_max_iter": 25, "denoise_output": False}
    label = "VP ancestral, MomentMatching, 25 CG iterations"
    rows: list[Peer] = [
        ("DPS, default", "DPS", {"num_steps": 50} if quick else {}, 50 if quick else 1000),
        ("DDRM, default", "DDRM", {}, 100),
        ("DiffPIR, default", "DiffPIR", {}, 100),
        ("DiffPIR, lambda_ 1, zeta 1", "DiffPIR", {"lambda_": 1.0, "zeta": 1.0}, 100),
    ]
    for times, steps in (("quadratic", 60), ("quadratic", 200), ("linear", 200)):
        if steps == 60 or not quick:
            settings = {**matching, "num_steps": steps, "times": times}
            rows.append((f"{label}, {times} times", "PosteriorDiffusion", settings, steps))
    return rows


def weighted(*, quick: bool) -> list[Row]:
    """Our weighted samplers, for problems of few values or of which little is measured."""
    rows: list[Row] = [
        ("ImportanceSampling", ImportanceSampling(), (10, 30, 90)),
        ("AFDPS", AFDPS(), (30, 90, 270)),
        ("MCGDiff", MCGDiff(), (30, 90, 270)),
        ("FPS", FPS(), (30, 90, 270)),
        ("TDS", TDS(), (30, 90, 270)),
        ("FKSteering", FKSteering(), (30, 90, 270)),
        ("TransportLangevin, 4 refreshes, resampled", TransportLangevin(resampling=Systematic()), (6, 20, 60)),
    ]
    return [(label, sampler, counts[:1] if quick else counts) for label, sampler, counts in rows]


def on_trajectories(*, quick: bool) -> list[Row]:
    """Our samplers on trajectories in the wavelet domain, where the measurement has no singular value decomposition.

    Those that solve for the measurement do so by conjugate gradients, which makes each of their steps dear, so that
    they have fewer than on the fields.
    """
    resampled = TransportLangevin(resampling=Systematic())
    chains = DMCMC(steps=60, rungs=8, burn_in=120, keep=1, levels=Levels(rho=-4.0, sigma_min=0.01))
    rows: list[Row] = [
        ("PiGDM, Jacobian, 30 CG iterations", PiGDM(covariance=Jacobian(max_iterations=30)), (10, 30, 90)),
        ("PiGDM, Isotropic, prior_std 1", PiGDM(covariance=Isotropic()), (30, 90)),
        *((f"DPS, scale {z:g}", DPS(scale=z), (300,)) for z in (0.1, 0.3)),
        ("DAPS, Langevin", DAPS(), (25,)),
        ("DAPS, ExactInner", DAPS(inner=ExactInner()), (25,)),
        ("TransportLangevin, 4 refreshes", TransportLangevin(), (20, 60)),
        ("TransportLangevin, 4 refreshes, resampled", resampled, (20, 60, 200)),
        ("SplitGibbs", SplitGibbs(), (30, 100)),
        ("SplitGibbs, last rho 0.01", SplitGibbs(levels=Levels(rho=-4.0, sigma_min=0.01)), (100,)),
        ("DDRM", DDRM(), (20,)),
        ("DDNM", DDNM(), (20,)),
        ("DiffPIR", DiffPIR(), (20,)),
        ("RED-diff", REDDiff(), (100,)),
        ("ULA", ULA(), (1000,)),
        ("DMCMC, 8 rungs from 0.01", chains, (60,)),
        ("PCN, prior_steps 40", PCN(prior_steps=40), (20,)),
        ("AFDPS", AFDPS(), (90, 270)),
        ("MCGDiff", MCGDiff(), (90,)),
        ("FPS", FPS(), (90,)),
        ("TDS", TDS(), (90, 270)),
        ("FKSteering", FKSteering(), (90, 270)),
    ]
    return [(label, sampler, counts[:1]) for label, sampler, counts in rows] if quick else rows
