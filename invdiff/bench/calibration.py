"""Simulation-based calibration of every sampler under a trained prior, as one JSON file and a table made from it.

    python -m invdiff.bench.calibration --out docs/calibration.json --table docs/calibration_table.md
        [--prior photos-64] [--device cuda] [--precision bfloat16] [--compile] [--quick] [--worker i/k]
    python -m invdiff.bench.calibration --merge PART PART ... --out docs/calibration.json --table ...

Truths are draws of the prior itself, so that its own error does not enter but for the truths' discretisation. Every
sampler sees the same truths and measurements. Those that improve with steps run at three numbers of network
evaluations, the others at the largest, all with default settings. With ``--worker i/k`` one of k processes does its
share; ``--merge`` joins their files. The file is written after every row and holds no times.
"""

import argparse
import inspect
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

import invdiff
from invdiff import samplers
from invdiff.diagnostics.calibration import Calibration, calibrate
from invdiff.driver import Sampler
from invdiff.errors import CapabilityError, InputError, SamplingError
from invdiff.operators import Blur, Inpainting, gaussian_kernel, random_mask
from invdiff.operators.base import LinearOperator
from invdiff.priors.base import DiffusionPrior
from invdiff.priors.loading import load_prior
from invdiff.provenance import prior_key

TRUTHS, DRAWS, SEED, NOISE_STD = 104, 19, 0, 0.05
EVALUATIONS = (10, 30, 90)
QUICK = {"truths": 8, "draws": 19, "evaluations": (5, 10)}
OBSERVED = 0.3
BLUR = (15, 1.5)
GROWING = ("PiGDM", "SplitGibbs", "TransportLangevin")
MOMENTUM = "TransportLangevin, momentum"
NAMES = (*GROWING, "DPS", "DAPS", "DDRM", "DDNM", "DiffPIR", "REDDiff", "ULA", "ImportanceSampling", MOMENTUM)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much to do.

    Parameters
    ----------
    truths, draws
        Truths, and draws of each.
    evaluations
        Network evaluations a draw, rising.
    """

    truths: int
    draws: int
    evaluations: tuple[int, ...]


def tasks(shape: tuple[int, int, int]) -> dict[str, LinearOperator]:
    """Operators by name for pictures of a shape; a mask is shared by the channels."""
    return {
        "inpainting": Inpainting(random_mask(shape[1:], OBSERVED, seed=SEED), shape),
        "deblurring": Blur(gaussian_kernel(*BLUR), shape, boundary="reflect"),
    }


def at_cost(sampler: Sampler, evaluations: int) -> Sampler:
    """Return the sampler with the most steps that cost at most that many forward passes, and at least one step."""
    best: Any = replace(sampler, steps=1)
    for steps in range(2, evaluations + 1):
        more: Any = replace(sampler, steps=steps)
        if more.cost().forward > evaluations:
            break
        best = more
    return best  # type: ignore[no-any-return]


def settings_of(name: str) -> Sampler | None:
    """Return a sampler's default settings, PiGDM with Spectral; None where there is no such sampler."""
    if name == MOMENTUM:
        return samplers.TransportLangevin(momentum=0.6, refreshes=2, step_size=0.5)
    if name == "PiGDM":
        return samplers.PiGDM(covariance=samplers.Spectral())
    cls = getattr(samplers, name, None)
    return None if cls is None else cls()


def jobs(shape: tuple[int, int, int], evaluations: Sequence[int]) -> list[tuple[str, str, int]]:
    """Task, sampler and number of evaluations of every row."""
    return [
        (task, name, k)
        for task in tasks(shape)
        for name in NAMES
        for k in (evaluations if name in GROWING else evaluations[-1:])
    ]


def row(task: str, name: str, wanted: int, found: Calibration) -> dict[str, Any]:
    """One row of the file."""
    table = {q: {k: round(v, 5) for k, v in figures.items()} for q, figures in found.table().items()}
    histograms = {}
    for q in found.members:
        h = found.histogram(q)
        histograms[q] = [round(float(c) / h.expected, 4) for c in h.counts]
    return {
        "task": task,
        "sampler": name,
        "wanted_evaluations": wanted,
        "settings": found.sampler,
        "evaluations": round(found.evaluations, 2),
        "backward": round(float(found.about["backward_evaluations_per_draw"]), 2),
        "p_value": round(found.p_value, 6),
        "quantities": table,
        "rank_histograms": histograms,
    }


def head(options: argparse.Namespace, prior: Any, plan: Plan) -> dict[str, Any]:
    """Collect what is the same for all rows."""
    device = torch.device(options.device or "cpu")
    return {
        "benchmark": "calibration",
        "quick": options.quick,
        "prior": {"name": str(getattr(prior, "name", options.prior)), "key": prior_key(prior), "shape": [*prior.shape]},
        "truths": plan.truths,
        "truth_steps": options.truth_steps if takes_steps(prior) else None,
        "draws": plan.draws,
        "noise_std": NOISE_STD,
        "seed": SEED,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": options.precision,
        "compiled": options.compile,
        "versions": {
            "invdiff": invdiff.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
    }


def takes_steps(prior: Any) -> bool:
    """Whether a prior's draws are those of an integrator with a number of steps."""
    return "steps" in inspect.signature(prior.sample).parameters


def collect(options: argparse.Namespace, prior: DiffusionPrior) -> dict[str, Any]:
    """Run this worker's share, and write the file after every row."""
    plan = Plan(truths=options.truths, draws=options.draws, evaluations=tuple(options.evaluations))
    if options.quick:
        plan = Plan(**QUICK)  # type: ignore[arg-type]
    c, h, w = prior.shape
    index, workers = (int(part) for part in options.worker.split("/"))
    operators = tasks((c, h, w))

    @lru_cache  # truths of a network cost more than a row
    def truth_sampler(n: int, seed: int) -> torch.Tensor:
        kept: Any = prior
        steps = {"steps": options.truth_steps} if takes_steps(prior) else {}
        drawn: torch.Tensor = kept.sample(n, seed=seed, **steps)
        return drawn

    report = head(options, prior, plan) | {"rows": [], "left_out": []}
    wanted = [
        job
        for job in jobs((c, h, w), plan.evaluations)
        if (not options.only or job[1] in options.only) and (not options.tasks or job[0] in options.tasks)
    ]
    for task, name, k in wanted[index::workers]:
        reason = ""
        chosen = settings_of(name)
        if chosen is None:
            reason = "is not among invdiff.samplers"
        else:
            try:
                found = calibrate(
                    operators[task],
                    prior,
                    at_cost(chosen, k),
                    noise_std=NOISE_STD,
                    truths=plan.truths,
                    draws=plan.draws,
                    seed=SEED,
                    truth_sampler=truth_sampler,
                    device=options.device,
                    micro_batch=options.micro_batch,
                    together=options.together,
                    precision=options.precision,
                    compile=options.compile,
                )
            except (CapabilityError, InputError, SamplingError) as error:
                reason = f"fails: {error}"
            else:
                report["rows"].append(row(task, name, k, found))
                print(found)
        if reason:
            report["left_out"].append({"task": task, "sampler": name, "wanted_evaluations": k, "reason": reason})
            print(f"{task}: {name} at {k} evaluations {reason}")
        write(options.out, report)
    return report


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a report."""
    path.write_text(json.dumps(report, indent=1) + "\n")


def merge(parts: Sequence[Path]) -> dict[str, Any]:
    """Join the files of several workers, in the order of tasks, samplers and evaluations.

    Raises
    ------
    InputError
        If they are of different runs.
    """
    reports = [json.loads(part.read_text()) for part in parts]
    common = [{k: v for k, v in r.items() if k not in {"rows", "left_out"}} for r in reports]
    if any(c != common[0] for c in common[1:]):
        raise InputError("These files are of runs with different settings, devices or versions; merge those of one.")
    order = list(tasks((1, 16, 16)))

    def place(r: dict[str, Any]) -> tuple[int, int, int]:
        return order.index(r["task"]), NAMES.index(r["sampler"]), r["wanted_evaluations"]

    # A row that was run again replaces the first.
    joined = {key: {place(r): r for report in reports for r in report[key]} for key in ("rows", "left_out")}
    return common[0] | {key: [found[k] for k in sorted(found)] for key, found in joined.items()}


_SHOWN = ("values", "low frequencies", "high frequencies")


def table(report: dict[str, Any], source: str) -> str:
    """Markdown from the file alone; figures whose 95 % interval excludes what exact draws give are in bold."""
    steps = "" if report["truth_steps"] is None else f" at {report['truth_steps']} steps"
    about = (
        f"{report['truths']} truths drawn from {report['prior']['name']}{steps}, {report['draws']} draws of each, "
        f"noise {report['noise_std']:g}, seed {report['seed']}, {report['device']}, {report['precision']}"
        f"{', compiled' if report['compiled'] else ''}; "
        f"{', '.join(f'{k} {v}' for k, v in report['versions'].items())}. "
        "Share of truths inside the central intervals of 50 % and 90 % with its standard error over truths, and mean "
        "rank (in units of draws + 1; 0.5 for exact draws) with its own; **bold** where the 95 % interval, or two "
        "standard errors, exclude what exact draws give. p: uniform ranks of all quantities together, their number "
        "and dependence allowed for. Passes: through the network, a draw, forward + backward."
    )
    text = [f"Made from `{source}` by `python -m invdiff.bench.calibration`; not edited by hand.", "", about]
    columns = ["sampler", "passes", *(f"{q}, {k} %" for q in _SHOWN for k in (50, 90))]
    columns += ["rank of roughness", "rank of log-likelihood", "p"]
    for task in dict.fromkeys(r["task"] for r in [*report["rows"], *report["left_out"]]):
        text += ["", f"### {task}", "", "| " + " | ".join(columns) + " |"]
        text += ["|" + "|".join([" --- "] * 2 + [" ---: "] * (len(columns) - 2)) + "|"]
        for r in (r for r in report["rows"] if r["task"] == task):
            cells = [r["sampler"], f"{r['evaluations']:.0f} + {r['backward']:.0f}"]
            for name in _SHOWN:
                q = r["quantities"].get(name)
                for k in (50, 90):
                    key = f"coverage_{k}"
                    if q is None:
                        cells.append("")
                        continue
                    fits = q[f"{key}_low"] <= k / 100 <= q[f"{key}_high"]
                    cells.append(_cell(q[key], q[f"{key}_se"], fits=fits))
            for name in ("roughness", "log-likelihood"):
                q = r["quantities"][name]
                fits = abs(q["mean_rank"] - 0.5) <= 2.0 * q["mean_rank_se"]
                cells.append(_cell(q["mean_rank"], q["mean_rank_se"], fits=fits))
            p = f"{r['p_value']:.2g}"
            cells.append(p if r["p_value"] >= 0.05 else f"**{p}**")
            text.append("| " + " | ".join(cells) + " |")
        gone = [o for o in report["left_out"] if o["task"] == task]
        text += [f"\nLeft out: {o['sampler']} at {o['wanted_evaluations']} passes, which {o['reason']}" for o in gone]
    return "\n".join(text) + "\n"


def _cell(value: float, se: float, *, fits: bool) -> str:
    figure = f"{value:.3f} ± {se:.3f}"
    return figure if fits else f"**{figure}**"


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark, or join its parts, and write the file and its table."""
    parser = argparse.ArgumentParser(prog="invdiff.bench.calibration", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", type=Path, help="Markdown made from the file")
    parser.add_argument("--prior", default="photos-64")
    parser.add_argument("--truth-steps", type=int, default=64, help="steps of the truths' integrator")
    parser.add_argument("--device")
    parser.add_argument("--micro-batch", type=int, help="pictures in one pass through the network")
    parser.add_argument("--together", type=int, help="truths solved in one batch")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="8 truths, 19 draws, few evaluations")
    parser.add_argument("--only", nargs="*", choices=NAMES, help="samplers; all if left out")
    parser.add_argument("--tasks", nargs="*", choices=tuple(tasks((1, 16, 16))), help="all if left out")
    parser.add_argument("--truths", type=int, default=TRUTHS)
    parser.add_argument("--draws", type=int, default=DRAWS, help="of each truth")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS, help="passes a draw, rising")
    parser.add_argument("--worker", default="0/1", help="i/k: this process's share")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of the workers to join; runs nothing")
    options = parser.parse_args(arguments)
    report = (
        merge(options.merge) if options.merge else collect(options, cast(DiffusionPrior, load_prior(options.prior)))
    )
    write(options.out, report)
    if options.table is not None:
        options.table.write_text(table(json.loads(options.out.read_text()), options.out.as_posix()))


if __name__ == "__main__":
    main()
