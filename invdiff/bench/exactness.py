"""How right samplers are: ours and deepinv's against exact posteriors, as one JSON file and a table made from it.

    python -m invdiff.bench.exactness --out docs/exactness.json --table docs/exactness_table.md [--quick]
        [--problems NAME ...] [--only SAMPLER ...]
    python -m invdiff.bench.exactness --merge PART PART ... --out docs/exactness.json --table ...

Every sampler gets the exact denoiser of a Gaussian law, so that all error is its own; ours run in float64, deepinv's as
`invdiff.bench.exactness_deepinv` says. ``--problems`` and ``--only`` run these alone and put their rows into the file
there is, in the place of those of the same sampler; ``--merge`` does so with files that were run apart. The file holds
no times and repeats on one kind of machine.
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
from invdiff.bench.exactness_contenders import Peer, Row, on_trajectories, ours, peers, weighted
from invdiff.diagnostics.exactness import (
    ALLOWANCE,
    Exactness,
    ExactProblem,
    field_problems,
    measure,
    measure_solution,
    plane_problem,
)
from invdiff.diagnostics.trajectories import trajectory_problems, weak_trajectory_problem
from invdiff.errors import CatalogueError, InputError
from invdiff.posterior import Posterior
from invdiff.samplers import Sampler
from invdiff.solve import solve

DRAWS, SEED = 400, 0
CHAINS = 8
"""Ensembles of DRAWS particles each, for the sampler that estimates the evidence."""


def row(
    case: ExactProblem, library: str, label: str, settings: str, steps: int | None, found: Exactness, **more: Any
) -> dict[str, Any]:
    """One row of the file: figures, and those that exact draws would not give."""
    figures = {k: v if k == "bounds" or v is None else round(v, 4) for k, v in asdict(found).items()}
    if found.off_support is None:
        del figures["off_support"]
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


def program(*, quick: bool) -> list[tuple[ExactProblem, list[Row], list[Peer], int]]:
    """Problems, who runs on them, of ours and of deepinv's, and in how many ensembles of the draws.

    deepinv's samplers take pictures and their operators, so that they meet the fields alone.
    """
    return [
        *((case, ours(quick=quick), peers(quick=quick), 1) for case in field_problems()),
        (plane_problem(), weighted(quick=quick), [], CHAINS),
        *((case, on_trajectories(quick=quick), [], 1) for case in trajectory_problems()),
        (weak_trajectory_problem(), weighted(quick=quick), [], CHAINS),
    ]


def collect(*, quick: bool, only: Sequence[str] = (), problems: Sequence[str] = ()) -> dict[str, Any]:
    """Run everything, or the samplers or problems of these names alone.

    Raises
    ------
    CatalogueError
        If a name is not that of a problem.
    """
    known = [case.name for case, *_ in program(quick=quick)]
    for name in problems:
        if name not in known:
            raise CatalogueError.unknown("problem of the benchmark", name, known)
    draws = 100 if quick else DRAWS
    ran: list[ExactProblem] = []
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []

    def add(found: dict[str, Any]) -> None:
        rows.append(found)
        shown = ("problem", "library", "sampler", "steps", "whitened", "variance_ratio", "mass")
        print(json.dumps({k: found[k] for k in shown}))

    for case, rows_of, others, chains in program(quick=quick):
        if problems and case.name not in problems:
            continue
        ran.append(case)
        found = measure(case.exact.sample(chains * draws, seed=SEED), case.exact)
        add(row(case, "", "exact draws (the noise floor)", "", None, found, evaluations=0.0, backward=0.0))
        for label, sampler, counts in rows_of:
            if only and label not in only:
                continue
            if missing := sampler.requires() - Posterior(case.problem, case.prior).capabilities:
                reason = f"needs {', '.join(sorted(missing))}, which this problem and prior do not have"
                left_out.append({"problem": case.name, "library": "invdiff", "sampler": label, "reason": reason})
                continue
            for steps in counts:
                add(run_ours(case, label, sampler, steps, draws=draws, chains=chains))
        for label, name, settings, steps in others if find_spec("deepinv") and not only else []:
            operator: Any = case.problem.likelihood.operator
            if reason := why_not(name, operator):
                left_out.append({"problem": case.name, "sampler": label, "reason": reason})
                continue
            run = exactness_deepinv.run(name, settings, case, draws, SEED)
            passes = {"evaluations": round(run.evaluations, 2), "backward": round(run.backward, 2)}
            add(row(case, "deepinv", label, f"{name}({settings})", steps, measure(run.draws, case.exact), **passes))
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
            {"name": c.name, "shape": list(c.exact.mean.shape), "measured": c.problem.likelihood.measurements}
            for c in ran
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
        singular = any("off_support" in r for r in rows)
        head += ["off support"] if singular else []
        head += ["log evidence error"] if evidence else []
        shape = " x ".join(map(str, problem["shape"]))
        text += ["", f"### {name}", "", f"{shape} values, {problem['measured']} measured.", ""]
        text += ["| " + " | ".join(head) + " |", "|" + "|".join([" --- "] * 3 + [" ---: "] * (len(head) - 3)) + "|"]
        columns = [(key, digits) for key, (_, digits) in _COLUMNS.items()] + [("off_support", 3)] * singular
        for r in rows:
            passes = f"{r['evaluations']:.0f} + {r['backward']:.0f}" if r["steps"] else ""
            cells = [r["library"], r["sampler"], str(r["steps"] or ""), passes]
            for key, digits in columns:
                figure = f"{r[key]:.{digits}f}"
                cells.append(f"**{figure}**" if key in r["outside"] else figure)
            if evidence:
                error = r["log_evidence_error"]
                figure = "" if error is None else f"{error:+.3f}"
                cells.append(f"**{figure}**" if "log_evidence_error" in r["outside"] else figure)
            text.append("| " + " | ".join(cells) + " |")
        left_out = [o for o in report["left_out"] if o["problem"] == name]
        text += [f"\nLeft out: {o['sampler']} of {o.get('library', 'deepinv')}, which {o['reason']}." for o in left_out]
    return "\n".join(text) + "\n"


def update(old: dict[str, Any], new: dict[str, Any], only: Sequence[str] = ()) -> dict[str, Any]:
    """Put the new rows of samplers in the place of their old ones, or at the end of their problem.

    Old rows of those that were run, ``only``, and have no new ones go: a sampler that has left the benchmark.

    Raises
    ------
    InputError
        If the two were not made alike.
    """
    for name in old.keys() - {"rows", "left_out", "problems"}:
        if old[name] != new[name]:
            raise InputError(f"The file's {name} is {old[name]}, this run's is {new[name]}; run everything again.")
    problems = {p["name"]: p for p in old["problems"]}
    for p in new["problems"]:
        if problems.setdefault(p["name"], p) != p:
            raise InputError(f"The file's problem is {problems[p['name']]}, this run's is {p}; run everything again.")
    ran = {p["name"] for p in new["problems"]}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for rows in (old["rows"], new["rows"]):
        seen: set[tuple[str, str, str]] = set()
        for r in rows:
            key = (r["problem"], r["library"], r["sampler"])
            groups[key] = [*groups.get(key, []), r] if key in seen else [r]  # a key keeps its place
            seen.add(key)
        gone = groups.keys() - seen  # after the second turn, what the new run has not
    order = list(problems)
    kept = (
        r for key, group in groups.items() if key not in gone or key[2] not in only or key[0] not in ran for r in group
    )
    rows = sorted(kept, key=lambda r: order.index(r["problem"]))
    left_out = old["left_out"] + [o for o in new["left_out"] if o not in old["left_out"]]
    return old | {"problems": list(problems.values()), "rows": rows, "left_out": left_out}


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.exactness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--quick", action="store_true", help="100 draws, few steps")
    parser.add_argument("--only", nargs="*", default=(), help="run these samplers of ours, into the file there is")
    parser.add_argument("--problems", nargs="*", default=(), help="run these problems, into the file there is")
    parser.add_argument("--merge", type=Path, nargs="+", help="put these files into the one there is; run nothing")
    options = parser.parse_args(arguments)
    # Tensors of a few thousand values: more threads cost more than they give.
    torch.set_num_threads(1)
    if options.merge:
        parts = [json.loads(path.read_text()) for path in options.merge]
        report = json.loads(options.out.read_text()) if options.out.exists() else parts[0]
        for part in parts:
            report = update(report, part)
    else:
        report = collect(quick=options.quick, only=options.only, problems=options.problems)
        if (options.only or options.problems) and options.out.exists():
            report = update(json.loads(options.out.read_text()), report, options.only)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    if options.table is not None:
        report = json.loads(options.out.read_text())
        options.table.write_text(table(report, options.out.as_posix(), options.table.as_posix()))


if __name__ == "__main__":
    main()
