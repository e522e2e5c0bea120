"""Simulation of Burgers' equation on held-out cases: trained priors beside coarser solvers and a published figure.

    python -m invdiff.bench.burgers_simulate --out docs/burgers_simulate.json --table docs/burgers_simulate_table.md
        [--others FOLDER ...]

The score is WDNO's: the mean squared error of the whole trajectory without its first state, against a solver with finer
cells than any other row's. A prior is told the initial state and the forcing and asked for the states at a few noise
levels (`PriorSolver`). A last row gives the spread of the states themselves, what an answer of their mean would score.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import mean_and_error, write
from invdiff.pde import BurgersSetting, PriorSolver, burgers_cases

SEED, CASES, JUDGE, COARSER = 1, 50, 4, (1, 2, 3)
"""Seed of held-out cases (training takes 0 and 2), their number, and cells in a control cell: of the truth, of rows."""
LEVELS = ((80.0,), (80.0, 1.0), (80.0, 4.0, 1.0, 0.3), (80.0, 16.0, 4.0, 1.5, 0.6, 0.3, 0.1, 0.03))
PUBLISHED = {"WDNO, published": 1.4e-4, "DDPM of pixels, published": 1.3e-4}
"""Hu et al. 2025, ICLR: networks of 141 million parameters, other cases; solved again with their own solver, their data
differ from themselves by 3.1e-4, since what is stored of a forcing is not what was solved with."""


def rows_of(solve: Callable[[Tensor, Tensor], Tensor], cases: int, truth: Tensor) -> dict[str, Any]:
    """Error of each case, solved ten at a time, and seconds a case."""
    setting = BurgersSetting.named("wdno")
    initial, forcing = burgers_cases(setting, range(cases), seed=SEED)
    with torch.no_grad():
        solve(initial[:1], forcing[:1])  # what is made once does not count
        began = time.perf_counter()
        parts = [solve(initial[i : i + 10], forcing[i : i + 10]) for i in range(0, cases, 10)]
    seconds = (time.perf_counter() - began) / cases
    each = (torch.cat(parts) - truth)[:, 1:].square().mean((1, 2))
    mean, error = mean_and_error(each.tolist())
    figures = {"mse": mean, "error": error, "median": float(each.median()), "worst": float(each.max())}
    return {k: float(f"{v:.4g}") for k, v in figures.items()} | {"seconds": float(f"{seconds:.3g}")}


def run(cases: int, others: list[str]) -> list[dict[str, Any]]:
    """One row a solver, a prior and its noise levels."""
    setting = BurgersSetting.named("wdno")
    initial, forcing = burgers_cases(setting, range(cases), seed=SEED)
    with torch.no_grad():
        truth = setting.solver(JUDGE)(initial, forcing)
    rows = []
    for refine in COARSER:
        found = rows_of(setting.solver(refine), cases, truth)
        rows.append({"method": f"solver, refine={refine}", "evaluations": 0, **found})
    for where in ("burgers-wavelet", *others):
        prior = invdiff.load_prior(where)
        name = str(prior.name).removeprefix("wavelets of ")
        for levels in LEVELS[:1] if name.endswith("surrogate") else LEVELS:
            found = rows_of(PriorSolver(prior, levels=levels), cases, truth)  # type: ignore[arg-type]
            rows.append({"method": name, "levels": levels, "evaluations": len(levels), **found})
            print(rows[-1], flush=True)
    spread = (truth - truth.mean((1, 2), keepdim=True))[:, 1:].square().mean((1, 2))
    mean, error = mean_and_error(spread.tolist())
    rows.append({"method": "mean of the trajectory", "mse": float(f"{mean:.4g}"), "error": float(f"{error:.4g}")})
    return rows


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    text = [f"Made from `{source}` by `python -m invdiff.bench.burgers_simulate`; not edited by hand.", ""]
    text.append(
        f"{report['cases']} held-out cases of WDNO's setting; the truth has {JUDGE} cells in a control cell; "
        f"{report['device']}, {versions}. Mean squared error of trajectories without the first state, with its "
        "standard error over cases; levels are of noise, latent units."
    )
    text += ["", "| method | levels | evaluations | mean squared error | median | worst | s a case |"]
    text += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for r in report["rows"]:
        levels = ", ".join(f"{v:g}" for v in r.get("levels", ()))
        cells = [f"{r['mse']:.2e} ± {r['error']:.0e}"]
        cells += [f"{r[k]:.2e}" if k in r else "" for k in ("median", "worst")]
        cells += [f"{r['seconds']:.3f}" if "seconds" in r else ""]
        text.append(f"| {r['method']} | {levels} | {r.get('evaluations', '')} | " + " | ".join(cells) + " |")
    for method, value in PUBLISHED.items():
        text.append(f"| *{method}* |  |  | *{value:.1e}* |  |  |  |")
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run and write the files."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.burgers_simulate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--others", nargs="*", default=[], help="folders of priors that are not shipped")
    options = parser.parse_args(arguments)
    versions = {"invdiff": invdiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
    report: dict[str, Any] = {
        "benchmark": "burgers-simulate",
        "cases": options.cases,
        "seed": SEED,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "rows": run(options.cases, options.others),
    }
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
