"""Control of Burgers' equation on held-out cases: learned priors, solvers and baselines, judged by a finer solver.

    python -m invdiff.bench.burgers_control --out docs/burgers_control.json --table docs/burgers_control_table.md
        [--surrogate FOLDER] [--short FOLDER] [--processes 2]

Each case is a random initial state and forcing of its setting; the target is where that forcing leads, so that it can
be reached. J and its parts are judged by a solver with finer cells than the one that a method asked. The rows:

- no forcing, and the data's own, which is not cheap;
- PID in closed loop with the solver, its gains chosen on eight cases of another seed;
- the prior: `WDNO` draws a forcing, and a search that knows no solver either (`PriorSolver`) goes on from it;
- the surrogate: the same search from zero through a network trained to solve (``--surrogate``);
- L-BFGS through the solver's adjoint from zero, and from the prior's forcing, with the cost after every call.

Priors of the short setting are not shipped; ``--short`` takes one that was trained by its recipe.
"""

import argparse
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import invdiff
from invdiff.bench.rounds import mean_and_error, write
from invdiff.pde import BurgersCost, BurgersSetting, PriorSolver, burgers_cases, optimal_forcing, pid_forcing
from invdiff.problem import load_problem, read_problem_card
from invdiff.samplers import WDNO

SEED, TUNING, CASES, REFINE, JUDGE = 1, 3, 50, 2, 4
"""Seeds of held-out cases and of those that gains are chosen on (training takes 0 and 2), the number of held-out cases,
and the cells in a control cell: searching, judging."""
GAINS = tuple(product((0.3, 1.0, 3.0, 10.0), (0.0, 1.0), (0.0, 0.02)))
"""Gains of PID that are tried."""


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem of control, and how a search through a prior goes about it.

    Parameters
    ----------
    card
        Name of the problem.
    levels, draws
        Of `PriorSolver`.
    smooth, calls
        Of `optimal_forcing` through it.
    """

    card: str
    levels: tuple[float, ...] = (80.0, 1.0)
    draws: int = 2
    smooth: tuple[float, float] = (5.0, 8.0)
    calls: int = 24

    @property
    def grid(self) -> BurgersSetting:
        """Grid and law, as the card has them."""
        equation = _card(self.card).equation
        return BurgersSetting.named(equation.setting, equation.partial)

    @property
    def weight(self) -> float:
        """Of the energy."""
        return float(_card(self.card).control.weight)


@cache
def _card(name: str) -> Any:
    return read_problem_card(name)


SHORT = ("short", "partial-control", "partial-observation", "partial-both")
"""Settings of ten windows, which are not averaged."""
TASKS: Mapping[str, Task] = {"burgers-control": Task(card="burgers-control")} | {
    f"burgers-control-{s}": Task(card=f"burgers-control-{s}", draws=8, smooth=(0.01, 8.0), calls=16) for s in SHORT
}
CHOSEN_ON = 8
"""Held-out cases, the first ones, that settings of draws and searches were chosen on."""
Found = dict[str, Any]


@cache
def _prior(where: str) -> Any:
    return invdiff.load_prior(where)


def _cost(task: Task, initial: Tensor, target: Tensor, solver: Any) -> BurgersCost:
    grid = task.grid
    return BurgersCost(solver, initial, target, weight=task.weight, observed=grid.observed, controlled=grid.controlled)


@cache
def gains(name: str, cases: int = 8) -> tuple[float, float, float]:
    """Gains of PID with the lowest mean J on cases of another seed."""
    task = TASKS[name]
    grid = task.grid
    initial, forcing = burgers_cases(grid, range(cases), seed=TUNING)
    solver = grid.solver(1)
    with torch.no_grad():
        target = solver(initial, forcing)[:, -1]
        costs = [_cost(task, u, v, solver) for u, v in zip(initial, target, strict=True)]
        means = {g: sum(float(c(pid_forcing(c, *g)[None])) for c in costs) / cases for g in GAINS}
    return min(means, key=means.__getitem__)


def solve_case(index: int, name: str, calls: int, priors: Mapping[str, str], pid: Sequence[float]) -> dict[str, Found]:
    """All methods on one case: forcing's J and its parts as judged, calls, evaluations, seconds, costs on the way."""
    torch.set_num_threads(1)
    task = TASKS[name]
    grid = task.grid
    initial, own = (x[0] for x in burgers_cases(grid, range(index, index + 1), seed=SEED))
    judge = grid.solver(JUDGE)
    with torch.no_grad():
        target = judge(initial[None], own[None])[0, -1]
    cost, true = (_cost(task, initial, target, s) for s in (grid.solver(REFINE), judge))
    rows: dict[str, Found] = {}

    def enter(label: str, f: Tensor, began: float, before: Found | None = None, **more: Any) -> Found:
        with torch.no_grad():
            misfit, energy = float(true.misfit(f[None])), float(true.energy(f[None]))
        passed = time.perf_counter() - began + (before["seconds"] if before else 0.0)
        evaluations = more.pop("evaluations", 0) + (before["evaluations"] if before else 0)
        about = {"calls": 0, "evaluations": evaluations, "seconds": passed} | more
        rows[label] = {"J": misfit + task.weight * energy, "misfit": misfit, "energy": energy, **about}
        return rows[label]

    def through(where: str, start: Tensor | None, levels: tuple[float, ...], draws: int) -> tuple[Tensor, int]:
        solver = PriorSolver(_prior(where), levels=levels, draws=draws)
        found = optimal_forcing(_cost(task, initial, target, solver), start=start, calls=task.calls, smooth=task.smooth)
        return found.forcing, found.calls * solver.evaluations

    enter("no forcing", torch.zeros_like(own), time.perf_counter())
    enter("the data's own", own, time.perf_counter())
    began = time.perf_counter()
    enter("PID", pid_forcing(cost, *pid), began, calls=1)
    if "surrogate" in priors:
        began = time.perf_counter()
        f, evaluations = through(priors["surrogate"], None, (80.0,), 1)
        enter("surrogate, search", f, began, evaluations=evaluations)
    start = None
    if "prior" in priors:
        prior, sampler = _prior(priors["prior"]), WDNO()
        began = time.perf_counter()
        solution = invdiff.solve(load_problem(task.card, index), prior, sampler, draws=1, seed=0)
        f = solution.draws["forcing"][0].double()
        drawn = enter("WDNO", f, began, evaluations=sampler.steps)
        began = time.perf_counter()
        start, evaluations = through(priors["prior"], f, task.levels, task.draws)
        searched = enter("WDNO, search through the prior", start, began, drawn, evaluations=evaluations)
    began = time.perf_counter()
    best = optimal_forcing(cost, calls=calls)
    enter("adjoint", best.forcing, began, calls=best.calls, costs=best.costs)
    if start is not None:
        began = time.perf_counter()
        best = optimal_forcing(cost, start=start, calls=calls // 2)
        enter("WDNO, search, then adjoint", best.forcing, began, searched, calls=best.calls, costs=best.costs)
    return rows


def run(name: str, cases: int, calls: int, priors: Mapping[str, str], processes: int) -> list[dict[str, Any]]:
    """One row a method."""
    work: Callable[[int], dict[str, Found]] = partial(
        solve_case, name=name, calls=calls, priors=priors, pid=gains(name)
    )
    if processes > 1:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            every = list(pool.map(work, range(cases)))
    else:
        every = [work(i) for i in range(cases)]
    rows = []
    for label in every[0]:
        own = [found[label] for found in every]
        row: dict[str, Any] = {"setting": name, "method": label, "cases": cases}
        for key in ("J", "misfit", "energy", "calls", "evaluations", "seconds"):
            row[key] = [float(f"{v:.5g}") for v in mean_and_error([float(found[key]) for found in own])]
        if label == "PID":
            row["gains"] = gains(name)
        if "costs" in own[0]:
            # A search that ended early keeps its last cost.
            most = max(len(found["costs"]) for found in own)
            kept = [[*found["costs"], *[found["costs"][-1]] * (most - len(found["costs"]))] for found in own]
            row["mean_costs"] = [float(f"{sum(c) / cases:.5g}") for c in zip(*kept, strict=True)]
        row["each_J"] = [float(f"{found['J']:.4g}") for found in own]
        rows.append(row)
    return rows


def _by_calls(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Mean cost of both searches after some calls, and when each is within a tenth of the best."""
    if "WDNO, search, then adjoint" not in rows:
        return []
    cold, warm = (rows[k]["mean_costs"] for k in ("adjoint", "WDNO, search, then adjoint"))
    best = min(cold[-1], warm[-1])
    within = [next((i + 1 for i, c in enumerate(costs) if c <= 1.1 * best), None) for costs in (cold, warm)]
    marks = [n for n in (1, 2, 3, 5, 8, 12, 20, 30, 40, 60) if n <= len(cold)]
    above = sum(w > c for w, c in zip(warm, cold, strict=False))
    text = ["", "Mean J after solver calls, as the search's own solver has it:", ""]
    text += ["| start | " + " | ".join(map(str, marks)) + " | within 1.1 of the best after |"]
    text += ["| --- |" + " ---: |" * (len(marks) + 1)]
    for label, costs, first in (("zero", cold, within[0]), ("WDNO, search", warm, within[1])):
        cells = " | ".join(f"{costs[n - 1]:.3g}" if n <= len(costs) else "" for n in marks)
        text.append(f"| {label} | {cells} | {first or 'not reached'} |")
    return [
        *text,
        "",
        f"At {above} of {len(warm)} numbers of calls the mean from the prior's forcing is above that from zero.",
    ]


def table(report: Mapping[str, Any], source: str) -> str:
    """Markdown from the file alone."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    text = [f"Made from `{source}` by `python -m invdiff.bench.burgers_control`; not edited by hand.", ""]
    text.append(
        f"{report['cases']} held-out cases; searched with {REFINE} and judged with {JUDGE} cells in a control cell; "
        f"{report['device']}, {versions}. Means with standard errors over cases. Ratio: to the mean of the best J of "
        "each case in the table, the data's own left out. Evaluations are of the network, those of searches forward "
        "and backward."
    )
    for name in dict.fromkeys(r["setting"] for r in report["rows"]):
        rows = {r["method"]: r for r in report["rows"] if r["setting"] == name}
        # The data's own forcing reaches the target by construction, and is no method.
        found = [r["each_J"] for label, r in rows.items() if label != "the data's own"]
        least = [min(js) for js in zip(*found, strict=True)]
        best = sum(least) / len(least)
        text += [
            "",
            f"### {name}",
            "",
            "| method | J | ratio | misfit of the final state | energy | solver calls | evaluations | s a case |",
        ]
        text += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
        for label, r in rows.items():
            cells = [f"{r['J'][0]:.3g} ± {r['J'][1]:.1g}", f"{r['J'][0] / best:.3g}"]
            cells += [f"{r[key][0]:.3g} ± {r[key][1]:.1g}" for key in ("misfit", "energy")]
            cells += [f"{r['calls'][0]:.0f}", f"{r['evaluations'][0]:.0f}", f"{r['seconds'][0]:.2f}"]
            named = label + (", gains " + ", ".join(f"{g:g}" for g in r["gains"]) if "gains" in r else "")
            text.append(f"| {named} | " + " | ".join(cells) + " |")
        learned = [label for label in rows if label.startswith(("WDNO", "surrogate"))]
        if learned and len(least) > CHOSEN_ON:
            unseen = [
                f"{label} {sum(rows[label]['each_J'][CHOSEN_ON:]) / sum(least[CHOSEN_ON:]):.3g}" for label in learned
            ]
            text += [
                "",
                f"Ratios without the first {CHOSEN_ON} cases, that settings were chosen on: {'; '.join(unseen)}.",
            ]
        text += _by_calls(rows)
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the settings and write the files as they grow."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.burgers_control", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--calls", type=int, default=60, help="solver calls of the adjoint search from zero")
    parser.add_argument("--settings", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--prior", default="burgers-wavelet", help="for burgers-control; none if empty")
    parser.add_argument("--surrogate", help="folder of a trained surrogate, for burgers-control")
    parser.add_argument("--short", nargs="*", default=[], help="folders of priors trained for the short settings")
    parser.add_argument("--processes", type=int, default=1, help="cases side by side, a thread each")
    options = parser.parse_args(arguments)
    priors: dict[str, dict[str, str]] = {name: {} for name in TASKS}
    given = {"prior": options.prior, "surrogate": options.surrogate}
    priors["burgers-control"] = {k: v for k, v in given.items() if v}
    for folder in options.short:
        found = BurgersSetting(**_settings(folder)["setting"])
        for name, task in TASKS.items():
            if task.grid == found:
                priors[name]["prior"] = folder
    versions = {"invdiff": invdiff.__version__, "python": platform.python_version(), "torch": torch.__version__}
    report: dict[str, Any] = {
        "benchmark": "burgers-control",
        "cases": options.cases,
        "seed": SEED,
        "device": f"{platform.machine()} CPU, {options.processes} cases side by side, a thread each",
        "versions": versions,
        "priors": {name: {kind: _about(where) for kind, where in own.items()} for name, own in priors.items() if own},
        "rows": [],
    }
    for name in options.settings:
        report["rows"] += run(name, options.cases, options.calls, priors[name], options.processes)
        write(options.out, report)
        print(name, flush=True)
    if options.table is not None:
        options.table.write_text(table(report, options.out.as_posix()))


def _settings(folder: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads((Path(folder) / "prior.toml").read_text("utf-8"))


def _about(where: str) -> str:
    """Name and the start of the hash of its weights, never the folder."""
    return f"{_prior(where).name}, {_prior(where).key[:12]}"


if __name__ == "__main__":
    main()
