"""How right samplers are: ours and deepinv's against exact posteriors, as one JSON file and a table made from it.

    python -m invdiff.bench.exactness --out docs/exactness.json --table docs/exactness_table.md [--quick]

Every sampler gets the exact denoiser of a Gaussian field, so that all error is its own; ours run in float64, deepinv's
as `invdiff.bench.exactness_deepinv` says. The file holds no times and repeats on one kind of machine.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import invdiff
from invdiff.bench import exactness_deepinv
from invdiff.bench.deepinv_samplers import why_not
from invdiff.diagnostics.exactness import (
    ALLOWANCE,
    Exactness,
    ExactProblem,
    field_problems,
    measure,
    measure_solution,
    plane_problem,
)
from invdiff.errors import InputError
from invdiff.samplers import (
    AFDPS,
    DAPS,
    DDNM,
    DDRM,
    DPS,
    FPS,
    TDS,
    ULA,
    DiffPIR,
    ExactInner,
    FKSteering,
    ImportanceSampling,
    Isotropic,
    Jacobian,
    MCGDiff,
    PiGDM,
    REDDiff,
    Sampler,
    Spectral,
    SplitGibbs,
    Systematic,
    TransportLangevin,
)
from invdiff.solve import solve

DRAWS, SEED = 400, 0
CHAINS = 8
"""Ensembles of DRAWS particles each, for the sampler that estimates the evidence."""


def ours(*, quick: bool) -> list[tuple[str, Sampler, tuple[int, ...]]]:
    """Our samplers by label, with the numbers of steps to run."""
    few = (10, 30) if quick else (10, 30, 90)
    rows: list[tuple[str, Sampler, tuple[int, ...]]] = [
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


def peers(*, quick: bool) -> list[tuple[str, str, dict[str, Any], int]]:
    """Deepinv's samplers: label, name, settings and steps."""
    matching: dict[str, Any] = {"fidelity": "MomentMatching", "cg_max_iter": 25, "denoise_output": False}
    label = "VP ancestral, MomentMatching, 25 CG iterations"
    rows: list[tuple[str, str, dict[str, Any], int]] = [
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


def row(
    case: ExactProblem, library: str, label: str, settings: str, steps: int | None, found: Exactness, **more: Any
) -> dict[str, Any]:
    """One row of the file: figures, and those that exact draws would not give."""
    figures = {k: v if k == "bounds" or v is None else round(v, 4) for k, v in asdict(found).items()}
    bounds = {k: [round(v, 4) for v in pair] for k, pair in figures.pop("bounds").items()}
    outside = [text.split()[0] for text in found.failures]
    head = {"problem": case.name, "library": library, "sampler": label, "settings": settings, "steps": steps}
    return {**head, **more, **figures, "bounds": bounds, "outside": outside}


def run_ours(
    case: ExactProblem, label: str, sampler: Sampler, steps: int, *, draws: int, chains: int = 1
) -> dict[str, Any]:
    """Run one of our samplers on one problem."""
    chosen: Sampler = replace(sampler, steps=steps)
    solution = solve(case.problem, case.prior, chosen, draws=draws, chains=chains, seed=SEED, dtype=torch.float64)
    about = solution.about
    return row(
        case,
        "invdiff",
        label,
        repr(chosen),
        steps,
        measure_solution(solution, case),
        evaluations=round(about["evaluations_per_draw"], 2),
        backward=round(about["backward_evaluations_per_draw"], 2),
        declared_exact=chosen.exact,
    )


def collect(*, quick: bool, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything, or the samplers of these names alone."""
    draws = 100 if quick else DRAWS
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []

    def add(found: dict[str, Any]) -> None:
        rows.append(found)
        shown = ("problem", "library", "sampler", "steps", "whitened", "variance_ratio", "mass")
        print(json.dumps({k: found[k] for k in shown}))

    exact = "exact draws (the noise floor)"
    for case in field_problems():
        found = measure(case.exact.sample(draws, seed=SEED), case.exact)
        add(row(case, "", exact, "", None, found, evaluations=0.0, backward=0.0))
        for label, sampler, counts in ours(quick=quick):
            for steps in counts if not only or label in only else ():
                add(run_ours(case, label, sampler, steps, draws=draws))
        for label, name, settings, steps in peers(quick=quick) if find_spec("deepinv") and not only else []:
            operator: Any = case.problem.likelihood.operator
            if reason := why_not(name, operator):
                left_out.append({"problem": case.name, "sampler": label, "reason": reason})
                continue
            run = exactness_deepinv.run(name, settings, case, draws, SEED)
            passes = {"evaluations": round(run.evaluations, 2), "backward": round(run.backward, 2)}
            add(row(case, "deepinv", label, f"{name}({settings})", steps, measure(run.draws, case.exact), **passes))
    plane = plane_problem()
    found = measure(plane.exact.sample(CHAINS * draws, seed=SEED), plane.exact)
    add(row(plane, "", exact, "", None, found, evaluations=0.0, backward=0.0))
    weighted: list[tuple[str, Sampler, tuple[int, ...]]] = [
        ("ImportanceSampling", ImportanceSampling(), (10, 30, 90)),
        ("AFDPS", AFDPS(), (30, 90, 270)),
        ("MCGDiff", MCGDiff(), (30, 90, 270)),
        ("FPS", FPS(), (30, 90, 270)),
        ("TDS", TDS(), (30, 90, 270)),
        ("FKSteering", FKSteering(), (30, 90, 270)),
        ("TransportLangevin, 4 refreshes, resampled", TransportLangevin(resampling=Systematic()), (6, 20, 60)),
    ]
    for label, sampler, counts in weighted:
        for steps in (counts[:1] if quick else counts) if not only or label in only else ():
            add(run_ours(plane, label, sampler, steps, draws=draws, chains=CHAINS))
    return {
        "benchmark": "exactness",
        "quick": quick,
        "draws": draws,
        "chains_on_the_plane": CHAINS,
        "seed": SEED,
        "allowance": ALLOWANCE,
        "device": "cpu",
        "dtype": {"invdiff": "float64", "deepinv": "float32 denoiser, the sampler's own defaults"},
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"deepinv": version("deepinv")} if find_spec("deepinv") else {}),
        },
        "problems": [
            {"name": c.name, "shape": list(c.prior.shape), "measured": c.problem.likelihood.measurements}
            for c in [*field_problems(), plane]
        ],
        "rows": rows,
        "left_out": left_out,
    }


_COLUMNS = {
    "mean_error": ("mean error / floor", 2),
    "variance_ratio": ("variance ratio", 3),
    "whitened": ("whitened norm", 3),
    "mass": ("mass of 90 % interval", 3),
    "covariance_error": ("covariance error / floor", 2),
}


def table(report: dict[str, Any], source: str, target: str) -> str:
    """Markdown from the file alone; figures that exact draws would not give are in bold."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    quick = " --quick" if report["quick"] else ""
    command = f"python -m invdiff.bench.exactness --out {source} --table {target}{quick}"
    about = (
        f"{report['draws']} draws a row, seed {report['seed']}, {report['device']}; {versions}. Exact draws give 1, 1, "
        "1, 0.9 and 1 up to chance; **bold** figures lie beyond four standard deviations of that and an allowance of "
        f"{report['allowance']:.0%} for discretisation. Passes: through the network, a draw, forward + backward."
    )
    text = [f"Made from `{source}` by `{command}`; not edited by hand.", "", about]
    for problem in report["problems"]:
        name, rows = problem["name"], [r for r in report["rows"] if r["problem"] == problem["name"]]
        evidence = any(r["log_evidence_error"] is not None for r in rows)
        head = ["library", "sampler", "steps", "passes", *(title for title, _ in _COLUMNS.values())]
        head += ["log evidence error"] if evidence else []
        shape = " x ".join(map(str, problem["shape"]))
        text += ["", f"### {name}", "", f"{shape} values, {problem['measured']} measured.", ""]
        text += ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * 3 + [" ---: "] * (len(head) - 3)) + "|"]
        for r in rows:
            passes = f"{r['evaluations']:.0f} + {r['backward']:.0f}" if r["steps"] else ""
            cells = [r["library"], r["sampler"], str(r["steps"] or ""), passes]
            for key, (_, digits) in _COLUMNS.items():
                figure = f"{r[key]:.{digits}f}"
                cells.append(f"**{figure}**" if key in r["outside"] else figure)
            if evidence:
                error = r["log_evidence_error"]
                figure = "" if error is None else f"{error:+.3f}"
                cells.append(f"**{figure}**" if "log_evidence_error" in r["outside"] else figure)
            text.append("| " + " | ".join(cells) + " |")
        left_out = [o for o in report["left_out"] if o["problem"] == name]
        text += [f"\nLeft out: {o['sampler']} of deepinv, which {o['reason']}." for o in left_out]
    return "\n".join(text) + "\n"


def update(old: dict[str, Any], new: dict[str, Any], only: Sequence[str] = ()) -> dict[str, Any]:
    """Put the new rows of samplers in the place of their old ones, or at the end of their problem.

    Old rows of those that were run, ``only``, and have no new ones go: a sampler that has left the benchmark.

    Raises
    ------
    InputError
        If the two were not made alike.
    """
    for name in old.keys() - {"rows", "left_out"}:
        if old[name] != new[name]:
            raise InputError(f"The file's {name} is {old[name]}, this run's is {new[name]}; run everything again.")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for rows in (old["rows"], new["rows"]):
        seen: set[tuple[str, str, str]] = set()
        for r in rows:
            key = (r["problem"], r["library"], r["sampler"])
            groups[key] = [*groups.get(key, []), r] if key in seen else [r]  # a key keeps its place
            seen.add(key)
        gone = groups.keys() - seen  # after the second turn, what the new run has not
    order = [p["name"] for p in new["problems"]]
    kept = (r for key, group in groups.items() if key not in gone or key[2] not in only for r in group)
    rows = sorted(kept, key=lambda r: order.index(r["problem"]))
    return old | {"rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.exactness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--quick", action="store_true", help="100 draws, few steps")
    parser.add_argument("--only", nargs="*", default=(), help="run these samplers of ours again, in the file there is")
    options = parser.parse_args(arguments)
    # Tensors of a few thousand values: more threads cost more than they give.
    torch.set_num_threads(1)
    report = collect(quick=options.quick, only=options.only)
    if options.only:
        report = update(json.loads(options.out.read_text()), report, options.only)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.table is not None:
        report = json.loads(options.out.read_text())
        options.table.write_text(table(report, options.out.as_posix(), options.table.as_posix()))


if __name__ == "__main__":
    main()
