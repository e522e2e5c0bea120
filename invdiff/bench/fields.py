"""Samplers on Gaussian fields of hundreds to thousands of values, where the posterior and its evidence are known.

    python -m invdiff.bench.fields --out docs/fields.json --table docs/fields_table.md [--device cuda]
        [--figure docs/_static/fields_frontier.svg] [--sides 24 48 64] [--parts gate frontier] [--only NAME ...]
        [--quick] [--worker i/k]
    python -m invdiff.bench.fields --merge PART PART ... --out docs/fields.json --table ... --figure ...
    python -m invdiff.bench.fields --from docs/fields.json --table ... --figure ...

The gate holds `TransportLangevin` to bounds at every side; the frontier runs all samplers, and deepinv's, at growing
numbers of network passes on one side. Every sampler gets the exact denoiser, so that all error is its own, and the same
eight measurements, solved together, with as many draws of each. With ``--worker i/k`` one of k processes does its
share; ``--merge`` joins their files, and rows that were run again replace the first. The file is written after every
row and holds no times.
"""

import argparse
import json
import platform
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invdiff
from invdiff.bench import deepinv_samplers
from invdiff.bench.exactness_deepinv import exact_denoiser
from invdiff.bench.fields_contenders import Contender, at, contenders, recommended
from invdiff.bench.fields_page import draw_figure, table
from invdiff.diagnostics.marginals import MarginalPosterior
from invdiff.driver import Sampler
from invdiff.errors import CapabilityError, InputError
from invdiff.likelihoods import Gaussian
from invdiff.operators import Blur, Downsampling, Inpainting, gaussian_kernel, random_mask
from invdiff.operators.base import LinearOperator
from invdiff.priors.field import FieldPrior
from invdiff.problem import Problem
from invdiff.samplers import TransportLangevin
from invdiff.solve import solve

STD, NOISE_STD, SEED = 0.2, 0.02, 0
FRONTIER_TASKS = ("inpainting 50 %", "blur", "down-sampling")
TASKS = (*FRONTIER_TASKS, "inpainting 30 %")
EXACT_DRAWS = "exact draws"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to do.

    Parameters
    ----------
    measurements, draws
        Measurements of each problem in the gate, and draws of each.
    gate
        Evaluations of the gate, the first of which also judges the evidence.
    longer
        Evaluations at which the evidence is estimated beside.
    sides
        Sides of the gate's fields.
    frontier_measurements, frontier_side, passes
        Measurements and side of the frontier, and network passes a draw.
    """

    sides: tuple[int, ...] = (24, 48, 64)
    measurements: int = 8
    draws: int = 256
    gate: tuple[int, ...] = (300, 100)
    longer: tuple[int, ...] = (600, 1200)
    frontier_measurements: int = 4
    frontier_side: int = 24
    passes: tuple[int, ...] = (10, 30, 100, 300, 1000)


QUICK = Plan(
    sides=(12,),
    measurements=2,
    draws=32,
    gate=(30, 15),
    longer=(45,),
    frontier_measurements=2,
    frontier_side=12,
    passes=(10, 30),
)


def field_prior(side: int) -> FieldPrior:
    """Field about grey with values like a picture's: power (1 + K^2 / 4)^-1.8 at K cycles a side."""
    return FieldPrior.power_law((1, side, side), exponent=3.6, std=STD, mean=0.5, outer_scale=0.5 * side)


def field_operator(task: str, side: int) -> LinearOperator:
    """Operator of a task."""
    shape = (1, side, side)
    if task == "blur":
        return Blur(gaussian_kernel(5, 1.0), shape, boundary="reflect")
    if task == "down-sampling":
        return Downsampling(shape, 2)
    return Inpainting(random_mask(shape, {"inpainting 50 %": 0.5, "inpainting 30 %": 0.3}[task], seed=1), shape)


@dataclass(frozen=True, kw_only=True)
class FieldCase:
    """Measurements of fields by one operator, and their posteriors.

    Parameters
    ----------
    task, side
        What is measured, and the side of the fields.
    prior, problems
        The field and the measurements, on the CPU.
    exact
        Their posteriors, on the device of the run.
    device
        That device.
    """

    task: str
    side: int
    prior: FieldPrior
    problems: tuple[Problem, ...]
    exact: MarginalPosterior
    device: str


@lru_cache(maxsize=4)  # of thousands of values each takes half a gigabyte
def field_case(task: str, side: int, measurements: int, device: str = "cpu") -> FieldCase:
    """Draw truths from the prior, measure them, and work out the posteriors."""
    prior, operator = field_prior(side), field_operator(task, side)
    truths = prior.sample(measurements, seed=SEED)
    problems = tuple(
        Problem.simulate(operator, truth, noise_std=NOISE_STD, seed=SEED + i, name=f"{task} {side} {i}")
        for i, truth in enumerate(truths)
    )
    likelihood = stacked(problems)
    exact = MarginalPosterior(prior, operator, likelihood.measurement, NOISE_STD, device=device)
    return FieldCase(task=task, side=side, prior=prior, problems=problems, exact=exact, device=device)


def stacked(problems: Sequence[Problem]) -> Gaussian:
    """One likelihood with the measurements of all problems."""
    parts = [p.likelihood for p in problems if isinstance(p.likelihood, Gaussian)]
    return Gaussian.stack(parts)


def run_ours(case: FieldCase, sampler: Sampler, draws: int) -> tuple[Tensor, dict[str, Any]]:
    """Draws (measurements, draws, *event), and what the file says of the run."""
    solutions = solve(
        list(case.problems),
        deepcopy(case.prior),  # `solve` moves the prior that it is given
        sampler,
        draws=draws,
        seed=SEED,
        device=case.device,
        dtype=torch.float64,
    )
    about = solutions[0].about
    found = {
        "settings": repr(sampler),
        "evaluations": round(about["evaluations_per_draw"], 2),
        "backward": round(about["backward_evaluations_per_draw"], 2),
    }
    if all(s.log_evidence is not None for s in solutions):
        errors = torch.tensor([s.log_evidence for s in solutions]).double() - case.exact.log_evidence.cpu()
        found |= {
            "log_evidence_error": round(float(errors.mean()), 3),
            "log_evidence_deviation": round(float(errors.std()), 3) if len(errors) > 1 else None,
        }
    return torch.stack([s.draws for s in solutions]), found


def run_theirs(
    case: FieldCase, peer: str, settings: deepinv_samplers.Settings, draws: int
) -> tuple[Tensor, dict[str, Any]]:
    """Draw with one of deepinv's samplers, as `run_ours`."""
    likelihood = deepcopy(stacked(case.problems)).to(case.device)
    shape = case.prior.shape
    run = deepinv_samplers.draw(
        peer, settings, likelihood, lambda passes: exact_denoiser(case.exact.prior, passes), shape, draws, SEED
    )
    found = {
        "settings": f"{peer}({dict(settings)})",
        "evaluations": round(run.evaluations, 2),
        "backward": round(run.backward, 2),
    }
    return run.draws.reshape(len(case.problems), draws, *shape), found


@dataclass(frozen=True, kw_only=True)
class Job:
    """A row or, in the frontier, one for each of a contender's settings."""

    part: str
    side: int
    task: str
    name: str
    wanted: int

    @property
    def key(self) -> tuple[str, int, str, str, int]:
        """What tells it apart."""
        return self.part, self.side, self.task, self.name, self.wanted


def largest_std(side: int) -> float:
    """Return the standard deviation of the field's widest direction."""
    return sqrt(float(field_prior(side).spectrum.max()))


def gate_samplers(side: int) -> dict[str, TransportLangevin]:
    """Samplers that the gate is for: with momentum as recommended, and with the default settings."""
    return {"momentum": recommended(largest_std(side)), "default": TransportLangevin()}


def jobs(plan: Plan, sides: Sequence[int]) -> list[Job]:
    """Return all that there is to do."""
    found = []
    for side in sides:
        for task in TASKS:
            found.append(Job(part="gate", side=side, task=task, name=EXACT_DRAWS, wanted=0))
            for name in gate_samplers(side):
                longer = plan.longer if name == "momentum" else ()
                found += [Job(part="gate", side=side, task=task, name=name, wanted=k) for k in (*plan.gate, *longer)]
    side = plan.frontier_side
    for task in FRONTIER_TASKS:
        found.append(Job(part="frontier", side=side, task=task, name=EXACT_DRAWS, wanted=0))
        for c in contenders(largest_std(side), STD):
            found += [Job(part="frontier", side=side, task=task, name=c.name, wanted=k) for k in plan.passes]
    return found


def rows_of(job: Job, plan: Plan, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Do a job: its rows, and what was left out with the reason."""
    gate = job.part == "gate"
    case = field_case(job.task, job.side, plan.measurements if gate else plan.frontier_measurements, device)
    head: dict[str, Any] = {"part": job.part, "side": job.side, "task": job.task, "name": job.name}
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []

    def add(draws: Tensor, found: dict[str, Any], **more: Any) -> None:
        figures = case.exact.compare(draws)
        each = [round(float(e), 3) for e in figures.mean_error]
        summary = {k: round(v, 5) for k, v in figures.summary().items()}
        rows.append(head | {"wanted": job.wanted} | more | found | summary | {"each_mean_error": each})

    if job.name == EXACT_DRAWS:
        none = {"settings": "", "evaluations": 0.0, "backward": 0.0}
        add(case.exact.sample(plan.draws, seed=SEED), none, library="", kind=-1)
        return rows, left_out
    if gate:
        add(*run_ours(case, with_evaluations(gate_samplers(job.side)[job.name], job.wanted), plan.draws))
        return rows, left_out
    contender = next(c for c in contenders(largest_std(job.side), STD) if c.name == job.name)
    for settings in settings_of(contender, job.wanted):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # chains that did not come round say so; the figures do, too
                if isinstance(settings, Sampler):
                    run = run_ours(case, settings, plan.draws)
                else:
                    run = run_theirs(case, contender.peer, settings, plan.draws)
        except (CapabilityError, InputError, RuntimeError) as error:  # deepinv's and the device's failures, too
            reason = str(error)
        else:
            reason = "" if bool(torch.isfinite(run[0]).all()) else "its draws are not finite."
        if reason:
            left_out.append(head | {"wanted": job.wanted, "settings": str(settings), "reason": reason})
        else:
            add(*run, library=contender.library, kind=contender.kind)
    return rows, left_out


def settings_of(contender: Contender, passes: int) -> list[Sampler | deepinv_samplers.Settings]:
    """Return the settings of a contender that take at most that many passes."""
    ours = [at(sampler, passes) for sampler in contender.ours]
    theirs = [settings(passes) for settings in contender.theirs] if find_spec("deepinv") else []
    return [s for s in (*ours, *theirs) if s is not None]


def with_evaluations(sampler: TransportLangevin, evaluations: int) -> TransportLangevin:
    """Return the sampler with as many levels as cost at most that many evaluations."""
    return replace(sampler, steps=evaluations // (1 + sampler.refreshes))


def head(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Collect what is the same for all rows."""
    device = torch.device(options.device)
    return {
        "benchmark": "fields",
        "quick": options.quick,
        "measurements": plan.measurements,
        "frontier_measurements": plan.frontier_measurements,
        "draws": plan.draws,
        "std": STD,
        "noise_std": NOISE_STD,
        "seed": SEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            **({"deepinv": version("deepinv")} if find_spec("deepinv") else {}),
        },
    }


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Run this worker's share, and write the file after every row."""
    plan = QUICK if options.quick else Plan()
    index, workers = (int(part) for part in options.worker.split("/"))
    report = head(options, plan) | {"rows": [], "left_out": []}
    wanted = [
        job
        for job in jobs(plan, options.sides or plan.sides)
        if job.part in options.parts and (not options.only or job.name in options.only)
    ]
    for job in wanted[index::workers]:
        rows, left_out = rows_of(job, plan, options.device)
        report["rows"] += rows
        report["left_out"] += left_out
        shown = ("part", "side", "task", "name", "evaluations", "backward", "mean_error", "variance_ratio", "inside")
        for r in rows:
            print(json.dumps({k: r[k] for k in (*shown, "log_evidence_error") if k in r}), flush=True)
        for o in left_out:
            print(json.dumps(o), flush=True)
        write(options.out, report)
    return report


def merge(parts: Sequence[Path]) -> dict[str, Any]:
    """Join files of several workers; what was run again, here a job in a later file, replaces the first.

    Raises
    ------
    InputError
        If they are of different runs.
    """
    reports = [json.loads(part.read_text("utf-8")) for part in parts]
    common = [{k: v for k, v in r.items() if k not in {"rows", "left_out"}} for r in reports]
    if any(c != common[0] for c in common[1:]):
        raise InputError("These files are of runs with different settings, devices or versions; merge those of one.")
    plan = QUICK if common[0]["quick"] else Plan()
    sides = sorted({r["side"] for report in reports for r in report["rows"] if r["part"] == "gate"})
    order = {job.key: i for i, job in enumerate(jobs(plan, sides))}
    joined: dict[str, list[dict[str, Any]]] = {"rows": [], "left_out": []}
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for report in reports:
        own: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for key in joined:
            for r in report[key]:
                place = order[r["part"], r["side"], r["task"], r["name"], r["wanted"]]
                own.setdefault(place, {"rows": [], "left_out": []})[key].append(r)
        found |= own
    for place in sorted(found):
        for key, rows in found[place].items():
            joined[key] += rows
    return common[0] | joined


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report."""
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, join its parts or read its file, and write the file, its table and its figure."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.fields", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file of the figures")
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--figure", type=Path, help="picture of the frontier made from the file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", help="sides of the gate's fields; 24, 48 and 64 if left out")
    parser.add_argument("--parts", nargs="+", choices=("gate", "frontier"), default=["gate", "frontier"])
    parser.add_argument("--only", nargs="*", default=(), help="these samplers alone, by their names in the file")
    parser.add_argument("--quick", action="store_true", help="few draws, small fields, few evaluations")
    parser.add_argument("--worker", default="0/1", help="i/k: this process's share")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of the workers to join; runs nothing")
    parser.add_argument("--from", type=Path, dest="source", help="read this file; runs nothing")
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.source is None):
        parser.error("give either --out, to measure or merge, or --from, to read a file")
    source = options.source or options.out
    if options.source is None:
        write(options.out, merge(options.merge) if options.merge else collect(options))
    report = json.loads(source.read_text("utf-8"))
    picture = None
    if options.figure is not None:
        draw_figure(report, options.figure)
        if options.table is not None and options.figure.is_relative_to(options.table.parent):
            picture = f"/{options.figure.relative_to(options.table.parent).as_posix()}"  # from the pages' root
    if options.table is not None:
        options.table.write_text(table(report, source.as_posix(), picture), "utf-8")


if __name__ == "__main__":
    main()
