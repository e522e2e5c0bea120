"""Control of Burgers' equation: what no forcing, the data's own and the adjoint optimum cost, on held-out cases.

    python -m invdiff.bench.burgers_control --out docs/burgers_control.json --table docs/burgers_control_table.md

Each case is a random initial state and forcing of its setting; the target is where that forcing leads, so that it can
be reached. J and its parts are judged by a solver with finer cells than the one that a method asked. Rows of other
methods, which learn or sample, join these; the adjoint optimum is what a gradient through the true equation reaches.
"""

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import mean_and_error, write
from invdiff.pde.burgers_control import BurgersCost, optimal_forcing
from invdiff.pde.burgers_data import BurgersSetting, Partial, burgers_cases

SEED, CASES, REFINE, JUDGE = 1, 50, 2, 4
"""Seed of held-out cases (training takes 0), their number, and the cells in a control cell: searching, judging."""
SETTINGS: Mapping[str, tuple[str, str, float]] = {
    "burgers-control": ("wdno", "none", 2e-5),
    **{f"burgers-control-short, {p}": ("diffphycon", p, 0.0) for p in get_args(Partial)},
}
"""Setting, what is withheld, and the weight of the energy."""
Search = Callable[[BurgersCost, Tensor], tuple[Tensor, int]]


def methods(calls: int) -> dict[str, Search]:
    """Return searches: (cost, the data's forcing) to a forcing, and the solver calls that it took."""

    def adjoint(cost: BurgersCost, _: Tensor) -> tuple[Tensor, int]:
        found = optimal_forcing(cost, calls=calls)
        return found.forcing, found.calls

    return {
        "no forcing": lambda cost, f: (torch.zeros_like(f), 0),  # noqa: ARG005
        "the data's own": lambda cost, f: (f, 0),  # noqa: ARG005
        f"adjoint L-BFGS, {calls} calls": adjoint,
    }


def run(name: str, cases: int, calls: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row a method."""
    which, partial, weight = SETTINGS[name]
    setting = BurgersSetting.named(which, cast(Partial, partial))
    initial, forcing = burgers_cases(setting, range(cases), seed=SEED)
    search, judge = setting.solver(REFINE), setting.solver(JUDGE)
    target = judge(initial, forcing)[:, -1]
    masks: dict[str, Any] = {"observed": setting.observed, "controlled": setting.controlled, "weight": weight}
    every: dict[str, Search] = {}
    for number in calls:
        every |= methods(number)
    rows = []
    for label, method in every.items():
        scores: dict[str, list[float]] = {"J": [], "misfit": [], "energy": [], "calls": [], "seconds": []}
        for i in range(cases):
            began = time.perf_counter()
            found, asked = method(BurgersCost(search, initial[i], target[i], **masks), forcing[i])
            scores["seconds"].append(time.perf_counter() - began)
            with torch.no_grad():
                true = BurgersCost(judge, initial[i], target[i], **masks)
                misfit, energy = float(true.misfit(found[None])), float(true.energy(found[None]))
            for key, value in (("J", misfit + weight * energy), ("misfit", misfit), ("energy", energy)):
                scores[key].append(value)
            scores["calls"].append(float(asked))
        figures = {key: [float(f"{v:.5g}") for v in mean_and_error(values)] for key, values in scores.items()}
        each = [float(f"{v:.4g}") for v in scores["J"]]
        rows.append({"setting": name, "method": label, "cases": cases, **figures, "each_J": each})
    return rows


def table(report: Mapping[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    text = [f"Made from `{source}` by `python -m invdiff.bench.burgers_control`; not edited by hand.", ""]
    text.append(
        f"{report['cases']} held-out cases; searched with {REFINE} and judged with {JUDGE} cells in a control cell; "
        f"{report['device']}, {versions}. Means with standard errors over cases."
    )
    for name in dict.fromkeys(r["setting"] for r in report["rows"]):
        text += ["", f"### {name}", "", "| method | J | misfit of the final state | energy | solver calls | s a case |"]
        text += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for r in report["rows"]:
            if r["setting"] == name:
                cells = [f"{r[key][0]:.3g} ± {r[key][1]:.1g}" for key in ("J", "misfit", "energy")]
                cells += [f"{r['calls'][0]:.0f}", f"{r['seconds'][0]:.2f}"]
                text.append(f"| {r['method']} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the settings and write the files as they grow."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.burgers_control", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--calls", type=int, nargs="+", default=[20, 100], help="solver calls of the adjoint search")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS))
    options = parser.parse_args(arguments)
    versions = {"invdiff": invdiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
    report: dict[str, Any] = {
        "benchmark": "burgers-control",
        "cases": options.cases,
        "seed": SEED,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "rows": [],
    }
    for name in options.settings:
        report["rows"] += run(name, options.cases, tuple(options.calls))
        write(options.out, report)
        print(name, flush=True)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


if __name__ == "__main__":
    main()
